"""Calls to a storage that may fail for a while, or never answer.

What a failed read means is decided here, once. Wrong bytes (none, too few, another checksum) make a broken image. A
stale handle, a lost connection, a silent server or a machine without memory says nothing about the image: the read is
tried again for a while, and then the run stops (`StorageError`), to go on from its checkpoint. A missing file (deleted,
or its disk is not mounted) and an input/output error (a bad sector, or a network folder that gave up; tried again as
well) can be either. They make a broken image, but only for as long as the process lives.

A call that hangs raises nothing. So calls run in daemon threads, and whoever waits for one gives it up: all tries of a
call, and those that a client library makes on its own, have one deadline.
"""

from __future__ import annotations

import errno
import logging
import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from dune_fast.dali_pipelines.errors import BrokenImage, StorageError

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between tries; doubled each time, with some chance in it
_LOOK = 0.2  # seconds after which a waiting caller looks whether it still should
_GRACE = 0.5  # seconds longer than its deadline that a call may take to say itself why it failed
_SAY = 30.0  # seconds after which a long call is named in the log, again and again
_TRANSIENT = {
    getattr(errno, name, None)
    for name in (
        "ESTALE", "EIO", "EAGAIN", "EINTR", "EBUSY", "ETIMEDOUT", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EPIPE",
        "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ENOTCONN", "EREMOTEIO", "ESHUTDOWN",
        "EMFILE", "ENFILE", "ENOMEM", "EKEYEXPIRED",
    )
}  # fmt: skip
_EXPIRED = {
    "ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestExpired",
    "InvalidAccessKeyId", "400",
}  # fmt: skip
"""S3's codes for credentials that were good once; InvalidAccessKeyId is a key that was replaced. To a HEAD request with
an expired token S3 answers 400 without a code: an image was taken for broken."""


def patiently(
    read: Callable[[], Any],
    what: str,
    patience: float,
    stop: threading.Event | None = None,
    longest: float | None = None,
) -> Any:
    """The result of `read()`, tried again while the storage fails.

    Args:
        what: is read, for messages.
        patience: seconds after which it is given up, all tries together.
        stop: once it is set, nothing is tried again.
        longest: seconds for a call that may take longer than the patience, because it asks many times (a listing). A
            failure after more than twice the patience then starts the patience anew.

    Raises:
        StorageError: it still failed then, or it failed and is not wanted any more.
        OSError: EIO that outlived the patience, and all errors that waiting does not mend, such as file-not-found.
    """
    began, pause = time.monotonic(), _FIRST_PAUSE
    give_up = began + patience
    stop = stop or threading.Event()
    while True:
        tried = time.monotonic()
        try:
            return read()
        except Exception as error:
            if not _may_pass(error):
                raise
            now = time.monotonic()
            if longest is not None and now - tried > 2 * patience:
                give_up = min(now + patience, began + longest)
            if now + pause > give_up:
                if getattr(error, "errno", None) == errno.EIO:
                    raise
                raise _given_up(what, reason_of(error), now - began) from error
            logger.warning("%s: %s; trying again", what, reason_of(error))
            # ranks should not all come back at once
            if stop.wait(pause * random.uniform(0.7, 1.3)):
                raise _unwanted(what) from error
        pause = min(2 * pause, _LONGEST_PAUSE)


def _unwanted(what: str) -> StorageError:
    return StorageError(f"{what} was not read: it is not wanted any more")


def _given_up(what: str, reason: str, seconds: float) -> StorageError:
    return StorageError(
        f"{what} cannot be read: {reason}, for {seconds:.0f} s. No image was given up for it: see that the storage "
        "answers, then start the same command again (a run waits for data.read_patience seconds)"
    )


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, or its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_refusal(error: BaseException) -> bool:
    """Whether a storage refuses to be read by these credentials, or there are none.

    fsspec's file systems raise their clients' own errors, so the kind is known by its name: botocore's
    NoCredentialsError, google.auth's DefaultCredentialsError, azure's ClientAuthenticationError.
    """
    if isinstance(error, PermissionError) or has_expired(error):
        return True
    names = " ".join(kind.__name__ for kind in type(error).__mro__)
    words = ("Credential", "Auth", "ProfileNotFound", "SSOToken", "TokenRetrieval")
    return any(word in names for word in words) or getattr(error, "status", 0) in (401, 403)


