"""What the tests of sharding share: a configuration, and what is in a folder of shards."""

import hashlib
import json
from pathlib import Path

import fsspec
import pytest

from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig
from dune_fast.dali_pipelines.shard_writer import ShardSettings
from dune_fast.dali_pipelines.storage import Reader

webdataset = pytest.importorskip("webdataset")

SETTINGS = ShardSettings(megabytes=0.03, seed=3)


def configured(root: Path, **options) -> DataConfig:
    return DataConfig(datasets={"d": DatasetConfig(root=str(root), **options)}, read_patience=1)


def digests(folder: Path) -> dict[str, str]:
    """Of all files that are not empty."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def contents(folder: Path) -> dict[str, tuple[bytes, dict]]:
    """path below the source -> (JPEG, JSON), as the webdataset package reads all shards."""
    tars = sorted(map(str, folder.glob("*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert all(set(sample) >= {"__key__", "jpg", "json"} for sample in samples)
    found = {(about := json.loads(sample["json"]))["path"]: (sample["jpg"], about) for sample in samples}
    assert len(found) == len(samples)
    return found


def read(images, index: int) -> bytes:
    return Reader(0).read(images.locate(index)).tobytes()


def upload(folder: Path, address: str) -> None:
    fs = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{address}/{path.relative_to(folder)}", path.read_bytes())
