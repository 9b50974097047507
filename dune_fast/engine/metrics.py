"""Where a run's numbers go: `metrics.jsonl`, a progress bar or log lines, and trackers."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.engine.devices import peak_memory
from dune_fast.engine.trackers import Tracker, close_trackers

logger = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """Seconds as "1d 2h", "3h 04m", "5m 06s" or "7s"."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h}h"
    if hours:
        return f"{hours}h {m:02}m"
    return f"{m}m {s:02}s" if m else f"{s}s"


@dataclass(frozen=True)
class Workload:
    """What a step is, for rates."""

    global_batch: int
    """Images a step over all ranks."""
    world_size: int
    """Ranks, one device each."""
    device: torch.device
    """Of this rank."""
    flops: int | None
    """Of one image in a training step, the mean over the run, see `dune_fast.engine.flops`; None if not known."""
    peak_tflops: float | None
    """Of one device, in the run's precision; None if not known."""
    stages: tuple[tuple[int, float], ...] = ()
    """(the step after its last, cost of its steps over the mean of the run) of every stage; empty for steps that are
    all alike."""

    def work(self, first: int, end: int) -> float:
        """What the steps first .. end - 1 cost, in steps of the run's mean cost."""
        if not self.stages:
            return end - first
        begins = (0, *(border for border, _ in self.stages))
        parts = zip(begins, self.stages, strict=False)
        return sum(cost * max(0, min(end, border) - max(first, begin)) for begin, (border, cost) in parts)

    def rates(self, images_per_second: float, cost: float = 1.0) -> dict[str, float]:
        """`teraflops_per_second` of one device and `mfu` (model FLOPs utilisation), as far as they are known; `cost` is
        that of a step over the run's mean."""
        if self.flops is None:
            return {}
        tflops = images_per_second * self.flops * cost / self.world_size / 1e12
        known = {"teraflops_per_second": tflops}
        return known if self.peak_tflops is None else {**known, "mfu": tflops / self.peak_tflops}


CLOCK = (
    "images_per_second", "step_seconds", "data_wait_share", "memory_gib", "teraflops_per_second", "mfu", "hours_left",
    "evaluation_seconds",
)  # fmt: skip
"""Names in a record that depend on the machine and not on the computation."""

# the run's length is estimated after 50 steps, or after 5 % of a short run, but never after fewer than 5
_ESTIMATE_STEPS, _ESTIMATE_SHARE, _ESTIMATE_LEAST = 50, 0.05, 5