def has_expired(error: BaseException) -> bool:
    """Whether a storage refuses credentials that new ones may take the place of."""
    answer = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
    return code in _EXPIRED or (isinstance(error, OSError) and "expired" in str(error).lower())


def _may_pass(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT
    # what is left of OSError is mostly the errors of clients, which fsspec's file systems pass on
    never = BrokenImage, ValueError, TypeError, NotImplementedError, ImportError, AttributeError
    never += FileNotFoundError, IsADirectoryError, NotADirectoryError
    return not isinstance(error, never) and not is_refusal(error)


class Threads:
    """Daemon threads for calls that may hang, at most `count`, started as they are needed.

    They hold up neither their callers nor the end of the process.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._queue: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._open = 0  # calls that have not ended
        self.last_news = time.monotonic()
        """When a call began or ended."""

    def submit(
        self, call: Callable[[], Any], what: str, seconds: float, stop: threading.Event | None = None
    ) -> Pending:
        """Has a call done, after those before it. It ends itself within `seconds` unless it hangs.

        After that, or once `stop` is set, nobody waits for it any more. `what` is read, for messages.
        """
        pending = Pending(self, call, what, seconds, stop or threading.Event())
        with self._lock:
            if self._open == 0:
                self.last_news = time.monotonic()
            self._open += 1
            if len(self._threads) < min(self._count, self._open):
                thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._queue.put(pending)
        return pending

    def close(self, seconds: float = 1.0) -> None:
        """Ends the threads; those that hang are left behind after some seconds."""
        with self._lock:
            threads, self._threads = self._threads, []
        for _ in threads:
            self._queue.put(None)
        deadline = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (pending := self._queue.get()) is not None:
            pending.run()
            with self._lock:
                self._open -= 1
            del pending  # its result belongs to the caller alone


class Pending:
    """A call that a thread makes, or has made."""

    def __init__(
        self, threads: Threads, call: Callable[[], Any], what: str, seconds: float, stop: threading.Event
    ) -> None:
        self._threads, self._call, self._what = threads, call, what
        self._seconds, self._stop = seconds, stop
        self._future: Future[Any] = Future()
        self._began: float | None = None

    def run(self) -> None:
        """Makes the call, unless nobody wants it."""
        if self._stop.is_set():
            self._future.set_exception(_unwanted(self._what))
            return
        self._began = self._threads.last_news = time.monotonic()
        try:
            self._future.set_result(self._call())
        except BaseException as error:  # belongs to whoever waits
            self._future.set_exception(error)
        self._threads.last_news = time.monotonic()

    def result(self) -> Any:
        """What the call returned, or raises what it raised.

        Raises:
            StorageError: it has not ended in its time, or all threads hang and it was not begun; or it is not wanted.
        """
        say_at = _SAY
        while True:
            try:
                return self._future.result(_LOOK)
            except TimeoutError:
                if self._future.done():
                    return self._future.result()
            since = self._began or self._threads.last_news
            waited = time.monotonic() - since
            if self._stop.is_set():
                raise _unwanted(self._what)
            if waited > self._seconds + _GRACE:
                raise _given_up(self._what, "no answer", waited)
            if waited > say_at:
                logger.warning("%s: no answer yet after %.0f s", self._what, waited)
                say_at += _SAY


def answered(read: Callable[[], Any], what: str, patience: float, longest: float | None = None) -> Any:
    """`patiently`, in a thread of its own: where `read()` hangs, StorageError too. For a few calls, not for images."""
    seconds = patience if longest is None else longest
    threads = Threads(1, "ask-storage")
    try:
        return threads.submit(lambda: patiently(read, what, patience, None, longest), what, seconds).result()
    finally:
        threads.close(0)
