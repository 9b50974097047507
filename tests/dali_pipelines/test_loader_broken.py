"""Broken images and shards in training: replaced, named, counted, or the end of the run."""

import itertools
import logging
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")

from loader_helpers import CPU, assert_others_unchanged, broken_paths, config, damage, refuse_to_open, take  # noqa: E402

from dune_fast.dali_pipelines import images  # noqa: E402
from dune_fast.dali_pipelines.datasets import DataError  # noqa: E402
from dune_fast.dali_pipelines.images import plain_jpeg  # noqa: E402
from dune_fast.dali_pipelines.loader import TrainLoader  # noqa: E402
from dune_fast.dali_pipelines.pipeline import Decoder  # noqa: E402
from dune_fast.dali_pipelines.storage import Reader  # noqa: E402


@pytest.mark.parametrize(
    "how, reason",
    [
        ("vanished", "No such file"),
        ("a folder", "Is a directory"),
        ("forbidden", "Permission denied"),
        ("empty", "the file is empty"),
        ("text", "no known image format"),
        ("truncated", "ends too early"),
        ("truncated with a thumbnail", "ends too early"),
        ("half a PNG", "truncated"),
        ("wrong tables", "broken data stream"),
    ],
)
def test_broken_image_is_replaced_and_named_and_changes_nothing_else(photos, how, reason, caplog, monkeypatch):
    data = config(photos)
    with TrainLoader(data, 32, 4, 0, 1, 0, CPU) as loader:  # indexed while all was well
        clean = take(data, 4, batch=4)
        victim = clean[1].paths[3]
        damage(Path(victim), how)
        if how == "forbidden" and os.access(victim, os.R_OK):  # permissions do not bind root
            refuse_to_open(victim, monkeypatch)
        with caplog.at_level(logging.WARNING):
            batches = loader.batches(0)
            found = [next(batches) for _ in range(4)]
        warnings = [record.getMessage() for record in caplog.records if victim in record.getMessage()]
        assert loader.broken == {"d0": 1} and broken_paths(loader) == [victim]
        # found again from nothing, in the middle: the same replacement
        with TrainLoader(data, 32, 4, 0, 1, 0, CPU, datasets=loader.datasets) as again:
            resumed = next(again.batches(1))
    assert len(warnings) == 1 and "dataset d0: broken image" in warnings[0] and reason in warnings[0]
    assert_others_unchanged(clean, found, {victim})
    assert_others_unchanged(found[1:2], [resumed], set())


def test_image_that_is_cut_off_is_broken_whatever_part_of_it_is_wanted(photos, photo):
    """Its upper part could be decoded: who finds it out, and when, would depend on the crop, so on the ranks."""
    victims = sorted(photos.iterdir())[:4]
    for path in victims:
        photo(0, 300, 400).save(path)
        damage(path, "truncated with a thumbnail")
    data = config(photos, crop_scale=[0.02, 0.05])
    for seed in range(3):
        seen = {path for batch in take(data, 4, seed=seed) for path in batch.paths}  # one pass is three
        assert len(seen) == 20 and not seen & set(map(str, victims))


@pytest.mark.parametrize("how", ["a byte", "the end"])
def test_damaged_shard_costs_its_images_alone(sharded, how):
    """A flipped byte would decode to a slightly wrong picture: only the checksum tells."""
    data = config(sharded, max_broken_share=0.9)
    clean = take(data, 4)
    with TrainLoader(data, 32, 8, 0, 1, 0, CPU) as loader:  # opened while all was well
        victim = clean[1].paths[3]
        shard, _, offset = victim.rpartition("@")
        content, at = bytearray(Path(shard).read_bytes()), int(offset) + 700
        content[at] ^= 1
        Path(shard).write_bytes(content if how == "a byte" else content[:at])
        lost = {victim} if how == "a byte" else {
            path for batch in clean for path in batch.paths
            if path.startswith(shard) and int(path.rpartition("@")[2]) >= int(offset)
        }  # fmt: skip
        batches = loader.batches()
        found = [next(batches) for _ in range(4)]
        assert set(broken_paths(loader)) == lost and loader.broken == {"d0": len(lost)}
    assert_others_unchanged(clean, found, lost)


