"""Sharding that is killed, cannot go on, or is called again: what is finished is kept, the rest is said or made."""

import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from sharding_helpers import SETTINGS, configured, contents, digests

from dune_fast.dali_pipelines import sharding
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.order import Permutation
from dune_fast.dali_pipelines.shard_writer import ShardSettings
from dune_fast.dali_pipelines.sharding import shard_dataset

SCRIPT = """
import sys

if __name__ == "__main__":
    from dune_fast.dali_pipelines import sharding
    from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig

    sharding._SAMPLE = 2
    data = DataConfig(datasets={"d": DatasetConfig(root=sys.argv[1])})
    sharding.shard_dataset("d", data, sharding.Path(sys.argv[2]), sharding.ShardSettings(megabytes=0.02), 2)
"""


def test_killed_in_the_middle_and_started_again_gives_the_same_bytes(tmp_path, write_folder, monkeypatch):
    """SIGKILL while both workers are inside a shard: they follow, and a second call makes the rest."""
    root, script = write_folder(tmp_path / "images", 24), tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(sharding, "_SAMPLE", 2)
    data = configured(root)
    expected = shard_dataset("d", data, tmp_path / "whole", ShardSettings(megabytes=0.02), 1)
    per_shard = -(-24 // len(expected.splits[0].shards))
    assert len(expected.splits[0].shards) >= 4
    order = Permutation(24, ShardSettings().seed)(np.arange(24))
    pipes = {}
    for place in (2 * per_shard + 1, 3 * per_shard + 1):  # reading a pipe that nobody writes to takes for ever
        path = root / f"photo_{order[place]:03d}.jpg"
        pipes[path] = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
    command = [sys.executable, str(script), str(root), str(tmp_path / "d")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "d").glob(".train-*.part"))) < 2 or len(list((tmp_path / "d").glob("*.tar"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    for path in pipes:
        while True:
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:  # nobody reads any more: the worker has ended with its parent
                break
            assert time.monotonic() < deadline
    assert not (tmp_path / "d" / "manifest.json").exists()
    for path, content in pipes.items():
        path.unlink()
        path.write_bytes(content)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").glob("*.tar")}
    assert len(kept) == 2
    shard_dataset("d", data, tmp_path / "d", ShardSettings(megabytes=0.02), 1)
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items()), "finished shards were made again"


def test_only_what_is_missing_is_made_again(sharded, tmp_path, caplog, monkeypatch):
    before, root = digests(sharded), tmp_path / "images"
    root.mkdir()
    for path, (encoded, _) in contents(sharded).items():
        (root / path).write_bytes(encoded)
    data, settings = configured(root, holdout=4), ShardSettings(megabytes=0.03)
    times = {path: path.stat().st_mtime_ns for path in sharded.glob("*.tar")}
    with (sharded / "train-000001.tar").open("r+b") as file:
        file.truncate(1000)
    (sharded / "train.index").unlink()
    with caplog.at_level(logging.INFO):
        shard_dataset("d", data, sharded, settings, 1)
    assert digests(sharded) == before and f"{len(times) - 1} of {len(times)} shards are there" in caplog.text
    changed = {path.name for path, was in times.items() if path.stat().st_mtime_ns != was}
    assert changed == {"train-000001.tar"}
    # with nothing missing, no process is started
    monkeypatch.setattr(sharding, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("something was made again"))
    shard_dataset("d", data, sharded, settings, 1)
    for other in (ShardSettings(megabytes=0.03, seed=1), ShardSettings(megabytes=0.03, shorter_side=32)):
        with pytest.raises(DataError, match=r"made otherwise \(settings differs.*choose another folder"):
            shard_dataset("d", data, sharded, other, 1)
    next(root.iterdir()).unlink()
    with pytest.raises(DataError, match=r"made otherwise \(source differs"):
        shard_dataset("d", data, sharded, settings, 1)
    assert digests(sharded) == before


def test_source_that_is_no_longer_mounted_gives_no_empty_shards(photos, tmp_path, monkeypatch):
    """The list still names the files; the first are read while all is well."""
    (tmp_path / "list.txt").write_text("\n".join(map(str, sorted(photos.iterdir()))))
    monkeypatch.setattr(sharding, "_SAMPLE", 4)
    data = configured(tmp_path / "list.txt")
    plan = sharding._Sharding.plan
    unmount = lambda it: (plan(it), photos.rename(tmp_path / "unmounted"))[0]  # noqa: E731
    monkeypatch.setattr(sharding._Sharding, "plan", unmount)
    with pytest.raises(DataError, match=r"13 files of dataset 'd' are not there.*still mounted"):
        shard_dataset("d", data, tmp_path / "d", ShardSettings(), 1)
    assert not list((tmp_path / "d").glob("*.tar"))
    monkeypatch.setattr(sharding._Sharding, "plan", plan)
    (tmp_path / "unmounted").rename(photos)
    (photos / "photo_003.jpg").unlink()
    manifest = shard_dataset("d", data, tmp_path / "d", ShardSettings(), 1)
    assert (manifest.splits[0].images, manifest.splits[0].broken) == (23, 1)
    monkeypatch.setattr(sharding, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("something was made again"))
    assert shard_dataset("d", data, tmp_path / "d", ShardSettings(), 1) == manifest


def test_nothing_usable_no_room_and_wrong_settings_are_said(tmp_path, photos, monkeypatch):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.jpg").write_text("no image")
    with pytest.raises(DataError, match="none of the first 1 images of train can be decoded.*no known image format"):
        shard_dataset("d", configured(bad), tmp_path / "d", SETTINGS, 1)
    with pytest.raises(DataError, match=r"0 workers"):
        shard_dataset("d", configured(photos), tmp_path / "d", SETTINGS, 0)
    with pytest.raises(DataError, match="shards of 0 MB"):
        ShardSettings(megabytes=0)
    with pytest.raises(DataError, match="'enlarge' and 'keep'"):
        ShardSettings(turned_canvas="x")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(sharding.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"0\.00 GB free, the \d+ shards still missing need about"):
        shard_dataset("d", configured(photos), tmp_path / "e", SETTINGS, 1)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written: Not a directory; make room or choose another folder"):
        shard_dataset("d", configured(photos), tmp_path / "file" / "d", SETTINGS, 1)


@pytest.mark.parametrize("name", ["records/plan.json", ".train-000000.tar.part", "train.index", "manifest.json"])
def test_folder_that_cannot_be_written_is_said_whatever_file_it_is(tmp_path, photos, name):
    """Something is in the way; a full disk, or one that is read-only, ends the same way."""
    folder = tmp_path / "d"
    (folder / name / "in the way").mkdir(parents=True)
    with pytest.raises(DataError, match=f"{folder} cannot be written: .*; make room.*finished shards are kept"):
        shard_dataset("d", configured(photos), folder, ShardSettings(), 1)
