"""What a step's images are: their size, which teachers look at them, in stages of the run and in partitions of a step.

Progressive resolution: data, teachers and student work at the size of the step. All else (order of images, randomness,
optimizer, and schedules and teachers' statistics unless `stage_restarts` names them) goes on across a border. The
student's position table keeps its size throughout and is interpolated for smaller images as the encoder does for any
other size. So weights, Adam's moments and checkpoints have the same shapes in every stage, and nothing is converted at
a border: a run resumes at one as at any other step.

Partitions: a step's images are several blocks of slots, each at its size and with its teachers. `partition_by: ranks`
gives each to a group of ranks, `steps` has every rank work on one after the other. A step averages the partitions'
losses by their shares either way. The order of images does not depend on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dune_fast.dali_pipelines.order import rank_slots
from dune_fast.dali_pipelines.plan import Part
from dune_fast.engine.config import ConfigError, RunConfig
from dune_fast.kernels import philox
from dune_fast.teachers.config import teachers_by_trunk


class Setting(NamedTuple):
    """Images of one size, for the same teachers."""

    image_size: int
    """Side of the images in pixels."""
    teachers: tuple[str, ...]
    images: float
    """Share of the images of a stage, or of the run."""


class Stage(NamedTuple):
    """Steps at one size, or at several that take turns."""

    first: int
    """Its first step, from 0."""
    end: int
    """The step after its last."""
    image_size: int
    """Side of the images in pixels; of the largest."""
    sizes: tuple[int, ...] = ()
    """The sizes of its steps, where there are several."""
    weights: tuple[float, ...] = ()
    """With which each is drawn; empty where they take turns."""
    teachers: tuple[str, ...] = ()
    """That take part; empty for all."""

    def size(self, step: int, seed: int) -> int:
        """Of one of its steps."""
        if not self.sizes:
            return self.image_size
        if not self.weights:
            return self.sizes[(step - self.first) % len(self.sizes)]
        return drawn_size(self.sizes, self.weights, seed, step)

    def __str__(self) -> str:
        sizes = f"{' / '.join(map(str, self.sizes or (self.image_size,)))} px"
        return f"{sizes}, teachers {', '.join(self.teachers)}" if self.teachers else sizes


def drawn_size(sizes: Sequence[int], weights: Sequence[float], seed: int, step: int, of: int = 0) -> int:
    """One of some sizes, by their weights. `of`: 0 for the student, from 1 for teachers, which draw independently."""
    u = float(philox.uniform4(seed, philox.SIZES, step, of)[0])
    ends = np.cumsum(weights) / sum(weights)
    return sizes[min(int(np.searchsorted(ends, u, side="right")), len(sizes) - 1)]


def teacher_sizes(cfg: RunConfig) -> Callable[[int], dict[str, int]] | None:
    """Step -> teacher -> side of its images, of those that draw one (`input_sizes`); None where there are none."""
    groups = [names for names in teachers_by_trunk(cfg.teachers) if cfg.teachers[names[0]].input_sizes]
    if not groups:
        return None

    def sizes(step: int) -> dict[str, int]:
        found = {}
        for i, names in enumerate(groups):
            several = cfg.teachers[names[0]].input_sizes
            found |= dict.fromkeys(names, drawn_size(several, [1.0] * len(several), cfg.train.seed, step, 1 + i))
        return found

    return sizes


def stages(cfg: RunConfig) -> list[Stage]:
    """The stages of a run, in their order; one for a run without `progressive`."""
    found, first = [], 0
    for entry in cfg.progressive:
        end = round(entry.until * cfg.steps)
        every = tuple(entry.image_sizes)
        largest = max(every, default=entry.image_size)
        found.append(Stage(first, end, largest, every, tuple(entry.weights), tuple(entry.teachers)))
        first = end
    return found if first == cfg.steps else [*found, Stage(first, cfg.steps, cfg.image_size)]


def stage_at(found: Sequence[Stage], step: int) -> Stage:
    """The stage of a step; the last one for steps beyond the run, which are decoded ahead."""
    return next((stage for stage in found if step < stage.end), found[-1])


def settings(cfg: RunConfig, stage: Stage) -> list[Setting]:
    """What the images of a stage are, with their shares."""
    if cfg.partitions:
        return [
            Setting(part.image_size, tuple(part.teachers or cfg.teachers), part.images / cfg.train.global_batch)
            for part in cfg.partitions
        ]
    sizes, names = stage.sizes or (stage.image_size,), stage.teachers or tuple(cfg.teachers)
    weights = stage.weights or (1.0,) * len(sizes)
    return [Setting(size, names, weight / sum(weights)) for size, weight in zip(sizes, weights, strict=True)]


def at_size(cfg: RunConfig, image_size: int, teachers: Sequence[str] | None = None) -> RunConfig:
    """The configuration of a run that is at this size, with these teachers, throughout, to count with."""
    kept = cfg.teachers if teachers is None else {name: cfg.teachers[name] for name in teachers}
    return dataclasses.replace(cfg, image_size=image_size, progressive=[], partitions=[], teachers=kept)


class Turn(NamedTuple):
    """What a rank does with one batch of a step."""

    part: Part
    """Which images, at which size."""
    teachers: tuple[str, ...]
    """That look at them; empty for the stage's."""
    weight: float
    """Of its loss, so that the mean over a rank's batches, and over ranks, is that over partitions by share."""
    average: dict[str, float]
    """teacher -> what its metrics are multiplied by, so that the same mean is over the partitions that it looks at."""


