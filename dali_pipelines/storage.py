"""Reading whole files and pieces of files: local paths here, addresses through `addresses`, both with `patience`."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dune_fast.dali_pipelines.addresses import ask_once, is_url, open_address
from dune_fast.dali_pipelines.errors import BrokenImage, DataError, StorageError
from dune_fast.dali_pipelines.patience import Pending, Threads, patiently
from dune_fast.teachers.files import cache_dir, locked


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, *parts: bytes | np.ndarray) -> None:
    """Writes a file so that readers see all of it or what was there before, also after a power cut.

    Several machines may write the same file at once; a killed one leaves ".NAME.*.part". Arrays are to be contiguous.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        with open(partial, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


@dataclass(frozen=True)
class Location:
    """Where the bytes of an image are."""

    path: str
    """A file's path, or its address."""
    offset: int = 0
    """First byte."""
    length: int = -1
    """In bytes; -1 for the whole file."""
    crc: int | None = None
    """CRC-32, where it is known."""

    def __str__(self) -> str:
        return self.path if self.length < 0 else f"{self.path} at {self.offset}"


def open_binary(path: str) -> BinaryIO:
    """A file or an address, opened for reading from any place."""
    return open_address(path) if is_url(path) else open(path, "rb")


@contextlib.contextmanager
def cached(name: str, title: str) -> Iterator[Path]:
    """A file of the cache folder, with a lock on it: whoever finds that it does not exist makes it.

    `title` stands in the log line of those who wait. DataError if the cache folder cannot be written.
    """
    path = cache_dir() / name
    try:
        with locked(path.with_suffix(".lock"), title):
            yield path
    except OSError as error:
        raise DataError(
            f"the cache folder {cache_dir()} cannot be written: {error}; set DUNE_FAST_CACHE to another one"
        ) from error


class _OpenFile:
    """A descriptor that is closed with its last user, so that a cache may forget it while a thread still reads."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Reader:
    """Reads images wherever they are. Safe to use from several threads.

    Args:
        patience: seconds for which a failing read is tried again, and after which one that hangs is given up.
        open_files: shards that are kept open at most.
        threads: reads that `start` makes at once; they wait for the storage, so they may be many more than cores.
    """

    def __init__(self, patience: float, open_files: int = 128, threads: int = 16) -> None:
        self._patience, self._stop = patience, threading.Event()
        self._open = functools.lru_cache(open_files)(_OpenFile)
        self._threads = Threads(threads, "read-images")

    def start(self, location: Location) -> Pending:
        """Has a thread read the bytes at a location; its `result()` is that of `read`, and raises the same."""
        return self._threads.submit(lambda: self._read(location), str(location), self._patience, self._stop)

    def read(self, location: Location) -> np.ndarray:
        """The bytes at a location, uint8 [length].

        Raises:
            BrokenImage: there is no such file, it is too short or empty, or its bytes are not those of the checksum.
            StorageError: the storage does not answer or forbids it, or a whole shard has vanished.
        """
        return self.start(location).result() if is_url(location.path) else self._read(location)

    def _read(self, location: Location) -> np.ndarray:
        try:
            data = self.patiently(lambda: self._read_once(location), str(location))
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            if location.length >= 0 and error.errno != errno.EIO:
                raise StorageError(
                    f"the shard {location.path} cannot be opened any more ({reason}): put it back, or make it again "
                    "with `dune-fast data shard`, then start the same command again"
                ) from error
            raise BrokenImage(reason, lasting=False) from error
        if location.length >= 0 and len(data) != location.length:
            raise BrokenImage(f"the shard ends after {len(data)} of the image's {location.length} bytes")
        if not len(data):
            raise BrokenImage("the file is empty")
        if location.crc is not None and zlib.crc32(data) != location.crc:
            raise BrokenImage("its bytes are not those that were written: the checksum differs")
        return np.frombuffer(data, np.uint8)

    def patiently(self, read: Callable[[], Any], what: str) -> Any:
        """`patience.patiently` with the reader's patience, until `stop_waiting`."""
        return patiently(read, what, self._patience, self._stop)

    def stop_waiting(self) -> None:
        """From now on, a read that fails is not tried again, and nobody waits for one that hangs."""
        self._stop.set()

    def close(self) -> None:
        """Ends the threads; one that hangs is left behind."""
        self._threads.close()

    def _read_once(self, location: Location) -> bytes:
        path, offset, length = location.path, location.offset, location.length
        if is_url(path):
            piece = {} if length < 0 else {"start": offset, "end": offset + length}
            return ask_once(path, lambda fs, inner: fs.cat_file(inner, **piece))
        if length < 0:
            with open(path, "rb", buffering=0) as file:
                return file.read()
        file = self._open(path)
        try:
            return _read_fully(file.descriptor, offset, length)
        except OSError:
            self._open.cache_clear()  # a stale handle stays stale
            raise


def _read_fully(descriptor: int, offset: int, length: int) -> bytes:
    """`length` bytes, fewer only where the file ends; network folders may answer in parts."""
    data = os.pread(descriptor, length, offset)
    while 0 < len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
