"""A run's stages and partitions in its configuration, and their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dune_fast.dali_pipelines.datasets import DataConfig
from dune_fast.distill.normalizers import STORED
from dune_fast.distill.objective import ObjectiveConfig
from dune_fast.engine.config_sections import (
    CacheConfig,
    ConfigError,
    StandardizationConfig,
    StartConfig,
    TrainConfig,
)
from dune_fast.teachers.config import TeacherConfig

RESTARTS = ("learning_rate", "statistics")
"""What `stage_restarts` may name."""
MODES = ("ranks", "steps")
"""What `partition_by` may be."""
ESTIMATED = ("phi_s", "fixed", *STORED)
"""Conventions whose statistics are known before the first step and stay."""


@dataclass
class SizesConfig:
    """Images of a stage or of a partition, and who looks at them."""

    image_size: int = 0
    """Side of its images in pixels, up to the run's `image_size`. In `progressive`, without another of these fields:
    above that of the entry before and below the run's."""
    image_sizes: list[int] = field(default_factory=list)
    """In place of `image_size`: sides that the steps take, one after the other."""
    weights: list[float] = field(default_factory=list)
    """With `image_sizes`: each step's side is drawn, with these weights, by `train.seed` and the step; every
    partition's on its own."""
    teachers: list[str] = field(default_factory=list)
    """Those that take part; empty for all. Projectors that no teacher trains get no gradient, and weight decay
    alone."""


@dataclass
class ProgressiveConfig(SizesConfig):
    """A stage of the run; see `dune_fast.engine.stages`."""

    until: float = 0.0
    """Share of the run's steps at which it ends, above that of the entry before. The last entry may end at 1; else a
    stage at the run's `image_size`, with all teachers, follows."""


@dataclass
class PartitionConfig(SizesConfig):
    """A part of every step's images, at sizes and with teachers of its own; see `dune_fast.engine.stages`."""

    images: int = 0
    """Of every step, over all ranks; the partitions' together are `train.global_batch`."""
    teacher_zoom: list[float] = field(default_factory=list)
    """In place of `data.teacher_zoom`, for its images."""
    share: float = 0.0
    """What its loss counts in the step's, over all partitions' together, and its share of the ranks; 0 in all: as much
    as the others."""


class Staged(Protocol):
    """What is read here of a run's configuration."""

    image_size: int
    steps: int
    progressive: list[ProgressiveConfig]
    stage_restarts: list[str]
    partitions: list[PartitionConfig]
    partition_by: str
    teachers: Mapping[str, TeacherConfig]
    objective: ObjectiveConfig
    standardization: StandardizationConfig
    start: StartConfig
    cache: CacheConfig
    data: DataConfig
    train: TrainConfig


def image_sizes(cfg: Staged) -> dict[str, int]:
    """field -> side of the student's training images that it names, in pixels."""
    found = {"image_size": cfg.image_size}
    entries: list[tuple[str, SizesConfig]] = [(f"progressive[{i}]", entry) for i, entry in enumerate(cfg.progressive)]
    for where, entry in [*entries, *((f"partitions[{i}]", part) for i, part in enumerate(cfg.partitions))]:
        several = {f"{where}.image_sizes[{j}]": size for j, size in enumerate(entry.image_sizes)}
        found |= several or {f"{where}.image_size": entry.image_size}
    return found


def teacher_zooms(cfg: Staged) -> list[list[float]]:
    """The ranges of teachers' zoom in a run, of each partition."""
    common = list(cfg.data.teacher_zoom)
    return [list(part.teacher_zoom) or common for part in cfg.partitions] or [common]


def moves_teachers(cfg: Staged) -> bool:
    """Whether a teacher may see another part of the image than the student."""
    zoomed = any(zoom != [1.0, 1.0] for zoom in teacher_zooms(cfg))
    return cfg.data.teacher_views and (zoomed or cfg.data.teacher_shift > 0)


def check_stages(cfg: Staged) -> None:
    """ConfigError if stages or partitions make no sense."""
    _check_progressive(cfg)
    _check_partitions(cfg)


def _check_progressive(cfg: Staged) -> None:
    """ConfigError unless borders rise, every stage has a step, sizes are allowed, and teachers are known."""
    border, size, count = 0, 0, len(cfg.progressive)
    for i, entry in enumerate(cfg.progressive):
        end = round(entry.until * cfg.steps)
        largest = max(entry.image_sizes, default=entry.image_size)
        last = i == count - 1 and entry.until == 1 and largest == cfg.image_size
        if not 0 < entry.until <= 1 or end <= border or (end >= cfg.steps and not last):
            raise ConfigError(
                f"progressive[{i}].until={entry.until:g} ends its stage at step {end} of {cfg.steps}, after one that "
                f"ends at {border}; it is a share of the steps, between 0 and 1, that leaves every stage a step; "
                f"1 ends the run, in a last entry whose largest size is image_size={cfg.image_size}"
            )
        _check_teachers(cfg, f"progressive[{i}].teachers", entry.teachers)
        _check_sizes(cfg, f"progressive[{i}]", entry)
        plain = not entry.image_sizes and not entry.teachers and not last
        if plain and not size < entry.image_size < cfg.image_size:
            raise ConfigError(
                f"progressive[{i}].image_size={entry.image_size}; sizes rise, from above {size} to below "
                f"image_size={cfg.image_size}, which comes last"
            )
        border, size = end, largest
    if unknown := [name for name in cfg.stage_restarts if name not in RESTARTS]:
        raise ConfigError(f"stage_restarts has {unknown[0]!r}; choose from {', '.join(RESTARTS)}")
    stay = {cfg.standardization.of(token) for token in ("cls", "patch")} & set(ESTIMATED)
    if "statistics" in cfg.stage_restarts and stay:
        raise ConfigError(
            f"stage_restarts has statistics, but those of standardization.convention={min(stay)} are known before the "
            "first step and stay; leave it out, or choose dune, unic or phi_s_running"
        )
    first = round(cfg.progressive[0].until * cfg.steps) * cfg.train.global_batch if cfg.progressive else None
    varies = any(entry.image_sizes for entry in cfg.progressive[:1])
    if cfg.start.wanted and first is not None and (cfg.start.images > first or varies):
        raise ConfigError(
            f"start.images={cfg.start.images}, but progressive[0] ends after {first} images"
            f"{' of several sizes' if varies else ''}: the start takes images of one size; lower start.images or raise "
            "progressive[0].until"
        )