class RecordFile:
    """`metrics.jsonl`: one JSON object a line, each written out before `append` returns.

    Records of steps after `first_step` are dropped, because they will be repeated; with `evaluation_due`, so is the
    record of that step's evaluation. What a full disk refuses waits in memory for the next record.
    """

    def __init__(self, path: Path, first_step: int, evaluation_due: bool = False) -> None:
        self.path = path
        kept = [r for r in read_metrics(path) if r["step"] <= first_step] if path.exists() else []
        kept = [r for r in kept if not (evaluation_due and r["step"] == first_step and "evaluation_seconds" in r)]
        text = "".join(json.dumps(record) + "\n" for record in kept).encode()
        write_whole(path, text)
        self._size, self._waiting, self._warned = len(text), b"", False

    def append(self, record: dict[str, Any]) -> None:
        """Writes a record; JSON has no NaN and no infinity, null stands for them."""
        strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._waiting += json.dumps(strict, allow_nan=False).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Writes what waits."""
        if not self._waiting:
            return
        try:
            with self.path.open("r+b") as file:
                file.seek(self._size)
                file.truncate()  # a part of a line, if the disk took no more
                file.write(self._waiting)
        except OSError as error:
            if not self._warned:
                logger.warning("%s cannot be written (%s): its records wait in memory", self.path, error)
            self._warned = True
            return
        if self._warned:
            logger.info("%s can be written again: nothing is missing", self.path)
        self._size, self._waiting, self._warned = self._size + len(self._waiting), b"", False


class _Display(Progress):
    """A bar, and a line of numbers below it, which a narrow terminal may wrap."""

    status = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.status)


class MetricsLog:
    """Writes one record a logging step; shows progress. Only rank 0 has one.

    Args:
        first_step: where this process starts, see `RecordFile`.
        trackers: further receivers of the records; closed with the log.
        on_estimate: takes the estimate of the run's length, see `_make_estimate`.
        evaluation_due: see `RecordFile`.
        evaluation_every: steps between evaluations, which count in the time that is left; 0 for none.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        total_steps: int,
        workload: Workload,
        trackers: Sequence[Tracker] = (),
        on_estimate: Callable[[dict[str, Any]], None] | None = None,
        evaluation_due: bool = False,
        evaluation_every: int = 0,
    ) -> None:
        self._evaluation_every, self._evaluation_seconds = evaluation_every, 0.0
        self.path = folder / "metrics.jsonl"
        self._records = RecordFile(self.path, first_step, evaluation_due)
        self.total_steps, self.workload, self.trackers = total_steps, workload, list(trackers)
        self._step = first_step
        self._last_time, self._last_step = time.perf_counter(), first_step
        # the first step of a process compiles and warms up: the estimate's clock starts after it
        self._began: float | None = None
        self._first_step = first_step
        left = total_steps - first_step
        self._estimate_after = max(_ESTIMATE_LEAST, min(_ESTIMATE_STEPS, math.ceil(_ESTIMATE_SHARE * left)))
        self._on_estimate, self._estimated = on_estimate, False
        console = Console(stderr=True)
        self._progress: _Display | None = None
        if console.is_terminal:
            columns = [SpinnerColumn(), TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn()]
            self._progress = _Display(*columns, console=console)
            self._task = self._progress.add_task("", total=total_steps, completed=first_step)
            self._progress.start()

    def advance(self, step: int) -> None:
        """Says that `step` steps are finished, as far as the host knows."""
        self._step = step
        now = time.perf_counter()
        if self._began is None:
            self._began, self._first_step = now, step
        elif not self._estimated and step - self._first_step >= self._estimate_after:
            self._make_estimate(step, (now - self._began) / self.workload.work(self._first_step, step))
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def write(self, step: int, metrics: dict[str, float], wait_seconds: float) -> None:
        """Records metrics after `step` finished steps, which waited `wait_seconds` for data since the last record."""
        now = time.perf_counter()
        elapsed, steps = now - self._last_time, max(step - self._last_step, 1)
        work = self.workload.work(step - steps, step)
        self._last_time, self._last_step = now, step
        rate = steps * self.workload.global_batch / elapsed
        left = self._seconds_left(step, elapsed / work)
        memory = peak_memory(self.workload.device) / 2**30
        clock = {
            "images_per_second": rate, "step_seconds": elapsed / steps, "data_wait_share": wait_seconds / elapsed,
            "memory_gib": memory, "hours_left": left / 3600, **self.workload.rates(rate, work / steps),
        }  # fmt: skip
        self._record(step, metrics | clock)
        status = (
            f"loss {metrics['loss']:.4f}  {rate:.1f} images/s  step {1000 * elapsed / steps:.0f} ms  "
            f"data wait {100 * wait_seconds / elapsed:.0f} %  "
            + (f"MFU {100 * clock['mfu']:.1f} %  " if "mfu" in clock else "")
            + f"memory {memory:.1f} GiB  {duration(left)} left"
        )
        if self._progress is not None:
            self._progress.status = status
        else:
            logger.info("step %d of %d  %s", step, self.total_steps, status)
        self.advance(step)

    def _record(self, step: int, values: dict[str, float]) -> None:
        """Hands one record to the file and to the trackers."""
        record = {"step": step, "images": step * self.workload.global_batch, **values}
        self._records.append(record)
        for tracker in self.trackers:
            tracker.write(step, record)

    def write_evaluation(self, step: int, values: dict[str, float], seconds: float) -> None:
        """Records an evaluation after `step` finished steps; its `seconds` do not count in the rates of the steps."""
        self._last_time += seconds
        if self._began is not None:
            self._began += seconds
        first, self._evaluation_seconds = not self._evaluation_seconds, seconds
        if first and self._estimated and self._evaluation_every:  # the estimate did not count evaluations yet
            seconds = time.perf_counter() - self._began
            self._make_estimate(step, seconds / self.workload.work(self._first_step, step))
        self._record(step, {**values, "evaluation_seconds": seconds})
        losses = {name.removeprefix("held_out/"): x for name, x in values.items() if name.startswith("held_out/")}
        shown = [f"{teacher} {loss:.4f}" for teacher, loss in losses.items() if "/" not in teacher]
        lines = [f"held-out loss {', '.join(shown)}"] if shown else []
        lines += [f"k-NN {name[4:]} {100 * x:.1f} %" for name, x in values.items() if name.startswith("knn/")]
        lines += [f"{name[4:]} {x:.4g}" for name, x in values.items() if name.startswith("val/")]
        logger.info("evaluation after step %d  %s  (%s)", step, "  ".join(lines), duration(seconds))

    def _seconds_left(self, step: int, seconds: float) -> float:
        """Time left after `step` steps, at `seconds` a step of mean cost; each evaluation to come takes as long as the
        last one."""
        evaluations = 0
        if every := self._evaluation_every:  # one at each multiple, and one at the end
            evaluations = math.ceil(self.total_steps / every) - step // every
        return self.workload.work(step, self.total_steps) * seconds + evaluations * self._evaluation_seconds

    def _make_estimate(self, step: int, seconds: float) -> None:
        """Estimates the length of the whole run from the time of a step of its mean cost, without the saving of
        checkpoints."""
        self._estimated = True
        total, left = self._seconds_left(0, seconds), self._seconds_left(step, seconds)
        end = datetime.now(UTC) + timedelta(seconds=left)
        device_hours = total / 3600 * self.workload.world_size
        logger.info(
            "estimate after %d steps: %.1f images/s, %d steps take %s (%.3g hours, %.3g %s-hours), %s left, until %s",
            step - self._first_step, self.workload.global_batch / seconds, self.total_steps, duration(total),
            total / 3600, device_hours,
            "GPU" if self.workload.device.type == "cuda" else "process", duration(left),
            end.astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        )  # fmt: skip
        if self._on_estimate is not None:
            self._on_estimate(
                {
                    "after_steps": step - self._first_step, "step_seconds": seconds,
                    "images_per_second": self.workload.global_batch / seconds, "hours": total / 3600,
                    "device_hours": device_hours, "end": end.isoformat(timespec="seconds"),
                }
            )  # fmt: skip

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._progress is not None:
            self._progress.stop()
        self._records.flush()
        close_trackers(self.trackers, finished=self._step >= self.total_steps)


def read_metrics(path: Path) -> list[dict]:
    """The records of a `metrics.jsonl`; a line cut short by a kill is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: a line that was cut short is left out", path)
    return records
