"""Reading files and pieces of files, and what a failed read means."""

import errno
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest

from dune_fast.dali_pipelines import patience
from dune_fast.dali_pipelines.errors import BrokenImage, StorageError
from dune_fast.dali_pipelines.patience import patiently
from dune_fast.dali_pipelines.storage import Location, Reader, write_whole

DATA = bytes(np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8))


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def quick(monkeypatch):
    """No pauses between tries."""
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.0)


@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_whole_files_and_pieces(shard, scheme):
    path = f"{scheme}{shard}"
    if scheme == "memory://":
        fsspec.filesystem("memory").pipe_file(path, DATA)
    reader = Reader(0)
    assert reader.read(Location(path)).tobytes() == DATA
    piece = reader.read(Location(path, 100, 50, zlib.crc32(DATA[100:150])))
    assert piece.tobytes() == DATA[100:150] and piece.dtype == np.uint8
    with pytest.raises(BrokenImage, match="ends after 10 of the image's 50 bytes"):
        reader.read(Location(path, len(DATA) - 10, 50))
    with pytest.raises(BrokenImage, match="checksum differs"):
        reader.read(Location(path, 100, 50, 1))
    with pytest.raises(BrokenImage) as caught:
        reader.read(Location(f"{path}.gone"))
    assert caught.value.lasting is False, "its disk may only not be mounted"
    with pytest.raises(StorageError, match="put it back"):
        reader.read(Location(f"{path}.gone", 0, 5))


def test_answers_in_parts_are_joined(shard, monkeypatch):
    """Network folders may return fewer bytes than were asked for."""
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, offset: pread(fd, min(n, 7), offset))
    assert Reader(0).read(Location(str(shard), 3, 100)).tobytes() == DATA[3:103]


def test_stale_handle_is_opened_again(shard, monkeypatch, quick):
    reader, pread, seen = Reader(10), os.pread, []
    reader.read(Location(str(shard), 0, 10))

    def stale_once(fd, n, offset):
        seen.append(fd)
        if len(seen) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(fd, n, offset)

    opened, real_open = [], os.open
    monkeypatch.setattr(os, "pread", stale_once)
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or real_open(path, *rest))
    assert reader.read(Location(str(shard), 0, 10)).tobytes() == DATA[:10]
    assert opened == [str(shard)]


def fail(number):
    def read():
        raise OSError(number, os.strerror(number))

    return read


def test_storage_that_does_not_answer_stops_the_run_and_blames_no_image(shard, monkeypatch):
    monkeypatch.setattr(os, "pread", lambda *_: fail(errno.ETIMEDOUT)())
    with pytest.raises(StorageError, match=r"a\.tar at 5.*timed out.*No image was given up.*read_patience"):
        Reader(0.3).read(Location(str(shard), 5, 10))


def test_input_output_error_outlived_breaks_the_image_for_this_process_alone(shard, monkeypatch):
    monkeypatch.setattr(os, "pread", lambda *_: fail(errno.EIO)())
    with pytest.raises(BrokenImage) as caught:
        Reader(0.3).read(Location(str(shard), 5, 10))
    assert caught.value.lasting is False


def test_expired_credentials_and_exhausted_machines_blame_no_image(shard, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError("the token has expired")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", refuse)
    with pytest.raises(StorageError, match="credentials have expired.*token has expired"):
        Reader(0).read(Location("memory://bucket/a.jpg"))
    monkeypatch.setattr("builtins.open", lambda *_, **__: fail(errno.EMFILE)())
    with pytest.raises(StorageError, match="Too many open files"):
        Reader(0).read(Location(str(shard)))


@pytest.mark.parametrize("error", [FileNotFoundError("x"), OSError(errno.EACCES, "no"), ValueError("x")])
def test_errors_that_waiting_does_not_mend_are_passed_on_at_once(error):
    tries = []

    def read():
        tries.append(1)
        raise error

    with pytest.raises(type(error)):
        patiently(read, "x", 100)
    assert len(tries) == 1


def test_errors_of_clients_are_tried_again(quick):
    tries = []

    def read():
        tries.append(1)
        if len(tries) < 4:
            raise RuntimeError("503 Slow Down")
        return "good"

    assert patiently(read, "x", 100) == "good" and len(tries) == 4


def test_open_files_are_bounded_and_a_forgotten_one_can_still_be_read(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.tar").write_bytes(bytes([i]) * 1000)
    before = len(os.listdir("/proc/self/fd"))
    reader = Reader(0, open_files=3)
    with ThreadPoolExecutor(8) as pool:
        numbers = np.random.default_rng(0).integers(0, 40, 2000).tolist()
        found = pool.map(lambda i: set(reader.read(Location(str(tmp_path / f"{i}.tar"), 10, 200)).tolist()), numbers)
        assert list(found) == [{i} for i in numbers]
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_file_is_replaced_as_a_whole_and_is_on_the_disk(tmp_path, monkeypatch):
    """The content before the name, and the name before the function returns."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    path = tmp_path / "a.bin"
    for parts, content in (((b"old",), b"old"), ((b"new", np.arange(3, dtype="<u2")), b"new\0\0\1\0\2\0")):
        write_whole(path, *parts)
        assert path.read_bytes() == content and os.listdir(tmp_path) == ["a.bin"]
        partial, *rest = done
        assert partial.startswith(str(tmp_path / ".a.bin.")) and rest == ["replace", str(tmp_path)]
        done.clear()
    monkeypatch.setattr(os, "fsync", lambda fd: fail(errno.ENOSPC)())
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"newer")
    assert path.read_bytes().startswith(b"new\0") and os.listdir(tmp_path) == ["a.bin"]
