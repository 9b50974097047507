"""What a step's images are: their size, which teachers look at them, in stages of the run and in partitions of a step.

Progressive resolution: data, teachers and student work at the size of the step. All else (order of images, randomness,
optimizer, and schedules and teachers' statistics unless `stage_restarts` names them) goes on across a border. The
student's position table keeps its size throughout and is interpolated for smaller images as the encoder does for any
other size. So weights, Adam's moments and checkpoints have the same shapes in every stage, and nothing is converted at
a border: a run resumes at one as at any other step.

Partitions: a step's images are several blocks of slots, each at a size and with teachers of its own, which go by a
stage that lasts the whole run. `partition_by: ranks` gives each to a group of ranks, `steps` has every rank work on one
after the other. A step averages the partitions' losses by their shares either way. The order of images does not depend
on it, and sizes are drawn by seed and step alone, so that all ranks know them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dune_fast.dali_pipelines.order import rank_slots
from dune_fast.dali_pipelines.plan import Part
from dune_fast.engine.config import ConfigError, RunConfig
from dune_fast.engine.config_stages import SizesConfig
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
    """Steps, or a partition of them, at one size or at several."""

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
    partition: int = 0
    """Which of the step's partitions it is."""
    zoom: tuple[float, ...] = ()
    """Range of its teachers' zoom; empty for `data.teacher_zoom`."""

    def size(self, step: int, seed: int) -> int:
        """Of one of its steps."""
        if not self.sizes:
            return self.image_size
        if not self.weights:
            return self.sizes[(step - self.first) % len(self.sizes)]
        return drawn_size(self.sizes, self.weights, seed, step, -self.partition)

    @property
    def settings(self) -> list[tuple[int, float]]:
        """Its sizes, each with its share of the steps."""
        sizes = self.sizes or (self.image_size,)
        weights = self.weights or (1.0,) * len(sizes)
        return [(size, weight / sum(weights)) for size, weight in zip(sizes, weights, strict=True)]

    @property
    def px(self) -> str:
        """Its sizes in words."""
        return f"{' / '.join(map(str, self.sizes or (self.image_size,)))} px"

    def __str__(self) -> str:
        return f"{self.px}, teachers {', '.join(self.teachers)}" if self.teachers else self.px


def drawn_size(sizes: Sequence[int], weights: Sequence[float], seed: int, step: int, of: int = 0) -> int:
    """One of some sizes, by their weights. `of`, who draw independently: 0 for the student, from 1 for teachers, below
    0 for a step's partitions after its first."""
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
        found.append(_stage(entry, first, end))
        first = end
    return found if first == cfg.steps else [*found, Stage(first, cfg.steps, cfg.image_size)]


def partitions(cfg: RunConfig) -> list[Stage]:
    """What the images of each partition are, throughout; none in a run without `partitions`."""
    return [
        _stage(part, 0, cfg.steps)._replace(partition=i, zoom=tuple(part.teacher_zoom))
        for i, part in enumerate(cfg.partitions)
    ]


def _stage(entry: SizesConfig, first: int, end: int) -> Stage:
    every = tuple(entry.image_sizes)
    largest = max(every, default=entry.image_size)
    return Stage(first, end, largest, every, tuple(entry.weights), tuple(entry.teachers))


def stage_at(found: Sequence[Stage], step: int) -> Stage:
    """The stage of a step; the last one for steps beyond the run, which are decoded ahead."""
    return next((stage for stage in found if step < stage.end), found[-1])


def settings(cfg: RunConfig, stage: Stage) -> list[Setting]:
    """What the images of a stage are, with their shares."""
    parts = [(p, c.images / cfg.train.global_batch) for p, c in zip(partitions(cfg), cfg.partitions, strict=True)]
    return [
        Setting(size, part.teachers or tuple(cfg.teachers), images * share)
        for part, images in parts or [(stage, 1.0)]
        for size, share in part.settings
    ]


def at_size(cfg: RunConfig, image_size: int, teachers: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run that is at this size, with these teachers or all, throughout, to count with."""
    kept = {name: cfg.teachers[name] for name in teachers or cfg.teachers}
    return dataclasses.replace(cfg, image_size=image_size, progressive=[], partitions=[], teachers=kept)


class Turn(NamedTuple):
    """What a rank does with one batch of a step."""

    part: Part
    """Which images, at which size."""
    weight: float
    """Of its loss, so that the mean over a rank's batches, and over ranks, is that over partitions by share."""
    average: dict[str, float]
    """teacher -> what its metrics are multiplied by, so that the same mean is over the partitions that it looks at."""
    stage: Stage | None = None
    """The partition; None where the run's stages say what the images are."""


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
        return [Turn(Part(rank_slots(cfg.train.global_batch, rank, world_size)), 1.0, {})]
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
    every = zip(cfg.partitions, partitions(cfg), groups, portions, strict=True)
    for i, (part, stage, ranks, portion) in enumerate(every):
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
            average = {name: weight / seen[name] for name in part.teachers or cfg.teachers}
            slots = slice(slot + share.start, slot + share.stop)
            sizes = functools.partial(stage.size, seed=cfg.train.seed)
            found.append(Turn(Part(slots, sizes, stage.zoom), weight, average, stage))
        slot += part.images
        first += ranks if by_ranks else 0
    return found


def loaded_teachers(cfg: RunConfig, own: Sequence[Turn]) -> list[str]:
    """The teachers that a rank of these turns loads: those of its partitions; all where evaluations may ask for all."""
    if cfg.evaluation.every or any(turn.stage is None or not turn.stage.teachers for turn in own):
        return list(cfg.teachers)
    return [name for name in cfg.teachers if any(turn.stage and name in turn.stage.teachers for turn in own)]


def by_stage(cfg: RunConfig, what: str, schedule: Callable[[int], np.ndarray]) -> np.ndarray:
    """A schedule (number of steps -> values) over the run, or over each stage where `stage_restarts` names it."""
    lengths = [stage.end - stage.first for stage in stages(cfg)] if what in cfg.stage_restarts else [cfg.steps]
    return np.concatenate([schedule(length) for length in lengths])
