"""Where a run's numbers go: `metrics.jsonl`, TensorBoard, a progress bar or log lines."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch.utils.tensorboard import SummaryWriter

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


class MetricsLog:
    """Writes one record a logging step; shows progress. Only rank 0 has one.

    A run that goes on from a checkpoint drops the records of steps that it will repeat.

    Args:
        folder: of the run.
        first_step: where this process starts.
        total_steps: of the run.
        global_batch: images a step over all ranks.
    """

    def __init__(self, folder: Path, first_step: int, total_steps: int, global_batch: int) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [r for r in read_metrics(self.path) if r["step"] <= first_step] if self.path.exists() else []
        self.path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self.total_steps, self.global_batch = total_steps, global_batch
        self._last_time, self._last_step = time.perf_counter(), first_step
        console = Console(stderr=True)
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = [SpinnerColumn(), TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn()]
            self._progress = Progress(*columns, TextColumn("{task.fields[status]}"), console=console)
            self._task = self._progress.add_task("", total=total_steps, completed=first_step, status="")
            self._progress.start()

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step` finished steps."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def write(self, step: int, metrics: dict[str, float], wait_seconds: float) -> None:
        """Records metrics of the steps since the last record.

        Args:
            step: finished steps.
            metrics: name -> value.
            wait_seconds: how long the steps since the last record waited for data.
        """
        now = time.perf_counter()
        elapsed, steps = now - self._last_time, max(step - self._last_step, 1)
        self._last_time, self._last_step = now, step
        rate = steps * self.global_batch / elapsed
        left = (self.total_steps - step) * elapsed / steps
        record = {"step": step, "images": step * self.global_batch, **metrics}
        record |= {
            "images_per_second": rate,
            "step_seconds": elapsed / steps,
            "data_wait_share": wait_seconds / elapsed,
        }
        self._file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            self._board.add_scalar(name, value, step)
        wait = 100 * wait_seconds / elapsed
        status = f"loss {metrics['loss']:.4f}  {rate:.1f} images/s  data wait {wait:.0f} %  {duration(left)} left"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, status=status)
        else:
            logger.info("step %d of %d  %s", step, self.total_steps, status)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict]:
    """The records of a `metrics.jsonl`; a line cut short by a kill is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: a line that was cut short is left out", path)
    return records
