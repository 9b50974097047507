"""Reading: whole files and pieces of files, on a local disk, a network folder or any address that fsspec knows.

What a failed read means is decided here, once. A file that is empty, is shorter than it should be or has other bytes
than its checksum says makes a broken image. A handle that went stale, a lost connection, a server that does not answer,
a machine without memory say nothing about the image: the read is tried again for a while, and then the run stops with a
sentence (`StorageError`), to go on from its checkpoint. Some failures can be either: a file that is not there (deleted,
or its disk is not mounted), an input/output error (a bad sector, or a network folder that gave up; tried again as
well). They make a broken image, but only for as long as the process lives.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import random
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dune_fast.dali_pipelines.errors import BrokenImage, DataError, StorageError
from dune_fast.teachers.files import cache_dir, locked

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between tries; doubled each time, with some chance in it
_TRANSIENT = {
    getattr(errno, name)
    for name in (
        "ESTALE", "EIO", "EAGAIN", "EINTR", "EBUSY", "ETIMEDOUT", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EPIPE",
        "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ENOTCONN", "EREMOTEIO", "ESHUTDOWN",
        "EMFILE", "ENFILE", "ENOMEM", "EKEYEXPIRED",
    )
    if hasattr(errno, name)
}  # fmt: skip


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, *parts: bytes | np.ndarray) -> None:
    """Writes a file so that readers see all of it or what was there before, also after a power cut.

    Several threads, processes and machines may write the same file at once; an interrupted one leaves ".NAME.*.part".
    Arrays are to be contiguous.
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


def is_url(path: str) -> bool:
    """Whether a path is an address for fsspec ("s3://bucket/folder", "file:///folder") instead of a local path."""
    return "://" in path


@functools.lru_cache(maxsize=64)
def _file_system(scheme: str) -> Any:
    """fsspec's file system for a scheme ("s3", or a chain of them); credentials come from its own environment."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(scheme)[0]
    except (ValueError, ImportError) as error:  # an unknown scheme, or one whose package is missing
        raise DataError(f"{scheme} cannot be read: {error}") from error


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for an address and the path that it calls the address by.

    Raises:
        DataError: an unknown scheme, or one whose package (s3fs, gcsfs, ...) is not installed.
    """
    scheme, _, rest = url.partition("://")
    host = rest.partition("/")[0]
    fs = _file_system(f"{scheme}://{host}")
    return fs, fs._strip_protocol(url)


def open_binary(path: str) -> BinaryIO:
    """A file or an address, opened for reading from any place."""
    if is_url(path):
        fs, path = file_system(path)
        return fs.open(path, "rb")
    return open(path, "rb")


@contextlib.contextmanager
def cached(name: str, title: str) -> Iterator[Path]:
    """A file of the cache folder, with a lock on it: whoever finds that it does not exist makes it.

    `title` says what it is, in the log line of those who wait.

    Raises:
        DataError: the cache folder cannot be written.
    """
    path = cache_dir() / name
    try:
        with locked(path.with_suffix(".lock"), title):
            yield path
    except OSError as error:
        raise DataError(
            f"the cache folder {cache_dir()} cannot be written: {error}; set DUNE_FAST_CACHE to another one"
        ) from error


def patiently(read: Callable[[], Any], what: str, patience: float, stop: threading.Event | None = None) -> Any:
    """The result of `read()`, tried again while the storage fails.

    Args:
        read: what to do.
        what: is read, for messages.
        patience: seconds after which it is given up.
        stop: once it is set, nothing is tried again.

    Raises:
        StorageError: it still failed then, or it failed and is not wanted any more.
        OSError: input/output errors (EIO) that outlived the patience, and all errors that waiting does not mend, such
            as file-not-found.
    """
    give_up, pause = time.monotonic() + patience, _FIRST_PAUSE
    stop = stop or threading.Event()
    while True:
        try:
            return read()
        except Exception as error:
            if not _may_pass(error):
                raise
            if time.monotonic() + pause > give_up:
                if getattr(error, "errno", None) == errno.EIO:
                    raise
                raise StorageError(
                    f"{what} cannot be read: {error or type(error).__name__}, for {patience:g} s; the storage does not "
                    "answer. No image was given up for it: see that it answers, then start the same command again. To "
                    "wait longer, raise data.read_patience"
                ) from error
            logger.warning("%s: %s; trying again", what, error or type(error).__name__)
            # ranks should not all come back at once
            if stop.wait(pause * random.uniform(0.7, 1.3)):
                raise StorageError(f"{what} was not read: it is not wanted any more") from error
        pause = min(2 * pause, _LONGEST_PAUSE)


def _may_pass(error: Exception) -> bool:
    if isinstance(error, (BrokenImage, ValueError, TypeError, NotImplementedError, ImportError, AttributeError)):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT
    # fsspec's file systems raise their clients' own errors; what is left of OSError is mostly such
    return not isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError))


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
        patience: seconds for which a failing read is tried again.
        open_files: shards that are kept open at most.
    """

    def __init__(self, patience: float, open_files: int = 128) -> None:
        self._patience, self._stop = patience, threading.Event()
        self._open = functools.lru_cache(open_files)(_OpenFile)

    def read(self, location: Location) -> np.ndarray:
        """The bytes at a location, uint8 [length].

        Raises:
            BrokenImage: there is no such file, it is too short or empty, or its bytes are not those of the checksum.
            StorageError: the storage does not answer or forbids it, or a whole shard has vanished.
        """
        try:
            data = self.patiently(lambda: self._read_once(location), str(location))
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            if isinstance(error, PermissionError) and is_url(location.path):
                raise StorageError(
                    f"{location} may not be read ({reason}): renew the credentials, then start the same command again"
                ) from error
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
        """See the function of that name; with the reader's patience, until `stop_waiting`."""
        return patiently(read, what, self._patience, self._stop)

    def stop_waiting(self) -> None:
        """From now on, a read that fails is not tried again."""
        self._stop.set()

    def _read_once(self, location: Location) -> bytes:
        path, offset, length = location.path, location.offset, location.length
        if is_url(path):
            fs, path = file_system(path)
            return fs.cat_file(path) if length < 0 else fs.cat_file(path, start=offset, end=offset + length)
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
