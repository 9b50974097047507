"""Addresses of object stores and other file systems that fsspec knows, such as "s3://bucket/folder".

Every question to one is asked by `ask`: with a deadline, again while the storage fails, with new credentials once the
old ones have expired, and with a sentence for a user where it cannot be answered.
"""

from __future__ import annotations

import errno
import io
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

from dune_fast.dali_pipelines.errors import DataError, StorageError
from dune_fast.dali_pipelines.patience import answered, has_expired, is_refusal, reason_of

PATIENCE = 30.0
"""Seconds for which what is read once, at the start, is tried again."""
LISTING = 3600.0
"""Seconds that a listing may take: S3 names 1,000 files an answer."""
_PIECE = 8 << 20  # bytes of a large file that are read at a time, each with a patience of its own
# One try of the client library; all of its tries end before our patience does, so that the log hears of them.
_S3 = {
    "connect_timeout": 5,
    "read_timeout": 10,  # between two packets
    "retries": {"total_max_attempts": 3},
    "max_pool_connections": 64,  # botocore's ten would be the most that is read at once
}


def is_url(path: str) -> bool:
    """Whether it is an address for fsspec ("s3://bucket/folder", "file:///folder") instead of a local path."""
    return "://" in path


class _Clients:
    """fsspec's file system of each scheme and host, made once, and again when its credentials have expired."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()

    def get(self, scheme: str) -> Any:
        with self._lock:
            if scheme not in self._made:
                self._made[scheme] = _new_file_system(scheme)
            return self._made[scheme]

    def drop(self, scheme: str, expired: Any) -> None:
        """The next `get` makes a new one, unless another thread has made it already."""
        with self._lock:
            if self._made.get(scheme) is expired:
                del self._made[scheme]


_CLIENTS = _Clients()


def _new_file_system(scheme: str) -> Any:
    """A file system with clients of its own; credentials come from the file system's own environment."""
    import fsspec

    options: dict[str, Any] = {}
    protocol = scheme.partition("://")[0].rpartition("::")[2]
    if protocol in ("s3", "s3a"):
        own = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        options[protocol] = {"config_kwargs": {**_S3, **own}}
    try:
        fs = fsspec.core.url_to_fs(scheme, skip_instance_cache=True, **options)[0]
    except (ValueError, ImportError) as error:  # an unknown scheme, or one whose package is missing
        raise DataError(
            f"{scheme} cannot be read: {reason_of(error)}; correct the address, or install the package that fsspec "
            "reads such addresses with (s3fs, gcsfs, adlfs, ...)"
        ) from error
    if protocol in ("s3", "s3a") and hasattr(fs, "retries"):
        fs.retries = 1  # s3fs repeats what botocore has repeated already
    return fs


def ask_once(url: str, question: Callable[[Any, str], Any]) -> Any:
    """`question(file system, the path that it calls the address by)`, once and without a deadline.

    Raises:
        TimeoutError: the credentials have expired; the next call uses new ones.
        StorageError: the storage refuses the credentials, or there are none.
        DataError: an unknown scheme, or one whose package (s3fs, gcsfs, ...) is not installed.
    """
    protocol, _, rest = url.partition("://")
    scheme = f"{protocol}://{rest.partition('/')[0]}"
    fs = _CLIENTS.get(scheme)
    try:
        return question(fs, fs._strip_protocol(url))
    except Exception as error:
        if has_expired(error):
            _CLIENTS.drop(scheme, fs)
            raise TimeoutError(errno.ETIMEDOUT, f"the credentials have expired ({reason_of(error)})") from error
        if is_refusal(error):
            raise StorageError(
                f"{url} may not be read ({reason_of(error)}): give credentials that may read it, where the storage's "
                "own tools look for them, then start the same command again"
            ) from error
        if getattr(error, "errno", None) == errno.EIO:  # a server's answer that s3fs does not know, and no bad sector
            raise OSError(errno.EREMOTEIO, reason_of(error)) from error
        raise


def ask(url: str, question: Callable[[Any, str], Any], longest: float | None = None) -> Any:
    """`ask_once` with a deadline, again while the storage fails.

    `longest`: seconds for a question that takes many answers, see `patience.patiently`.

    Raises:
        StorageError: no answer, or none that these credentials may have.
        DataError: an unknown scheme, or one whose package is not installed.
        FileNotFoundError: nothing is there.
    """
    try:
        return answered(lambda: ask_once(url, question), url, PATIENCE, longest)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"{url} cannot be read: {reason_of(error)}") from error


def list_address(url: str, question: Callable[[Any, str], Any]) -> Any:
    """`ask` for a listing, which may take many answers; DataError where nothing is there, such as no bucket."""
    try:
        return ask(url, question, LISTING)
    except FileNotFoundError as error:
        raise DataError(f"{url} is not there ({reason_of(error)}): correct the address") from error


def open_address(url: str) -> BinaryIO:
    """A file opened for reading from any place; every read of it is an `ask`."""
    return io.BufferedReader(_Remote(url), _PIECE)


class _Remote(io.RawIOBase):
    """A file at an address."""

    def __init__(self, url: str) -> None:
        self._url, self._at = url, 0
        self._size = int(ask(url, lambda fs, path: fs.info(path))["size"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        start, end = self._at, min(self._at + min(len(buffer), _PIECE), self._size)
        if end <= start:
            return 0
        data = ask(self._url, lambda fs, path: fs.cat_file(path, start=start, end=end))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def readall(self) -> bytes:  # the base class's would ask for 8 KiB at a time
        return b"".join(iter(lambda: self.read(_PIECE), b""))
