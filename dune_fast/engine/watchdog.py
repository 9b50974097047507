"""Ends a run in which nothing happens any more, and names the rank that the others wait for or have lost."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

import psutil
import torch.distributed as dist

from dune_fast.engine.interruption import Stop

logger = logging.getLogger(__name__)

_INTERVAL_SECONDS = 2.0  # a rank says so often where it is
_STOP = "stop"  # in the store, once a rank has been asked to stop


class LostRankError(RuntimeError):
    """A rank that this one communicates with has ended or cannot be reached; the message names it."""


def is_communication_error(error: BaseException | None) -> bool:
    """Whether torch could not reach another rank; gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def starters() -> list[psutil.Process]:
    """The processes that a launched rank ends with: its launcher, and what has started DeepSpeed's."""
    if "RANK" not in os.environ:
        return []
    try:
        parents = psutil.Process().parents()[:2]
        return parents if any("deepspeed.launcher" in word for word in parents[0].cmdline()) else parents[:1]
    except (psutil.Error, IndexError):  # not every machine lets a process look at others
        return []


class Watchdog:
    """Watches the ranks of a run, from a thread of each.

    The thread writes where its rank is, and when, to the process group's store. So a rank whose training thread is
    stuck is behind, and a rank whose whole process stands still, or has ended, is silent. Through the store a rank also
    hears that another one has been asked to stop: a launcher may tell one after the other. A launcher that has gone
    tells nobody, so its end asks for the same.

    Args:
        hosts: of every rank.
        timeout: seconds without anything happening after which the process ends.
        go_on: says in messages how the run goes on.
        stop: this rank's; asked to stop if another rank's is.
        ended: called with the reason before the process ends.
    """

    def __init__(
        self, rank: int, hosts: Sequence[str], timeout: float, go_on: str, stop: Stop, ended: Callable[[str], object]
    ) -> None:
        self.rank, self.hosts, self.timeout, self._go_on = rank, list(hosts), timeout, go_on
        self._stop, self._ended = stop, ended
        self._count, self._doing, self._since = 0, "starting", time.monotonic()
        self._word = timeout / 10
        """Seconds after which the next warning is due."""
        self._end, self._starters = threading.Event(), starters()
        self._interval = min(_INTERVAL_SECONDS, timeout / 10)
        self._store = dist.distributed_c10d._get_default_store() if len(self.hosts) > 1 else None

    def __enter__(self) -> Watchdog:
        self.at("starting")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if self._store is not None and is_communication_error(error):
                raise LostRankError(f"{self._who_is_lost()}; {self._go_on}") from error
        finally:
            self._end.set()

    def at(self, doing: str) -> None:
        """Says what this rank does from now on."""
        self._count, self._doing, self._since, self._word = self._count + 1, doing, time.monotonic(), self.timeout / 10

    def _watch(self) -> None:
        while not self._end.wait(self._interval):
            waited = time.monotonic() - self._since
            try:
                if any(not process.is_running() for process in self._starters):
                    self._stop.ask("the launcher has ended")
                if self._store is not None:
                    self._talk()
                if waited <= self.timeout:
                    self._warn(waited)
                    continue
                reason = self._describe(self._places())
            except RuntimeError as error:  # the store is rank 0's
                if self._end.is_set():
                    return
                reason = (
                    f"rank 0 has ended or does not answer ({str(error).splitlines()[0]}): see what it wrote; rank "
                    f"{self.rank} itself: {self._doing}"
                )
            logger.error("%s; %s", reason, self._go_on)
            self._ended(reason)
            os._exit(1)  # the training thread is in a wait that nothing else ends

    def _warn(self, waited: float) -> None:
        """A word, at longer and longer intervals, before the end."""
        if waited < self._word:
            return
        self._word *= 2
        logger.warning(
            "rank %d on %s: nothing has happened for %.0f s (%s); the process ends after %.0f s "
            "(train.timeout_minutes)", self.rank, self.hosts[self.rank], waited, self._doing, self.timeout,
        )  # fmt: skip

    def _talk(self) -> None:
        """Tells the other ranks where this one is, and whether it has been asked to stop; hears whether they have."""
        self._store.set(f"place/{self.rank}", self._place())
        if self._stop.asked:
            self._store.set(_STOP, f"{self._stop.asked} on rank {self.rank}")
        elif self._store.check([_STOP]):
            self._stop.ask(self._store.get(_STOP).decode())

    def _place(self) -> str:
        """Where this rank is: "unix-time count doing"."""
        return f"{time.time():.1f} {self._count} {self._doing}"

    def _places(self) -> list[str]:
        """Where every rank said that it is."""
        if self._store is None:
            return [self._place()]
        keys = [f"place/{rank}" for rank in range(len(self.hosts))]
        # to ask for what is not there would wait
        return [self._store.get(key).decode() if self._store.check([key]) else "0 0 starting" for key in keys]

    def _who_is_lost(self) -> str:
        """Names the ranks that do not say any more where they are, and have not come here either."""
        everyone = range(len(self.hosts))
        try:
            self._store.set(f"left/{self.rank}", "")
            before = self._places()
            time.sleep(2.5 * self._interval)
            here = [self._store.check([f"left/{rank}"]) for rank in everyone]
            silent = [rank for rank, place in zip(everyone, self._places(), strict=True) if place == before[rank]]
            lost = [rank for rank in silent if not here[rank]]
            if self.rank == 0:
                time.sleep(self._interval)  # the store ends with this process: the others ask it, too
        except RuntimeError:
            lost = [0]  # the store is its
        named = ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in lost) or "another rank"
        return f"the connection to {named} is lost: it has ended (see what it wrote) or cannot be reached any more"

    def _describe(self, places: list[str]) -> str:
        """Names the ranks that are behind."""
        times, counts, doing = zip(*(place.split(" ", 2) for place in places), strict=True)
        latest = max(map(float, times))
        # all write every few seconds; half the timeout leaves room for clocks of hosts that differ
        silent = [rank for rank, then in enumerate(times) if latest - float(then) > self.timeout / 2]
        behind = silent or [rank for rank, count in enumerate(counts) if int(count) == min(map(int, counts))]
        if len(places) == 1:
            who = f"it is at: {doing[0]}"
        elif len(behind) == len(places):
            who = f"all ranks are at the same place: {doing[0]}"
        else:
            named = "; ".join(
                f"rank {rank} on {self.hosts[rank]}: {doing[rank]}" + " (silent since)" * (rank in silent)
                for rank in behind
            )
            who = f"it waits for {named}; rank {self.rank} itself: {self._doing}"
        return (
            f"the run timed out: nothing has happened on rank {self.rank} for {self.timeout:.0f} s "
            f"(train.timeout_minutes); {who}"
        )
