"""Ends of a run that come from outside: a signal that asks it to save and stop, a rank that hangs."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a run to save and to end well: SLURM's and Kubernetes' way to announce the end of a job."""
AGREE_EVERY = 10
"""Ranks agree every 10 steps whether to stop, over gloo on the CPU: they must save after the same step."""
PATIENCE = 1.25
"""Collectives wait for this many timeouts: the watchdog, which can name the missing rank, must be the first to end."""


class Stop:
    """Turns signals into a flag that all ranks agree on; a context in which the signals are caught.

    `timeout` is the watchdog's, in seconds.
    """

    def __init__(self, world_size: int, timeout: float) -> None:
        self._asked = False
        patience = timedelta(seconds=PATIENCE * timeout)
        self._hosts = dist.new_group(backend="gloo", timeout=patience) if world_size > 1 else None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self._asked = True
        logger.warning("%s: the run saves and stops", signal.Signals(number).name)

    def now(self, step: int) -> bool:
        """Whether the run stops after `step` finished steps; the same on every rank. All ranks call it."""
        if self._hosts is None:
            return self._asked
        if step % AGREE_EVERY:
            return False
        asked = torch.tensor(float(self._asked))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._hosts)
        return asked.item() > 0


class Watchdog:
    """Ends a run of several ranks in which nothing has happened for too long, and names the rank that is behind.

    A thread of every rank writes where its rank is, and when, to the process group's store. So a rank whose training
    thread is stuck is behind, and a rank whose whole process stands still is silent. `timeout` is in seconds; `go_on`
    says in the message how the run goes on.
    """

    def __init__(self, rank: int, world_size: int, timeout: float, go_on: str) -> None:
        self.rank, self.world_size, self.timeout, self._go_on = rank, world_size, timeout, go_on
        self._count, self._doing, self._since = 0, "starting", time.monotonic()
        self._end = threading.Event()
        self._store = dist.distributed_c10d._get_default_store() if world_size > 1 else None

    def __enter__(self) -> Watchdog:
        if self._store is not None:
            self.at("starting")
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def at(self, doing: str) -> None:
        """Says what this rank does from now on."""
        self._count, self._doing, self._since = self._count + 1, doing, time.monotonic()

    def _watch(self) -> None:
        while not self._end.wait(min(5.0, self.timeout / 10)):
            try:
                self._store.set(f"place/{self.rank}", f"{time.time():.1f} {self._count} {self._doing}")
                if time.monotonic() - self._since <= self.timeout:
                    continue
                reason = self._describe([self._store.get(f"place/{r}").decode() for r in range(self.world_size)])
            except RuntimeError as error:  # the store is rank 0's
                if self._end.is_set():
                    return
                reason = (
                    f"rank 0 has ended or does not answer ({str(error).splitlines()[0]}): see what it wrote; rank "
                    f"{self.rank} itself: {self._doing}"
                )
            logger.error("%s; %s", reason, self._go_on)
            os._exit(1)  # the training thread is in a collective that nothing else ends

    def _describe(self, places: list[str]) -> str:
        """Names the ranks that are behind; each place is "unix-time count doing"."""
        times, counts, doing = zip(*(place.split(" ", 2) for place in places), strict=True)
        latest = max(map(float, times))
        # all write every few seconds; half the timeout leaves room for clocks of hosts that differ
        silent = [rank for rank, then in enumerate(times) if latest - float(then) > self.timeout / 2]
        behind = silent or [rank for rank, count in enumerate(counts) if int(count) == min(map(int, counts))]
        if len(behind) == len(places):
            who = f"all ranks are at the same place: {doing[0]}"
        else:
            named = "; ".join(f"rank {rank}: {doing[rank]}" + " (silent since)" * (rank in silent) for rank in behind)
            who = f"it waits for {named}; rank {self.rank} itself: {self._doing}"
        return (
            f"the run timed out: nothing has happened on rank {self.rank} for {self.timeout:.0f} s "
            f"(train.timeout_minutes); {who}"
        )