def _check_sizes(cfg: Staged, where: str, entry: SizesConfig) -> None:
    size, several, weights = entry.image_size, entry.image_sizes, entry.weights
    if several and size:
        raise ConfigError(f"{where} has image_size={size} and image_sizes={list(several)}; give one of them")
    if weights and (len(weights) != len(several) or min(weights) < 0 or not sum(weights)):
        raise ConfigError(
            f"{where}.weights={list(weights)}; give one for each of image_sizes={list(several)}, none negative, or "
            "none at all, for sizes that take turns"
        )
    if not 0 < (largest := max(several, default=size)) <= cfg.image_size or min(several, default=1) < 1:
        raise ConfigError(
            f"{where} has images of {largest} px; give sizes up to image_size={cfg.image_size}, the run's largest"
        )


def _check_teachers(cfg: Staged, where: str, names: Sequence[str]) -> None:
    """That they are teachers of the run, and that the loss needs no others."""
    if unknown := [name for name in names if name not in cfg.teachers]:
        known = ", ".join(sorted(cfg.teachers))
        raise ConfigError(f"{where} has {unknown[0]!r}, which is no teacher of this run; there are: {known}")
    objective, some = cfg.objective, names and set(names) != set(cfg.teachers)
    if some and objective.teachers_per_step:
        raise ConfigError(
            f"{where} leaves teachers out, and objective.teachers_per_step={objective.teachers_per_step} draws among "
            "all of them: steps would be left without any; choose one of the two"
        )
    if some and (objective.presample or (objective.sharing == "full" and objective.drop_probability)):
        option = "presample=true" if objective.presample else f"drop_probability={objective.drop_probability:g}"
        raise ConfigError(
            f"{where} leaves teachers out, and objective.{option} drops some at random: images would be left without "
            "any; set objective.drop_probability=0 and presample=false"
        )
    if some and cfg.cache.folder:
        raise ConfigError(f"{where} leaves teachers out, but a cache ({cfg.cache.folder}) has all; leave one out")


def _check_zoom(cfg: Staged, where: str, zoom: Sequence[float]) -> None:
    if zoom and (len(zoom) != 2 or not 0 < zoom[0] <= zoom[1]):
        raise ConfigError(f"{where}={list(zoom)}; give [smallest, largest], above 0, or none for data.teacher_zoom")
    if zoom and not cfg.data.teacher_views:
        raise ConfigError(f"{where}={list(zoom)} with data.teacher_views=false: teachers see the student's crops; set "
                          "data.teacher_views=true, or leave it out")  # fmt: skip


def _check_partitions(cfg: Staged) -> None:
    """ConfigError unless partitions share out the batch, and go with the rest of the run."""
    if cfg.partition_by not in MODES:
        raise ConfigError(f"partition_by={cfg.partition_by!r}; choose one of {', '.join(MODES)}")
    if not cfg.partitions:
        return
    for i, part in enumerate(cfg.partitions):
        _check_teachers(cfg, f"partitions[{i}].teachers", part.teachers)
        _check_sizes(cfg, f"partitions[{i}]", part)
        _check_zoom(cfg, f"partitions[{i}].teacher_zoom", part.teacher_zoom)
        if part.images < 1:
            raise ConfigError(f"partitions[{i}].images={part.images}; give at least 1")
    if (total := sum(part.images for part in cfg.partitions)) != cfg.train.global_batch:
        raise ConfigError(
            f"partitions have {total} images together, but train.global_batch={cfg.train.global_batch}: make them equal"
        )
    given = [part.share for part in cfg.partitions]
    if any(given) and (min(given) <= 0 or abs(sum(given) - 1) > 1e-6):
        raise ConfigError(f"partitions have shares of {given}: give positive ones that add up to 1, or none at all")
    seen = {name for part in cfg.partitions for name in part.teachers or cfg.teachers}
    if missing := [name for name in cfg.teachers if name not in seen]:
        raise ConfigError(f"teacher {missing[0]!r} is in no partition: add it to partitions[i].teachers, or drop it")
    beside = {
        "progressive": cfg.progressive, "cache.folder": cfg.cache.folder, "start": cfg.start.wanted,
        "train.accumulation=0": cfg.train.accumulation == 0, "data.views": cfg.data.views,
    }  # fmt: skip
    if clash := [name for name, value in beside.items() if value]:
        raise ConfigError(f"partitions do not go with {', '.join(clash)}; leave one of them out")
