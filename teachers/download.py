"""Find a wheel through pip and download it: resumed after an interruption, checked, moved into place whole."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import json
import logging
import re
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

__all__ = ["DownloadError", "download", "file_sha256", "locate_wheel", "remote_size"]

_CHUNK = 1 << 18
_ATTEMPTS = 4  # in a row without a single new byte
_PAUSE_SECONDS = 0.5  # before trying again, doubled with every failure
_STALL_SECONDS = 30.0
_PIP_SECONDS = 600.0
_NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
_LOG_SECONDS = 5.0  # between progress lines where there is no terminal


class DownloadError(ValueError):
    """A file could not be located or downloaded; the caller says what to do about it."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def locate_wheel(package: str, version: str, filename: str) -> str:
    """The address (http, https or file) that the user's pip configuration gives for a wheel.

    pip is asked twice at most. `pip index versions -vv` reads the index pages alone, so it is quick, but the lines it
    logs are no contract. Where they do not name the file, `pip install --dry-run --report` is asked: its report is
    documented, but pip may download the whole wheel to write it.

    Raises:
        DownloadError: pip is missing, finds no such version, or cannot reach its index.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(f"pip is not installed beside {sys.executable}")
    listing = _pip("index", "versions", "-vv", "--pre", package)
    # a masked password ("****") makes an address useless
    address = re.compile(rf"(?:https?|file)://[^\s#*]+/{re.escape(filename)}(?=[\s#]|$)", re.IGNORECASE | re.MULTILINE)
    if found := address.search(listing.stdout + "\n" + listing.stderr):
        return found.group()
    options = ("--dry-run", "--quiet", "--ignore-installed", "--no-deps", "--only-binary=:all:", "--report", "-")
    report = _pip("install", *options, f"{package}=={version}")
    if report.returncode != 0:
        reason = next((line for line in reversed(report.stderr.splitlines()) if line.startswith("ERROR")), "pip failed")
        raise DownloadError(f"pip found no wheel ({reason.removeprefix('ERROR: ')})")
    try:
        return json.loads(report.stdout[report.stdout.index("{") :])["install"][0]["download_info"]["url"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DownloadError("pip's report does not name the wheel's address") from error


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    # one retry: without a connection the answer should come in seconds
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries=1", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadError(f"pip did not answer ({error.__class__.__name__})") from error


def download(url: str, target: Path, part: Path, size: int | None, sha256: str, title: str) -> None:
    """Download `url` to `target`, through `part`, which a later call resumes from.

    `target` appears only when its `size` (bytes) and `sha256` are right. Where the size is None, the server is asked
    for it; where the hash is empty, the size alone decides.

    Raises:
        DownloadError: no connection, or a file that is not the one asked for (the partial file is then deleted).
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https", "file"):
        raise DownloadError(f"the address has an unknown scheme: {url}")
    size = remote_size(url) if size is None else size
    resumed = part.exists()
    _complete(url, part, size, title)
    if not sha256:
        part.replace(target)
        return
    found = file_sha256(part)
    if found != sha256 and resumed:
        # the start may be a leftover of another version: try once from nothing before giving up
        logger.warning("%s: the resumed download has the wrong hash; starting over", title)
        part.unlink()
        _complete(url, part, size, title)
        found = file_sha256(part)
    if found != sha256:
        part.unlink()
        raise DownloadError(f"the file at {url} has SHA-256 {found}, expected {sha256}, so it was deleted")
    part.replace(target)


def remote_size(url: str) -> int:
    """Bytes of the file at `url`, as its server says; DownloadError if it does not."""
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "dune_fast"})
    try:
        with urllib.request.urlopen(request, timeout=_STALL_SECONDS) as response:
            length = response.headers.get("Content-Length") or ""
    except urllib.error.HTTPError as error:
        raise DownloadError(f"the server answered {error.code} {error.reason} for {url}") from error
    except (*_NETWORK_ERRORS, OSError) as error:
        reason = str(getattr(error, "reason", error)) or error.__class__.__name__
        raise DownloadError(f"no answer from {url} ({reason})") from error
    if not length.isdecimal():
        raise DownloadError(f"the server does not say how large {url} is")
    return int(length)


def _complete(url: str, part: Path, size: int, title: str) -> None:
    """Bring `part` to `size` bytes, reconnecting while there is progress."""
    if _size(part) > size:
        part.unlink()
    failures, best = 0, _size(part)
    with _progress(title, size) as report:
        while _size(part) < size:
            try:
                _transfer(url, part, size, report)
                reason = "the connection ended early"
            except urllib.error.HTTPError as error:
                reason = f"the server answered {error.code} {error.reason}"
                if error.code == 416:  # nothing there to resume from
                    part.unlink(missing_ok=True)
                elif error.code < 500 and error.code not in (408, 429):
                    raise DownloadError(f"{reason} for {url}") from error
            except _NETWORK_ERRORS as error:
                reason = str(getattr(error, "reason", error)) or error.__class__.__name__
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
    """Append the rest of the file to `part`; from its beginning where the server cannot resume."""
    have = _size(part)
    headers = {"Accept-Encoding": "identity", "User-Agent": "dune_fast"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=_STALL_SECONDS) as response:
        begins_at_have = (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-")
        resuming = have > 0 and response.status == 206 and begins_at_have  # status is None for file://
        with open(part, "ab" if resuming else "wb") as sink:
            _copy(response, sink, have if resuming else 0, size, report)


def _copy(response: BinaryIO, sink: BinaryIO, have: int, size: int, report: Callable[[int], None]) -> None:
    report(have)
    while chunk := response.read(_CHUNK):
        sink.write(chunk)
        have += len(chunk)
        if have > size:  # another file, maybe an endless one; the hash check speaks for it
            break
        report(have)


@contextmanager
def _progress(title: str, size: int) -> Iterator[Callable[[int], None]]:
    """A callback that takes the bytes present so far: a bar on a terminal, a log line now and then elsewhere."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=size)
            yield lambda have: bar.update(task, completed=have)
        return

    begun = spoken = time.monotonic()
    first: int | None = None

    def report(have: int) -> None:
        nonlocal spoken, first
        first = have if first is None else first
        now = time.monotonic()
        if now - spoken >= _LOG_SECONDS:
            spoken = now
            speed = max(have - first, 1) / (now - begun)
            left = (size - have) / speed
            logger.info("%s: %.1f of %.1f MB, %.1f MB/s, %.0f s left", title, have / 1e6, size / 1e6, speed / 1e6, left)

    yield report