@pytest.mark.parametrize("kind", ["ours", "of another tool"])
def test_shard_that_was_replaced_costs_its_images_alone_and_stops_a_run_with_the_reason(sharded, kind, caplog):
    """An index that does not match its tar: of the same size, so only its images can tell."""
    victim = sharded / "train-000001.tar"
    reason = "the checksum differs" if kind == "ours" else "no known image format"
    if kind == "of another tool":  # whose index is made from the tar's headers, without checksums
        for path in sharded.iterdir():
            if not path.name.startswith("train-0"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    with TrainLoader(config(sharded, max_broken_share=0.9), 32, 8, 0, 1, 0, CPU) as loader:
        train = loader.datasets[0].train
        lost = {path for path in train if path.startswith(str(victim))}
        victim.write_bytes(b"other" * (victim.stat().st_size // 5) + bytes(victim.stat().st_size % 5))
        batches = list(itertools.islice(loader.batches(), 4))
        assert set(broken_paths(loader)) == lost and 4 < len(lost) < len(train)
        seen = {path for batch in batches for path in batch.paths}
        assert seen == set(train) - lost and all(len(batch) == 8 for batch in batches)
    warnings = [line for line in (record.getMessage() for record in caplog.records) if "broken image" in line]
    assert len(warnings) == len(lost) and all(reason in line for line in warnings)
    with (
        TrainLoader(config(sharded), 32, 8, 0, 1, 0, CPU, datasets=loader.datasets) as strict,
        pytest.raises(DataError, match=rf"[5-9] of 20 images are broken, 4 are tolerated.*{reason}"),
    ):
        list(itertools.islice(strict.batches(), 4))


@pytest.mark.parametrize("when", ["before the first batch", "in the middle"])
def test_vanished_shard_stops_the_run_with_a_sentence(sharded, when):
    with TrainLoader(config(sharded), 32, 8, 0, 1, 0, CPU) as loader:
        loader._source._reader = Reader(0, open_files=1)  # a shard that is still open could be read to its end
        batches = loader.batches()
        if when == "in the middle":
            assert len(next(batches)) == 8
        (sharded / "train-000001.tar").unlink()
        with pytest.raises(DataError, match=r"shard .*train-000001\.tar cannot be opened any more.*put it back"):
            list(itertools.islice(batches, 12))
        assert loader.broken == {"d0": 0}
    with pytest.raises(DataError, match=r"train-000001\.tar is missing: copy it again"):  # the next start says so
        take(config(sharded), 1)


def test_run_that_goes_on_knows_what_was_broken(photos, tmp_path, monkeypatch):
    """On other ranks as well: the same batches, and DALI does not have to fail again."""
    with TrainLoader(config(photos), 32, 8, 0, 1, 0, CPU, folder=tmp_path / "run") as loader:
        for path in sorted(photos.iterdir())[:2]:
            damage(path, "wrong tables")
        expected = list(itertools.islice(loader.batches(), 4))
        assert loader.broken == {"d0": 2}
    monkeypatch.setattr(Decoder, "refused", lambda *_: pytest.fail("a known image was decoded"))
    for rank in range(2):
        with TrainLoader(config(photos), 32, 8, rank, 2, 0, CPU, folder=tmp_path / "run") as again:
            assert again.broken == {"d0": 2}
            for batch, whole in zip(itertools.islice(again.batches(), 4), expected, strict=True):
                assert batch.paths == whole.paths[4 * rank : 4 * rank + 4]


def test_too_many_broken_images_stop_the_run_with_a_sentence(photos):
    for path in sorted(photos.iterdir())[:6]:
        damage(path, "empty")
    with pytest.raises(
        DataError,
        match=r"dataset 'd0': [56] of 24 images are broken, 4 are tolerated.*the file is empty.*max_broken_share",
    ):
        take(config(photos), 6)
    batches = take(config(photos, max_broken_share=0.25), 6)
    assert all(len(batch) == 8 for batch in batches)


def test_failure_without_a_culprit_is_raised_not_swallowed(photos, monkeypatch):
    damage(sorted(photos.iterdir())[0], "wrong tables")
    monkeypatch.setattr(Decoder, "_try", lambda self, encoded, geometry: "")
    with pytest.raises(DataError, match="every image in flight can be decoded on its own"):
        take(config(photos), 6)


def test_jpeg_that_dali_alone_refuses_is_decoded_by_pillow(photos, photo, monkeypatch):
    """Bytes between two segments, for which the header is looked at; here that look lets them pass."""
    victim = sorted(photos.iterdir())[5]
    clean = photo(0, 64, 64)
    clean.save(victim, quality=95, subsampling=0)
    data = victim.read_bytes()
    first = 4 + int.from_bytes(data[4:6])
    victim.write_bytes(data[:first] + b"abc" + data[first:])
    monkeypatch.setattr(images, "plain_jpeg", lambda data: (64, 64) if b"abc\xff" in data else plain_jpeg(data))
    with TrainLoader(config(photos), 32, 8, 0, 1, 0, CPU) as loader:
        batches = list(itertools.islice(loader.batches(), 6))
        assert loader.broken == {"d0": 0}
    seen = [path for batch in batches for path in batch.paths]
    assert seen.count(str(victim)) == 2 and sorted(seen[:24]) == sorted(map(str, photos.iterdir()))
