"""Shrunk copies of large images."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from dali_pipelines.shrink import shrunk_bytes


def test_large_image_is_shrunk_once_and_looks_the_same(tmp_path, photo):
    path, cache = tmp_path / "big.jpg", tmp_path / "cache"
    photo(0, 300, 200).save(path, quality=95)
    data = shrunk_bytes(str(path), 100, cache)
    small = Image.open(io.BytesIO(data))
    assert small.size == (150, 100) and len(list(cache.iterdir())) == 1
    expected = Image.open(path).resize((150, 100), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(expected)).mean() < 3  # the noise in it is hard on JPEG
    stored = next(cache.iterdir())
    before = stored.stat().st_mtime_ns
    assert shrunk_bytes(str(path), 100, cache) == data and stored.stat().st_mtime_ns == before


def test_small_image_comes_as_it_is(tmp_path, photo):
    path = tmp_path / "small.png"
    photo(0, 60, 50).save(path)
    assert shrunk_bytes(str(path), 100, tmp_path / "cache") == path.read_bytes()
    assert not (tmp_path / "cache").exists()


def test_changed_image_is_shrunk_again(tmp_path, photo):
    path = tmp_path / "big.jpg"
    photo(0, 300, 200).save(path)
    first = shrunk_bytes(str(path), 100, tmp_path / "cache")
    photo(1, 300, 200).save(path)
    os.utime(path, ns=(1, 1))
    assert shrunk_bytes(str(path), 100, tmp_path / "cache") != first


def test_broken_image_and_unwritable_cache(tmp_path, photo, caplog):
    path = tmp_path / "big.jpg"
    photo(0, 300, 200).save(path)
    (tmp_path / "file").touch()
    assert shrunk_bytes(str(path), 100, tmp_path / "file" / "cache")  # a folder cannot be made there
    assert "shrunk again" in caplog.text
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(OSError):
        shrunk_bytes(str(path), 100, tmp_path / "cache")
