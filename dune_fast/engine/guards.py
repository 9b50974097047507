"""Watches a run's losses and gradients on the device; the host looks when it logs or saves, and not before.

A step whose loss or gradient is not finite on any rank is skipped on all (`Engine.step`). The third in a row stops the
run, at the next read; so does a finite loss above `max_loss`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dune_fast.dali_pipelines.loader import Batch
from dune_fast.distill.step import PerImage
from dune_fast.engine.accumulation import all_ranks
from dune_fast.engine.checkpoints import write_tensors

logger = logging.getLogger(__name__)

LIMIT = 3
"""Skipped steps in a row that stop the run."""
_SHOWN = 8  # samples that a message lists


class DivergedError(ValueError):
    """The loss exploded or is not a number; the last good checkpoint is kept."""


@dataclass(frozen=True)
class Names:
    """What the numbers of a step stand for."""

    teachers: Sequence[str]
    """Rows of the losses: teachers, or the head."""
    datasets: Sequence[str]
    parameters: Sequence[str] = ()
    row: str = "teacher"
    """What a row is called in messages."""


@torch.no_grad()
def undo_if(skipped: Tensor, live: Iterable[Tensor], before: Iterable[Tensor]) -> None:
    """Restores `live` from the copies `before` where `skipped`, a bool scalar on the device, is true; no host read."""
    for now, then in zip(live, before, strict=True):
        now.copy_(torch.where(skipped, then, now))


class Guard:
    """Counts skipped steps and keeps what the first of a row of them looked like.

    Args:
        max_loss: a finite loss above it stops the run.
        in_a_row: steps that were skipped directly before this process started.
        about: further metadata of the reproducer's file.
    """

    def __init__(
        self, names: Names, max_loss: float, device: torch.device, in_a_row: int, about: Mapping[str, str]
    ) -> None:
        self.names, self.max_loss, self.about = names, max_loss, about
        self.in_a_row = torch.tensor(float(in_a_row), device=device)
        self.total = torch.zeros((), device=device)
        self.worst = torch.zeros((), device=device)
        """The largest finite loss since the last read."""
        self._evidence: dict[str, Tensor] = {}

    @property
    def halted(self) -> Tensor:
        """Whether the run will be stopped at the next read and must change nothing until then; bool on the device."""
        return self.in_a_row >= LIMIT

    @torch.no_grad()
    def add(self, step: int, loss: Tensor, skipped: Tensor, norms: Tensor, images: PerImage, batch: Batch) -> None:
        """Takes in a step, counted from 0.

        `loss`, `images` and `batch` are this rank's; `skipped` and the gradients' `norms` [P] are equal on all ranks.
        """
        self.worst = torch.maximum(self.worst, torch.where(loss.isfinite(), loss, self.worst))
        first = skipped & (self.in_a_row == 0)
        now = {
            "positions": batch.positions, "dataset": batch.dataset, "group": batch.group, "losses": images.losses,
            "finite": images.finite, "norms": norms, "step": torch.full_like(batch.positions[:1], step),
        }  # fmt: skip
        kept = self._evidence or now
        self._evidence = {name: torch.where(first, x, kept[name]) for name, x in now.items()}
        self.in_a_row = torch.where(skipped, self.in_a_row + 1, 0.0)
        self.total = self.total + skipped

    def read(self, folder: Path, world_size: int, kept: Callable[[], str]) -> dict[str, float]:
        """Waits for the device; returns `skipped_steps` of this process so far. All ranks call it.

        Args:
            folder: where rank 0 writes what a skipped step looked like.
            kept: says for a message which checkpoints there are.

        Raises:
            DivergedError: too many steps in a row were skipped, or a loss was above `max_loss`.
        """
        packed = torch.stack([self.worst, self.in_a_row, self.total])
        if world_size > 1:
            dist.all_reduce(packed, op=dist.ReduceOp.MAX)
        worst, in_a_row, total = packed.tolist()
        self.worst.zero_()
        if in_a_row >= LIMIT:
            raise DivergedError(f"{self._report(folder, world_size)}: the run is stopped, {kept()}")
        if worst > self.max_loss:
            raise DivergedError(
                f"the loss rose to {worst:.3g} since it was last looked at (train.max_loss={self.max_loss:g}): the run "
                f"is stopped, {kept()}. Lower the learning rate (optimizer.*), or look at loss/* in metrics.jsonl for "
                f"the {self.names.row} that breaks"
            )
        return {"skipped_steps": total}

    def _report(self, folder: Path, world_size: int) -> str:
        """Writes the reproducer; returns the sentence that names teachers, datasets and samples."""
        samples = ("positions", "dataset", "group", "losses", "finite")  # norms and step are the same on all ranks
        whole = {name: all_ranks(self._evidence[name], world_size, dim=-1) for name in samples}
        found = {name: x.cpu().contiguous() for name, x in (self._evidence | whole).items()}
        step = int(found["step"][0])
        bad = ~found["finite"]
        if not bad.any():  # all teachers' features are finite
            bad = ~found["losses"].isfinite()
        suspects = []
        for teacher, row in zip(self.names.teachers, bad, strict=True):
            for dataset in found["dataset"][row].unique().tolist():
                where = found["positions"][row & (found["dataset"] == dataset)].tolist()
                more = f" and {len(where) - _SHOWN} more" if len(where) > _SHOWN else ""
                shown = ", ".join(map(str, where[:_SHOWN])) + more
                named = f"{self.names.row} {teacher!r} on dataset {self.names.datasets[dataset]!r}"
                suspects.append(f"{named}, positions {shown}")
        if not suspects:
            wrong = [n for n, norm in zip(self.names.parameters, found["norms"], strict=True) if not norm.isfinite()]
            suspects = [f"every image's loss is finite; gradients that are not: {', '.join(wrong[:_SHOWN]) or 'none'}"]
        path = folder / f"nonfinite_step_{step}.safetensors"
        holds = f"{path.name} in {folder} holds its samples, losses and configuration"
        if not dist.is_initialized() or dist.get_rank() == 0:
            names = {key: list(getattr(self.names, key)) for key in ("teachers", "datasets", "parameters")}
            try:
                write_tensors(path, found, {"names": json.dumps(names), **self.about})
            except OSError as error:  # what was found is to be said all the same
                holds = f"{path.name} with its samples could not be written to {folder} ({error})"
        return (
            f"loss or gradients were not finite in {LIMIT} steps in a row, all of them skipped; the first is step "
            f"{step} ({'; '.join(suspects)}). {holds}; the images are a function of train.seed and the step: going on "
            "from the last checkpoint leads there again"
        )
