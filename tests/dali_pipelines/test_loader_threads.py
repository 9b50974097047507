"""The loader's threads: reading ahead, waiting for the storage, and how they end."""

import errno
import itertools
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")

from loader_helpers import CPU, config, damage, take  # noqa: E402

from dune_fast.dali_pipelines.loader import TrainLoader  # noqa: E402
from dune_fast.dali_pipelines.storage import Reader  # noqa: E402


def test_storage_that_fails_for_a_while_costs_nothing(sharded, monkeypatch):
    expected, pread, failures = take(config(sharded), 3), os.pread, iter(range(5))

    def stale(*arguments):
        if next(failures, None) is not None:
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", stale)
    with TrainLoader(config(sharded), 32, 8, 0, 1, 0, CPU) as loader:
        found = list(itertools.islice(loader.batches(), 3))
        assert loader.broken == {"d0": 0}
    assert next(failures, None) is None
    assert [batch.paths for batch in found] == [batch.paths for batch in expected]


def test_close_does_not_wait_for_storage_that_fails(sharded, monkeypatch):
    """Every read that was ordered ahead would be tried again for as long as the patience lasts."""
    with TrainLoader(config(sharded, read_patience=60), 32, 8, 0, 1, 0, CPU) as loader:
        batches, failed = loader.batches(), threading.Event()
        next(batches)

        def stale(*_):
            failed.set()
            raise OSError(errno.ESTALE, "Stale file handle")

        monkeypatch.setattr(os, "pread", stale)
        while not failed.wait(2):  # no read for so long: every place is taken, and the next batch is ready
            next(batches)
        began = time.monotonic()
        loader.close()
        assert time.monotonic() - began < 10 and loader.broken == {"d0": 0}


def test_read_ahead_changes_nothing(photos):
    damage(sorted(photos.iterdir())[3], "half a PNG")
    expected = take(config(photos, read_ahead=1), 5)
    for batch, other in zip(take(config(photos, read_ahead=6), 5), expected, strict=True):
        assert batch.paths == other.paths and torch.equal(batch.images, other.images)


def test_read_ahead_is_bounded_and_overlaps_the_step(photos, monkeypatch):
    """While the caller is busy, files are read until every place is taken; then its batches are there at once."""
    read, seen = Reader(0)._read, []
    with TrainLoader(config(photos, read_ahead=5, prefetch=3), 32, 2, 0, 1, 0, CPU) as loader:
        monkeypatch.setattr(loader._source._reader, "_read", lambda location: seen.append(1) or read(location))
        batches = loader.batches()
        next(batches)
        # one was taken, three are ready, one waits for a place, two are in DALI, five are read
        expected, deadline = 2 * (1 + 3 + 1 + 2 + 5), time.monotonic() + 30
        while len(seen) < expected and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        assert len(seen) == expected
        before = loader.waited_s
        assert before > 0
        for _ in range(3):
            next(batches)
        assert loader.waited_s - before < 0.1


def test_threads_end_with_the_iterator_and_with_close(photos):
    before = threading.active_count()
    loader = TrainLoader(config(photos), 32, 4, 0, 1, 0, CPU)
    batches = loader.batches()
    next(batches)
    assert loader.waited_s > 0
    batches.close()
    assert not any(thread.name.startswith("decode-images") for thread in threading.enumerate())
    unfinished = loader.batches()
    next(unfinished)
    loader.close()
    loader.close()
    assert threading.active_count() == before


def test_process_that_forgets_to_close_ends_without_an_abort(photos):
    """A thread inside DALI at exit: "terminate called without an active exception", and a core dump."""
    code = (
        "import sys, torch\n"
        "from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig\n"
        "from dune_fast.dali_pipelines.loader import TrainLoader\n"
        "config = DataConfig(datasets={'d': DatasetConfig(root=sys.argv[1])})\n"
        "batches = TrainLoader(config, 32, 8, 0, 1, 0, torch.device('cpu')).batches()\n"
        "next(batches)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(photos)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
