"""Shrunk copies of large images."""

import io
import os

import numpy as np
import pytest
from image_helpers import encode
from PIL import Image

from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig, index_dataset
from dune_fast.dali_pipelines.errors import BrokenImage
from dune_fast.dali_pipelines.shard_writer import ShardSettings, prepare
from dune_fast.dali_pipelines.source import ImageSource, shrunk_bytes
from dune_fast.dali_pipelines.storage import Reader


def shrunk(path, cache) -> bytes:
    return shrunk_bytes(str(path), 100, cache, Reader(0))[0].tobytes()


def test_large_image_is_shrunk_once_and_looks_the_same(tmp_path, photo):
    path, cache = tmp_path / "big.jpg", tmp_path / "cache"
    photo(0, 300, 200).save(path, quality=95)
    data = shrunk(path, cache)
    small = Image.open(io.BytesIO(data))
    assert small.size == (150, 100) and len(list(cache.iterdir())) == 1
    expected = Image.open(path).resize((150, 100), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(expected)).mean() < 3  # the noise in it is hard on JPEG
    stored = next(cache.iterdir())
    before = stored.stat().st_mtime_ns
    assert shrunk(path, cache) == data and stored.stat().st_mtime_ns == before


def test_small_image_comes_as_it_is(tmp_path, photo):
    path = tmp_path / "small.png"
    photo(0, 60, 50).save(path)
    assert shrunk(path, tmp_path / "cache") == path.read_bytes()
    assert not (tmp_path / "cache").exists()


def test_changed_image_is_shrunk_again(tmp_path, photo):
    path = tmp_path / "big.jpg"
    photo(0, 300, 200).save(path)
    first = shrunk(path, tmp_path / "cache")
    photo(1, 300, 200).save(path)
    os.utime(path, ns=(1, 1))
    assert shrunk(path, tmp_path / "cache") != first


def test_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, photo, caplog):
    path = tmp_path / "big.jpg"
    photo(0, 300, 200).save(path)
    (tmp_path / "file").touch()
    assert shrunk(path, tmp_path / "file" / "cache")  # a folder cannot be made there
    assert "shrunk again" in caplog.text


def cut_off(image: Image.Image, end_marker: bytes = b"") -> bytes:
    data = encode(image, "JPEG")
    return data[:2] + end_marker + data[2 : len(data) // 2]


def avif_without_places(image: Image.Image) -> bytes:
    """PIL raises RuntimeErrors for those; such files are often called .jpg."""
    return encode(image, "AVIF").replace(b"iloc", b"free")


@pytest.mark.parametrize(
    "make, reason",
    [
        (cut_off, "ends too early"),
        (lambda image: cut_off(image, b"\xff\xfe\x00\x06..\xff\xd9"), "ends too early"),  # a thumbnail's end marker
        (avif_without_places, "Failed to decode"),
        (lambda image: b"<html>404 Not Found</html>", "no known image format"),
    ],
)
def test_broken_image_is_not_taken_for_storage_that_fails(tmp_path, photo, monkeypatch, make, reason):
    """Which would be tried again for the whole patience, and then stop the run."""
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "images" / "big.jpg"
    path.parent.mkdir()
    path.write_bytes(make(photo(0, 300, 200)))
    dataset = index_dataset("d", DatasetConfig(root=str(path.parent), shrink=100))
    source = ImageSource([dataset], "train", DataConfig(read_patience=0))
    (error,) = source.read_all([(0, 0)])
    assert isinstance(error, BrokenImage) and reason in str(error) and error.lasting
    with pytest.raises(BrokenImage, match=reason):
        prepare(np.fromfile(path, np.uint8), ShardSettings(), False)
