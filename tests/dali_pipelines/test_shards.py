"""The index, shards of ours at an address, and the sentences for what is wrong with a folder of them."""

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
from sharding_helpers import read, upload

from dune_fast.dali_pipelines import shards
from dune_fast.dali_pipelines.datasets import DatasetConfig, index_dataset
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.shards import open_manifest_folder
from dune_fast.dali_pipelines.tar_index import RECORD, open_index, write_index

pytestmark = pytest.mark.usefixtures("own_cache")


def some_records(count: int = 7) -> np.ndarray:
    records = np.zeros(count, RECORD)
    records["offset"] = np.arange(count) * 2**33  # beyond 32 bits
    records["length"], records["shard"], records["width"] = 2**32 - 1, np.arange(count) % 3, 65535
    return records


def test_index_round_trip(tmp_path):
    write_index(tmp_path / "i", some_records(), 3)
    assert (open_index(tmp_path / "i", 3) == some_records()).all()
    assert (tmp_path / "i").stat().st_size == 64 + 24 * 7 and len(list(tmp_path.iterdir())) == 1
    write_index(tmp_path / "none", some_records(0), 1)
    assert len(open_index(tmp_path / "none", 1)) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: b"GIF89a" + data, "no index of shards"),
        (lambda data: b"", "no index of shards"),
        (lambda data: data[:8] + b"\x63" + data[9:], "version 99, this program reads version 1"),
        (lambda data: data[:-1], "231 bytes, its 7 images need 232"),
        (lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:], "damaged: its checksum differs"),
        (lambda data: data[:12] + b"\x05" + data[13:], "of 5 shards, not of 3"),
    ],
)
def test_damaged_index_is_refused(tmp_path, change, message):
    path = tmp_path / "i"
    write_index(path, some_records(), 3)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"{message}.*make it again with `dune-fast data shard`"):
        open_index(path, 3)


def test_loose_images_at_an_address_and_in_a_list(photos, tmp_path):
    address = f"memory://loose/{tmp_path.name}"
    upload(photos, address)
    expected = [path.read_bytes() for path in sorted(photos.iterdir())]
    images = index_dataset("d", DatasetConfig(root=address)).train
    assert [read(images, i) for i in range(24)] == expected and images[3] == f"{address}/photo_003.jpg"
    some = index_dataset("d", DatasetConfig(root=address, pattern="*_00[12].jpg")).train
    assert [path.rpartition("/")[2] for path in some] == ["photo_001.jpg", "photo_002.jpg"]
    with pytest.raises(DataError, match="shrink=64 cannot be used.*--shorter-side"):
        index_dataset("d", DatasetConfig(root=address, shrink=64))
    (tmp_path / "list.txt").write_text(f"{address}/photo_005.jpg\n")
    listed = index_dataset("d", DatasetConfig(root=str(tmp_path / "list.txt"))).train
    assert list(listed) == [f"{address}/photo_005.jpg"] and read(listed, 0) == expected[5]


def test_our_shards_at_an_address(sharded, tmp_path):
    address = f"memory://ours/{tmp_path.name}"
    upload(sharded, address)
    here, there = open_manifest_folder(str(sharded)), open_manifest_folder(f"{address}/")
    for split, images in here.items():
        assert [read(there[split], i) for i in range(len(images))] == [read(images, i) for i in range(len(images))]
    assert shards.verify_shards(address) == []
    for copy in (tmp_path / "cache" / "shard-index").glob("*.index"):
        content = copy.read_bytes()
        copy.unlink()  # it is mapped into memory
        copy.write_bytes(content[:-5])
    again = open_manifest_folder(address)  # which fetches it once more
    assert {split: list(images) for split, images in again.items()} == {split: list(i) for split, i in there.items()}
    fsspec.filesystem("memory").pipe_file(f"{address}/train.index", b"other bytes")
    fsspec.filesystem("memory").pipe_file(f"{address}/val-000000.tar", b"short")
    with pytest.raises(DataError, match=r"val-000000\.tar has 5 bytes instead of"):
        open_manifest_folder(address)


def edit(folder: Path, **changes) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**values, **changes}))


def rename_first_shard(folder: Path, name: str) -> None:
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    splits[0]["shards"][0]["name"] = name
    edit(folder, splits=splits)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "train-000001.tar").unlink(), r"shard .*train-000001\.tar is missing: copy it again"),
        (lambda f: (f / "train-000000.tar").write_bytes(b"x"), r"train-000000\.tar has 1 bytes instead of \d+"),
        (lambda f: (f / "train.index").unlink(), r"index .*train\.index cannot be read \(No such file"),
        (lambda f: (f / "train.index").write_bytes((f / "val.index").read_bytes()), "is of 1 shards, not of"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json is no manifest"),
        (lambda f: edit(f, format=7), "format 7, this program reads format 1"),
        (lambda f: edit(f, extra=1), "no manifest of shards.*extra"),
        (lambda f: edit(f, splits=[]), "has no training images"),
        (lambda f: rename_first_shard(f, "../../outside.tar"), "tampered"),
    ],
)
def test_damaged_folder_of_shards_is_refused(sharded, damage, message):
    damage(sharded)
    with pytest.raises(DataError, match=f"(?s)dataset 'd'.*{message}"):
        index_dataset("d", DatasetConfig(root=str(sharded)))


def test_every_byte_is_checked(sharded):
    assert shards.verify_shards(str(sharded)) == []
    path = sharded / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    read_bytes = []
    (problem,) = shards.verify_shards(str(sharded), read_bytes.append)
    assert "train-000001.tar has SHA-256" in problem and "damaged" in problem
    assert sum(read_bytes) == sum(p.stat().st_size for p in sharded.glob("*") if p.suffix in (".tar", ".index"))


@pytest.mark.parametrize("field, value", [("pattern", "*.jpg"), ("rotate", "*"), ("shrink", 64), ("holdout", 1)])
def test_options_that_do_not_fit_our_shards_are_refused(sharded, field, value):
    with pytest.raises(DataError, match=field):
        index_dataset("d", DatasetConfig(root=str(sharded), **{field: value}))


def test_validation_images_come_with_the_root_or_from_val_root(sharded, photos):
    with_root = index_dataset("d", DatasetConfig(root=str(sharded)))
    assert (len(with_root.train), len(with_root.val)) == (20, 4)
    other = index_dataset("d", DatasetConfig(root=str(sharded), val_root=str(photos)))
    assert len(other.val) == 24
    as_val = index_dataset("d", DatasetConfig(root=str(photos), val_root=str(sharded)))
    assert list(as_val.val) == list(with_root.val)
