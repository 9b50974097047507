"""Ends of a run that come from outside: a signal that asks it to save and stop, storage that fails."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from dune_fast.dali_pipelines.errors import StorageError

T = TypeVar("T")
logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""What asks a run to save and to end well: the announced end of a job, a terminal that is closed, Ctrl-C. One that the
process was started to ignore (`nohup`) stays ignored."""
INSIST_SECONDS = 2.0
"""A second Ctrl-C after so long ends the process at once. Terminal and launcher may both send the first."""
_SHARE = 0.8  # of the watchdog's time, after which images are not waited for any more
PATIENCE = 1.25
"""Collectives wait for this many timeouts: the watchdog, which can name the missing rank, must be the first to end."""


class OtherRankError(ValueError):
    """Another rank cannot go on; the message names it and says why."""


class Stop:
    """Turns signals, and errors that leave a rank's state whole, into one decision of all ranks.

    A context in which the signals are caught. Before every step the ranks agree, over gloo on the CPU, whether to make
    it: a rank that waits for its images has not yet begun the step, so what all of them hold can be saved.

    Args:
        world_size: number of ranks.
        timeout: the watchdog's, in seconds.
        notice: seconds between a signal and the end of the process, see `TrainConfig.notice_seconds`.
    """

    def __init__(self, world_size: int, timeout: float, notice: float = 30.0) -> None:
        self.timeout, self.notice = timeout, notice
        self.why = ""
        """Why the run stops: signals and ranks; empty while it goes on."""
        self.asked, self._asked_at = "", 0.0
        """The signal that asks this rank to stop, or who passed it on; empty if there was none."""
        self._fault: Exception | None = None
        self._last, self._step, self._warned = time.monotonic(), 0.0, False
        patience = timedelta(seconds=PATIENCE * timeout)
        self._hosts = dist.new_group(backend="gloo", timeout=patience) if world_size > 1 else None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ask(self, reason: str) -> None:
        """Asks this rank to stop before its next step."""
        if not self.asked:
            self.asked, self._asked_at = reason, time.monotonic()
            logger.warning("%s: the run saves and stops", reason)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked and time.monotonic() - self._asked_at > INSIST_SECONDS:
            raise KeyboardInterrupt
        self.ask(signal.Signals(number).name)

    def waits(self, waited: float) -> bool:
        """Whether a rank waits on for its images, after so many seconds; see `ImageLoader.batches`.

        Raises:
            StorageError: so long that the watchdog is about to end the process, which could not save then.
        """
        if waited > _SHARE * self.timeout:
            raise StorageError(
                f"no batch of images has come for {waited:.0f} s: see that the storage answers, then start the same "
                "command again. To wait longer, raise train.timeout_minutes"
            )
        return not self.asked

    def take(self, batches: Iterator[T], at: Callable[[str], None]) -> T | None:
        """The next batch, None after the last, and where the run stops (`why` is set then). All ranks call it.

        Args:
            batches: of this rank; what they raise becomes the reason to stop.
            at: the watchdog's.
        """
        fault = None
        try:
            batch = next(batches, None)
        except Exception as error:
            batch, fault = None, error
        at("waiting for the other ranks")
        return None if self.now(fault) else batch

    def now(self, fault: Exception | None = None) -> bool:
        """Whether the run stops before its next step; the same on every rank. All ranks call it at the same place.

        Args:
            fault: why this rank cannot make the step; what it holds is whole. `raise_fault` raises it, once the run
                has saved.
        """
        self._step, self._last = time.monotonic() - self._last, time.monotonic()
        wanted = torch.tensor(float(fault is not None or bool(self.asked)))
        if self._hosts is not None:
            dist.all_reduce(wanted, op=dist.ReduceOp.MAX, group=self._hosts)
        if not wanted.item():
            return False
        everyone = [(socket.gethostname(), self.asked, "" if fault is None else _sentence(fault))]
        if self._hosts is not None:
            mine, everyone = everyone[0], [("", "", "")] * dist.get_world_size(self._hosts)
            dist.all_gather_object(everyone, mine, group=self._hosts)
        self._fault = fault
        faults = [f"rank {rank} on {host}: {text}" for rank, (host, _, text) in enumerate(everyone) if text]
        if faults and fault is None:
            self._fault = OtherRankError(faults[0])
        self.why = faults[0] if faults else next(name for _, name, _ in everyone if name)
        if faults and (self._hosts is None or dist.get_rank() == 0):
            logger.error("%s; the run saves and stops", self.why)
        return True

    def raise_fault(self) -> None:
        """Raises what kept this rank, or another one (`OtherRankError`), from going on; nothing after a signal."""
        if self._fault is not None:
            raise self._fault

    def saved(self, seconds: float) -> None:
        """Warns, once, if a stop would not be saved within the notice: rank 0 calls it with what a save has taken."""
        step = self._step
        needed = step + seconds
        if needed <= self.notice or self._warned:
            return
        self._warned = True
        logger.warning(
            "a checkpoint took %.0f s to be written, a step %.0f s: a run that is asked to stop may need %.0f "
            "s, and train.notice_seconds=%g. Let the signal come earlier (SLURM: --signal=USR1@%d) and raise "
            "train.notice_seconds to match, or what follows the last checkpoint will be lost",
            seconds, step, needed, self.notice, 2 * needed,
        )  # fmt: skip


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