def shares(cfg: RunConfig) -> list[float]:
    """What each partition counts, together 1."""
    given = [part.share for part in cfg.partitions]
    total = sum(given)
    return [share / total for share in given] if total else [1 / len(given)] * len(given)


def passes(cfg: RunConfig) -> int:
    """Batches of a rank in a step."""
    return len(cfg.partitions) if cfg.partition_by == "steps" and cfg.partitions else 1


def turns(cfg: RunConfig, rank: int, world_size: int) -> list[Turn]:
    """The batches of a rank in every step.

    Raises:
        ConfigError: ranks cannot share the partitions, or a partition's images.
    """
    if not cfg.partitions:
        return [Turn(Part(rank_slots(cfg.train.global_batch, rank, world_size)), (), 1.0, {})]
    portions, by_ranks = shares(cfg), cfg.partition_by == "ranks"
    groups = [round(portion * world_size) for portion in portions] if by_ranks else [world_size] * len(portions)
    wrong = [g < 1 or abs(g - p * world_size) > 1e-6 * world_size for g, p in zip(groups, portions, strict=True)]
    if by_ranks and any(wrong):
        asked = ", ".join(f"{portion:.3g}" for portion in portions)
        raise ConfigError(
            f"partition_by=ranks: shares of {asked} of {world_size} ranks are no whole numbers of ranks; choose "
            "another number of ranks, other partitions[i].share, or partition_by=steps"
        )
    seen = {name: sum(p for p, c in zip(portions, cfg.partitions, strict=True) if name in (c.teachers or cfg.teachers))
            for name in cfg.teachers}  # fmt: skip
    found, slot, first = [], 0, 0
    for i, (part, ranks, portion) in enumerate(zip(cfg.partitions, groups, portions, strict=True)):
        if part.images % (ranks * max(1, cfg.train.accumulation)):
            parts = f" in {cfg.train.accumulation} parts" if cfg.train.accumulation > 1 else ""
            raise ConfigError(
                f"partitions[{i}].images={part.images} cannot be shared by {ranks} ranks{parts}; choose a multiple of "
                f"{ranks * max(1, cfg.train.accumulation)}"
            )
        own = rank - first if by_ranks else rank
        if 0 <= own < ranks:
            share = rank_slots(part.images, own, ranks)
            weight = 1.0 if by_ranks else portion * len(cfg.partitions)
            names = tuple(part.teachers or cfg.teachers)
            average = {name: weight / seen[name] for name in names}
            slots = slice(slot + share.start, slot + share.stop)
            found.append(Turn(Part(slots, part.image_size), names, weight, average))
        slot += part.images
        first += ranks if by_ranks else 0
    return found


def by_stage(cfg: RunConfig, what: str, schedule: Callable[[int], np.ndarray]) -> np.ndarray:
    """A schedule (number of steps -> values) over the run, or over each stage where `stage_restarts` names it."""
    lengths = [stage.end - stage.first for stage in stages(cfg)] if what in cfg.stage_restarts else [cfg.steps]
    return np.concatenate([schedule(length) for length in lengths])
