"""What a process says, on the terminal and in the run's folder (`log.txt`)."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.logging import RichHandler

NAME = "log.txt"
_EARLY = 1000
"""Records that are kept until the run's folder is known."""


class _Unbreakable(io.FileIO):
    """A descriptor whose reader may go away: a closed pipe, a closed terminal, a full disk. Nothing is raised then.

    Python ignores SIGPIPE, so a write to a closed pipe is an error of the write alone, in compiled code too.
    """

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            written = super().write(data)
            if written is not None:  # as of a pipe that somebody has made non-blocking, and is full
                return written
        return memoryview(data).nbytes


def make_output_unbreakable() -> None:
    """From now on no `print`, message or progress bar can end this process, whatever becomes of its output."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed at the start; libraries write to it all the same
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        # under a test it is something else
        elif type(stream) is io.TextIOWrapper and not isinstance(getattr(stream.buffer, "raw", None), _Unbreakable):
            with contextlib.suppress(OSError):
                stream.flush()
            sink = io.BufferedWriter(_Unbreakable(stream.fileno(), "w", closefd=False))
            at_once = stream.line_buffering or stream.write_through
            # not every terminal's encoding has every character
            fresh = io.TextIOWrapper(sink, stream.encoding, "backslashreplace", line_buffering=at_once)
            setattr(sys, name, fresh)


class _LineHandler(RichHandler):
    """A message is one line, however long: addresses and paths that are folded cannot be copied or searched for."""

    def render(self, *, record: Any, traceback: Any, message_renderable: Any) -> RenderableType:
        line = self.get_level_text(record) + " " + message_renderable
        return line if traceback is None else Group(line, traceback)


class _File(logging.FileHandler):
    def emit(self, record: logging.LogRecord) -> None:
        """A disk that is full or gone must not stop a run: the terminal has the message anyway."""
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Nor fill the terminal with tracebacks."""


class RunLog(MemoryHandler):
    """Writes to `log.txt` of the run's folder, once that is open; keeps the records from before."""

    def __init__(self) -> None:
        super().__init__(capacity=1)  # hands every record on, if there is a file

    def open(self, folder: Path) -> None:
        """Appends to the folder's log from now on."""
        if self.target is not None:
            self.target.close()
        file = _File(folder / NAME, delay=True)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.setTarget(file)
        self.flush()

    def emit(self, record: logging.LogRecord) -> None:
        if self.target is not None or len(self.buffer) < _EARLY:
            super().emit(record)

    def close(self) -> None:
        if self.target is not None:
            self.target.close()
        super().close()


def setup_logging(debug: bool, rank: int) -> None:
    """Our own messages on rank 0, warnings of all ranks; rank 0 keeps its own for the run's folder."""
    make_output_unbreakable()
    handlers: list[logging.Handler] = [
        _LineHandler(console=Console(stderr=True, soft_wrap=True), rich_tracebacks=debug),
        *([RunLog()] if rank == 0 else []),
    ]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=handlers, force=True)
    level = logging.DEBUG if debug else logging.INFO if rank == 0 else logging.WARNING
    logging.getLogger("dune_fast").setLevel(level)


def open_run_log(folder: Path) -> None:
    """Lets what this process has said and will say go to the folder too."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, RunLog):
            handler.open(folder)
