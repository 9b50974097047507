"""Ranks that do not belong together are told so at the start: the rank, its host, what differs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dune_fast.dali_pipelines.listing import PathList
from dune_fast.engine import same_ranks
from dune_fast.engine.provenance import files_hash
from dune_fast.engine.same_ranks import fingerprint, refuse_differences, refuse_own_folders

HOSTS = ["node_a", "node_b"]


@pytest.fixture
def seen_by_rank_0(monkeypatch):
    """What this process gives to a gathering counts as rank 1's; the returned dictionary is rank 0's."""
    others: dict[str, str] = {}
    monkeypatch.setattr(same_ranks, "gather", lambda mine: [others, mine])
    return others


def test_a_difference_is_a_sentence(seen_by_rank_0):
    seen_by_rank_0 |= {"version of torch": "2.13.0", "hash": "ab"}
    refuse_differences(dict(seen_by_rank_0), HOSTS, "Cure")
    with pytest.raises(ValueError, match="rank 1 on node_b differs from rank 0 on .*: version of torch is 2.12.0, "):
        refuse_differences(seen_by_rank_0 | {"version of torch": "2.12.0"}, HOSTS, "Cure")
    with pytest.raises(ValueError, match="hash is None, not ab; version of torch is None, .* Cure, then start"):
        refuse_differences({}, HOSTS, "Cure")


def test_the_hash_follows_every_source_file_and_links(tmp_path):
    package, linked = tmp_path / "package", tmp_path / "elsewhere"
    package.mkdir()
    linked.mkdir()
    (package / "folder").symlink_to(linked)
    (linked / "a.py").write_text("x = 1")
    before = files_hash([package], (".py",))
    (linked / "a.txt").write_text("no source")
    assert files_hash([package], (".py",)) == before
    (linked / "a.py").write_text("x = 2")
    changed = files_hash([package], (".py",))
    (linked / "a.py").rename(linked / "b.py")
    assert len({before, changed, files_hash([package], (".py",))}) == 3


def test_other_images_have_another_fingerprint():
    def of(names: list[str]) -> dict[str, str]:
        return fingerprint([SimpleNamespace(name="photos", train=PathList(names), val=PathList([]))])

    names = [f"{i:05}.jpg" for i in range(10_000)]
    mine, fewer, other = of(names), of(names[:-1]), of([*names[:-1], "z.jpg"])
    assert mine == of(list(names))
    key = "training images of dataset photos"
    assert mine[key].startswith("10000 ") and fewer[key].startswith("9999 ") and other[key] != mine[key]


@pytest.mark.parametrize("fault", ["", "another folder", "read only"])
def test_a_folder_that_is_not_shared_is_refused(fault, tmp_path, monkeypatch):
    """Regression: each save waited for files that nobody else saw, and at the end there was no checkpoint."""
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.mkdir()
    sees = {"": run, "another folder": other, "read only": run}[fault]

    def gather(mine: str) -> list[str]:
        """Rank 1 looks while rank 0's mark is there."""
        (mark,) = run.glob(".shared.*")
        if fault == "read only":
            monkeypatch.setattr(same_ranks, "write_whole", refuse)
        return [mine, same_ranks._folder_fault(sees / mark.name, 1)]

    def refuse(path: Path, *_: bytes) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(same_ranks, "gather", gather)
    monkeypatch.setattr(same_ranks, "_FOLDER_SECONDS", 0.2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda values: None)
    if not fault:
        refuse_own_folders(run, HOSTS)
    else:
        words = "does not see in .*other what" if fault == "another folder" else "cannot write to .*run .Read-only"
        with pytest.raises(ValueError, match=f"not one folder for all ranks: rank 1 on node_b {words}"):
            refuse_own_folders(run, HOSTS)
    assert not list(run.iterdir()) and not list(other.iterdir())
