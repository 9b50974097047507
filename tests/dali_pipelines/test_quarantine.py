"""The record of broken images: several ranks, restarts, limits."""

import json
import threading

import pytest

from dune_fast.dali_pipelines.datasets import DataConfig
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.listing import PathList
from dune_fast.dali_pipelines.quarantine import Quarantine

NAMES, IMAGES = ["a", "b"], [PathList(f"{i}.jpg" for i in range(100)), PathList(["x.jpg", "y.jpg"])]


def make(folder, rank: int = 0, **options) -> Quarantine:
    return Quarantine(NAMES, IMAGES, DataConfig(**options), folder, rank)


def test_what_one_process_found_is_known_to_the_next_whatever_its_rank(tmp_path):
    first = make(tmp_path / "run", rank=1)
    first.add(0, 7, "cut off")
    first.add(0, 7, "again")
    first.add(1, 0, "text")
    entries = [json.loads(line) for line in (tmp_path / "run" / "quarantine.rank1.jsonl").read_text().splitlines()]
    expected = {"dataset": "a", "index": 7, "path": "7.jpg", "reason": "cut off", "lasting": True}
    assert entries[0] == expected and len(entries) == 2
    second = make(tmp_path / "run", rank=0)
    assert (0, 7) in second and (1, 0) in second and (0, 6) not in second
    assert second.counts() == {"a": 1, "b": 1}
    second.add(0, 9, "empty")
    assert make(tmp_path / "run", rank=5).counts() == {"a": 2, "b": 1}


@pytest.mark.parametrize("lasting", [True, False])
def test_limit_is_one_for_all_ranks_and_the_next_run_tries_again_what_may_be_back(tmp_path, lasting):
    """Four of a hundred are spared; each rank alone would get to four."""
    ranks = [make(tmp_path, rank) for rank in range(5)]
    for i, rank in enumerate(ranks[:4]):
        rank.add(0, i, "cut off", lasting)
        assert (0, i) in rank
    assert all(rank.counts()["a"] == 4 for rank in ranks)
    with pytest.raises(DataError, match=r"5 of 100 images are broken, 4 are tolerated; the last one is 50\.jpg \(text"):
        ranks[4].add(0, 50, "text", lasting)
    assert make(tmp_path).counts()["a"] == (5 if lasting else 0)


def test_entry_behind_a_torn_line_is_kept(tmp_path):
    """A machine that went down in the middle of a line; the run goes on in the same file."""
    (tmp_path / "quarantine.rank0.jsonl").write_text('{"dataset": "a", "ind')
    make(tmp_path).add(0, 3, "cut off")
    make(tmp_path).add(0, 4, "cut off")
    assert make(tmp_path, rank=1).counts()["a"] == 2
    assert len((tmp_path / "quarantine.rank0.jsonl").read_text().splitlines()) == 3


def test_lines_of_other_data_and_torn_lines_are_left_out(tmp_path):
    good = {"dataset": "a", "index": 1, "path": "1.jpg", "reason": "", "lasting": True}
    others = [{**good, "dataset": "c"}, {**good, "path": "other.jpg"}, {**good, "index": 1000}, {"x": 1}, [], None]
    lines = [json.dumps(entry) for entry in [*others, good]]
    (tmp_path / "quarantine.rank0.jsonl").write_text("\n".join(["{torn", *lines]) + '\n{"dataset": "b", "ind')
    assert make(tmp_path).counts() == {"a": 1, "b": 0}


def test_many_threads_lose_nothing(tmp_path):
    quarantine = make(tmp_path, max_broken_share=1.0)
    threads = [threading.Thread(target=quarantine.add, args=(0, i % 100, "x")) for i in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert quarantine.counts()["a"] == make(tmp_path).counts()["a"] == 100
    assert len((tmp_path / "quarantine.rank0.jsonl").read_text().splitlines()) == 100


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(None).add(0, 1, "x")
    assert not list(tmp_path.iterdir())
