"""Files that all floors use: the cache folder, locks, checksums, members of archives, downloads that resume."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import logging
import os
import shutil
import ssl
import stat
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from dune_fast.teachers.local_paths import local_path

logger = logging.getLogger(__name__)

_CHUNK = 1 << 18
_ATTEMPTS = 4  # in a row without a single new byte
_PAUSE_SECONDS = 0.5  # before trying again, doubled with every failure
_STALL_SECONDS = 30.0
_NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
UNPACKED = ".sha256"
"""A file in an unpacked folder: the hash of the archive that it came from."""


class DownloadError(ValueError):
    """A file could not be located or downloaded; the caller says what to do about it."""


def cache_dir() -> Path:
    """The folder of everything that is fetched: `$DUNE_FAST_CACHE`, else `$XDG_CACHE_HOME/dune_fast`, else
    `~/.cache/dune_fast`. It need not exist yet. ValueError if the user has no home folder for it."""
    try:
        if chosen := os.environ.get("DUNE_FAST_CACHE"):
            return local_path(chosen, "the variable DUNE_FAST_CACHE")
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dune_fast"
    except RuntimeError:
        raise ValueError(
            f"the user {os.getuid()} has no home folder for the cache: set DUNE_FAST_CACHE to a folder that it can "
            "write to, or HOME"
        ) from None


@contextmanager
def locked(path: Path, name: str) -> Iterator[None]:
    """Hold an exclusive lock on `path`; it is dropped by the system even if this process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is fetching %s; waiting for it", name)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def member_fault(members: Sequence[zipfile.ZipInfo]) -> str:
    """What is wrong with a zip archive's members before anything is unpacked, "a member ..."; empty if nothing is."""
    seen: set[str] = set()
    for member in members:
        name = PurePosixPath(member.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or ":" in member.filename[:3]:
            return f"a member outside its own folder, {member.filename!r}"
        if stat.S_ISLNK(member.external_attr >> 16):
            return f"a link as a member, {member.filename!r}"
        if member.flag_bits & 0x1 or member.filename in seen:
            return f"an encrypted or doubled member, {member.filename!r}"
        seen.add(member.filename)
    return ""


def is_unpacked(folder: Path, sha256: str) -> bool:
    """Whether `unpack` has made this folder of the archive with this SHA-256."""
    try:
        return (folder / UNPACKED).read_text() == sha256
    except OSError:
        return False


def unpack(folder: Path, sha256: str, members: Iterable[tuple[str, IO[bytes]]]) -> None:
    """Writes members (path below the folder, content) beside `folder` and renames: one that exists is always whole."""
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, source in members:
            target = fresh.joinpath(*PurePosixPath(name).parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, open(target, "xb") as sink:
                shutil.copyfileobj(source, sink, _CHUNK)
        (fresh / UNPACKED).write_text(sha256)
        fresh.chmod(0o755)  # mkdtemp makes it private to this user
        if folder.exists():  # an older version, or a folder somebody emptied
            shutil.rmtree(folder)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def download(url: str, target: Path, part: Path, size: int | None, sha256: str, title: str) -> None:
    """Downloads `url` to `target`, through `part`, which a later call resumes from.

    `target` appears only when its `size` (bytes) and `sha256` are right. Where the size is None, the server is asked
    for it; where the hash is empty, the size alone decides. DownloadError if there is no connection, or the file is not
    the one asked for; the partial file is then deleted.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https", "file"):
        raise DownloadError(f"the address has an unknown scheme: {url}")
    size = _remote_size(url) if size is None else size
    while True:
        resumed = part.exists()
        _complete(url, part, size, title)
        if not sha256 or (found := file_sha256(part)) == sha256:
            part.replace(target)
            return
        part.unlink()
        if not resumed:
            raise DownloadError(f"the file at {url} has SHA-256 {found}, expected {sha256}, so it was deleted")
        # the start may be a leftover of another version: once from nothing before giving up
        logger.warning("%s: the resumed download has the wrong hash; starting over", title)


def _request(url: str, **headers: str) -> Any:
    """The server's open answer."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "dune_fast", **headers}
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_STALL_SECONDS)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    return str(getattr(error, "reason", error)) or error.__class__.__name__


def _remote_size(url: str) -> int:
    """Bytes of the file at `url`, as its server says."""
    try:
        with _request(url) as response:
            length = response.headers.get("Content-Length") or ""
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{_reason(error)} for {url}") from error
    except (*_NETWORK_ERRORS, OSError) as error:
        raise DownloadError(f"no answer from {url} ({_reason(error)})") from error
    if not length.isdecimal():
        raise DownloadError(f"the server does not say how large {url} is")
    return int(length)


def _complete(url: str, part: Path, size: int, title: str) -> None:
    """Brings `part` to `size` bytes, reconnecting while there is progress."""
    from dune_fast.teachers.progress import Progress  # imports rich, which only a download needs

    if _size(part) > size:
        part.unlink()
    failures, best = 0, _size(part)
    with Progress(title, size >> 20, "MiB", done=best >> 20) as progress:
        while _size(part) < size:
            try:
                _transfer(url, part, size, lambda have: progress.advance(have / 2**20 - progress.done))
                reason = "the connection ended early"
            except urllib.error.HTTPError as error:
                reason = _reason(error)
                if error.code == 416:  # nothing there to resume from
                    part.unlink(missing_ok=True)
                elif error.code < 500 and error.code not in (408, 429):
                    raise DownloadError(f"{reason} for {url}") from error
            except _NETWORK_ERRORS as error:
                reason = _reason(error)
            if _size(part) >= size:
                break
            # progress is a size never reached before: a server that cannot resume begins again every time
            failures = 0 if _size(part) > best else failures + 1
            best = max(best, _size(part))
            if failures >= _ATTEMPTS:
                raise DownloadError(f"no complete answer from {url} ({reason})")
            logger.info("%s: %s at %d of %d bytes; trying again", title, reason, _size(part), size)
            time.sleep(_PAUSE_SECONDS * 2**failures)


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _transfer(url: str, part: Path, size: int, report: Callable[[int], None]) -> None:
    """Appends the rest of the file to `part`; from its beginning where the server cannot resume."""
    have = _size(part)
    with _request(url, **({"Range": f"bytes={have}-"} if have else {})) as response:
        begins_at_have = (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-")
        resuming = have > 0 and response.status == 206 and begins_at_have  # status is None for file://
        have = have if resuming else 0
        with open(part, "ab" if resuming else "wb") as sink:
            report(have)
            while chunk := response.read(_CHUNK):
                sink.write(chunk)
                have += len(chunk)
                if have > size:  # another file, maybe an endless one; the hash check speaks for it
                    break
                report(have)
