"""A rank's batch: its parts for gradient accumulation, their outputs merged, the samples of all ranks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dune_fast.dali_pipelines.loader import Batch
from dune_fast.distill.standardization import AllReduce
from dune_fast.distill.step import PerImage, StepOutput
from dune_fast.engine.config import RunConfig
from dune_fast.engine.stages import Turn, turns


def micro_batch_size(cfg: RunConfig, world_size: int) -> int:
    """Images of one backward pass on one rank, of the smallest where `partitions` make them differ;
    `train.accumulation=0`, not worked out yet, counts as 1.

    Raises:
        ValueError: the global batch, or a partition, cannot be shared out.
    """
    if cfg.partitions:
        every = [turn.part.slots for rank in range(world_size) for turn in turns(cfg, rank, world_size)]
        return min(slots.stop - slots.start for slots in every) // cfg.train.accumulation
    count = world_size * max(1, cfg.train.accumulation)
    if cfg.train.global_batch % count:
        accumulated = f" x train.accumulation={cfg.train.accumulation}" if cfg.train.accumulation > 1 else ""
        raise ValueError(
            f"train.global_batch={cfg.train.global_batch} is not a multiple of the {world_size} processes"
            f"{accumulated}; choose for example {math.ceil(cfg.train.global_batch / count) * count}, or another "
            "number of processes, if the run is to go on"
        )
    return cfg.train.global_batch // count


def split(batch: Batch, count: int) -> list[Batch]:
    """A batch in `count` equal parts: part p has every `count`-th image from the p-th on.

    Ranks hold blocks of the global batch. Split so, a part over all ranks, whose statistics are taken together, holds
    the same images for any number of ranks.
    """
    parts = (slice(i, None, count) for i in range(count))
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    rows = {name: value for name, value in values.items() if isinstance(value, Tensor | np.ndarray | list | dict)}
    return [dataclasses.replace(batch, **{name: _taken(value, part) for name, value in rows.items()}) for part in parts]


def _taken(rows: Any, part: slice) -> Any:
    if isinstance(rows, dict):
        return {name: _taken(value, part) for name, value in rows.items()}
    return rows[part].contiguous() if isinstance(rows, Tensor) else rows[part]


def all_ranks(x: Tensor, world_size: int, dim: int = 0) -> Tensor:
    """The tensors of all ranks, in their order, one after the other along a dimension, in which they may differ. All
    ranks call it."""
    if world_size == 1:
        return x
    x = x.movedim(dim, 0)
    lengths = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size)]
    dist.all_gather(lengths, torch.full_like(lengths[0], len(x)))
    longest = max(int(length) for length in lengths)
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    kept = [part[: int(length)] for part, length in zip(parts, lengths, strict=True)]
    return torch.cat(kept).movedim(0, dim)


def part_momentum(momentum: float, count: int) -> float:
    """The m of each of a batch's parts, after all of which the running statistics keep 1 - `momentum` of their past."""
    return momentum if count == 1 else 1.0 - (1.0 - momentum) ** (1.0 / count)


def merge(outputs: list[StepOutput], count: int) -> tuple[dict[str, Tensor], PerImage]:
    """Metrics averaged over backward passes, and what is known of their images, in the order of the rank's batches,
    each of which was split in `count` parts."""
    if len(outputs) == 1:
        return outputs[0].metrics, outputs[0].images
    metrics = {name: torch.stack([o.metrics[name] for o in outputs]).mean(0) for name in outputs[0].metrics}
    batches = [outputs[i : i + count] for i in range(0, len(outputs), count)]
    images = [
        [torch.stack(parts, dim=2).flatten(1) for parts in zip(*(o.images for o in batch), strict=True)]
        for batch in batches
    ]
    return metrics, PerImage(*(torch.cat(found, dim=1) for found in zip(*images, strict=True)))


def weighted(output: StepOutput, turn: Turn) -> StepOutput:
    """The output of a partition's batch, weighted so that means over batches and ranks are those over partitions."""

    def factor(name: str) -> float:
        teacher = name.split("/")[1] if "/" in name else ""
        return turn.average.get(teacher, 0.0) if teacher else turn.weight

    metrics = {name: value * factor(name) for name, value in output.metrics.items()}
    return StepOutput(output.loss * turn.weight, metrics, output.images)


def within_partition(own: int, count: int, all_reduce: AllReduce) -> AllReduce:
    """Sums a tensor, in place, over the ranks whose images are of the same of `count` partitions. All ranks call it."""

    def reduce(x: Tensor) -> None:
        table = x.new_zeros(count, *x.shape)
        table[own] = x
        all_reduce(table)
        x.copy_(table[own])

    return reduce


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a rank in one step, where it works on several partitions one after the other."""

    parts: list[Batch]

    def __getattr__(self, name: str) -> Any:
        """`positions`, `dataset` and `group` of all images."""
        if name not in ("positions", "dataset", "group"):
            raise AttributeError(name)
        return torch.cat([getattr(part, name) for part in self.parts])
