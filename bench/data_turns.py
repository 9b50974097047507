"""How the contenders of `bench.data` are measured: in turns, so that whatever else the machine does hits all of them.

Each turn begins with batches that do not count, until what the contender had decoded ahead is used up; worker processes
are stopped while others have their turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor


@dataclass
class Contender:
    """One way of loading images and what was measured of it."""

    name: str
    rates: list[float] = field(default_factory=list)
    """Images a second, by round."""
    cpu_ms: list[float] = field(default_factory=list)
    """Processor time an image in milliseconds, by round."""


class Running:
    """A contender at work, with worker processes that can be stopped while others have their turn."""

    def __init__(self, make: Callable[[], Iterator[Tensor]]) -> None:
        own = psutil.Process()
        before = set(own.children(recursive=True))
        self._batches = make()
        self._workers = [process for process in own.children(recursive=True) if process not in before]
        self._processes = [own, *self._workers]

    def warm_up(self) -> None:
        """Waits until the workers have started and the pipelines are built: until there is a batch."""
        next(self._batches)
        self.pause()

    def pause(self) -> None:
        """Stops the workers: nothing is decoded ahead in another one's time."""
        for process in self._workers:
            process.suspend()

    def resume(self) -> None:
        """Lets them go on."""
        for process in self._workers:
            process.resume()

    def close(self) -> None:
        """Ends everything.

        DataLoader's workers are asked to end at once: left to themselves they go on with the batches that were
        ordered, are waited for in vain, 5 s each, and may abort while they are handing one over.
        """
        for process in self._workers:
            process.terminate()
        self.resume()
        self._batches.close()

    def processor_seconds(self) -> float:
        """User and system time so far."""
        times = [process.cpu_times() for process in self._processes]
        return sum(used.user + used.system for used in times)

    def take_turn(self, seconds: float, ahead: int) -> tuple[float, float]:
        """(images a second, processor milliseconds an image), after `ahead` batches that do not count."""
        self.resume()
        for _ in range(ahead):
            next(self._batches)
        finish()
        images, batches, began, used = 0, 0, time.perf_counter(), self.processor_seconds()
        # workers have a batch under way each: over few batches that would distort the processor time
        while batches < 2 + 2 * len(self._workers) or time.perf_counter() - began < seconds:
            images += len(next(self._batches))
            batches += 1
        finish()
        elapsed, used = time.perf_counter() - began, self.processor_seconds() - used
        self.pause()
        return images / elapsed, 1e3 * used / images


def finish() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(
    sources: dict[str, Callable[[], Iterator[Tensor]]],
    rounds: int,
    seconds: float,
    ahead: int,
    report: Callable[[str], None],
) -> dict[str, Contender]:
    """All contenders, taking turns; the order of the turns rotates from round to round."""
    running = {name: Running(make) for name, make in sources.items()}
    results = {name: Contender(name) for name in running}
    names = list(running)
    try:
        for contender in running.values():  # all of their workers have been starting meanwhile
            contender.warm_up()
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                rate, cpu = running[name].take_turn(seconds, ahead)
                results[name].rates.append(rate)
                results[name].cpu_ms.append(cpu)
                report(f"round {number + 1}: {name:20} {rate:7.1f} images/s, {cpu:6.2f} ms of processor time an image")
    finally:
        for contender in running.values():
            contender.close()
    return results
