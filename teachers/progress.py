"""How far long work is: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

logger = logging.getLogger(__name__)

_LOG_SECONDS = 10.0


class Progress:
    """Counts and shows; a context manager.

    Args:
        title: what is done.
        total: units of work.
        unit: what they are called.
        done: units that were finished before; rates leave them out.
    """

    def __init__(self, title: str, total: int, unit: str = "images", done: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done: float = done
        self._first = done
        self._bytes = 0
        self._began = self._spoke = time.monotonic()
        self._bar: Bar | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit)
            clock = TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn()
            self._bar = Bar(*columns, TextColumn("{task.fields[speed]}"), *clock, console=console)
            self._task = self._bar.add_task("", total=total, completed=done, speed="")

    def advance(self, units: float, num_bytes: int = 0) -> None:
        """Says that more is done: units, and the bytes that went with them."""
        self.done += units
        self._bytes += num_bytes
        now = time.monotonic()
        elapsed = max(now - self._began, 1e-9)
        rate = (self.done - self._first) / elapsed
        speed = f"{rate:,.0f} {self.unit}/s"
        if self._bytes:
            speed += f", {self._bytes / elapsed / 1e6:,.1f} MB/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, speed=speed)
        elif now - self._spoke >= _LOG_SECONDS:
            self._spoke = now
            left = timedelta(seconds=round((self.total - self.done) / rate)) if rate else "unknown time"
            logger.info("%s: %d of %d %s, %s, %s left", self.title, self.done, self.total, self.unit, speed, left)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
