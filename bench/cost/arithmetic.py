"""Floating-point operations of a cell's run, as `dune_fast.engine.flops` counts them, and of the build of its cache.

The first weights (`start`), which all rows but one share, and the evaluation are not counted.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from bench.cost.options import cache_words, live_steps, views
from bench.proof.cells import Cell, Settings
from dune_fast.engine.config import compose_config
from dune_fast.engine.flops import run_flops

_CACHED = ("cache.folder=cache", "data.views=1")


@dataclass(frozen=True)
class Arithmetic:
    """Of one run, in operations."""

    teachers: int
    """Their forward passes within the run."""
    run: int
    """Teachers, student and projectors, the backward passes included."""
    build: int = 0
    """The teachers' forward passes on every view of the cache; 0 without one."""
    at_dune: float = 1.0
    """The same options in `dune_336`, whose teachers are larger beside the student: all operations of the steps, those
    without the options being 1."""

    @property
    def first(self) -> int:
        """Of a run that has to build its cache first."""
        return self.run + self.build


def arithmetic(cell: Cell, settings: Settings) -> Arithmetic:
    """Of a cell. ValueError if the operations of a teacher are not known."""
    cached = cache_words(cell)
    own = [word for word in cell.overrides if word not in cached]
    start = (f"experiment={settings.experiment}", "start.teacher=", *settings.overrides)
    counted = _count(*start, f"train.steps={cell.steps}", *own, *(_CACHED if cached else ()))
    plain, dune = _count(*start), _count("experiment=dune_336")
    images = cell.steps * counted.batch
    build = views(cell, settings) * plain.teachers if cached else 0
    at_dune = _count("experiment=dune_336", *_dune_words(cell)).every / dune.every
    at_dune *= images / (live_steps(settings) * plain.batch)
    return Arithmetic(images * counted.teachers, images * counted.every, build, at_dune)


def _dune_words(cell: Cell) -> list[str]:
    """A cell's options as overrides of `dune_336`: a smaller scale is that of all its teachers, which are all ViTs."""
    words = list(_CACHED) if cache_words(cell) else []
    for word in cell.overrides:
        name, _, value = word.partition("=")
        if name == "progressive":
            words.append(re.sub(r"image_size: \d+", "image_size: 168", word))
        elif name.endswith(".scale"):
            words += [f"teachers.{teacher}.scale={value}" for teacher in _dune_teachers()]
        elif name.startswith("objective."):
            words.append(word)
    return list(dict.fromkeys(words))


@functools.cache
def _dune_teachers() -> list[str]:
    return list(compose_config(["experiment=dune_336"]).teachers)


class _Count(NamedTuple):
    """Of an image in a step."""

    teachers: int
    every: int
    batch: int
    """Images of a step."""


@functools.cache
def _count(*words: str) -> _Count:
    cfg = compose_config(list(words))
    flops = run_flops(cfg)
    if flops.all_teachers is None or flops.training is None:
        raise ValueError(f"the operations of a teacher are not known: {flops.teachers}")
    return _Count(flops.all_teachers, flops.training, cfg.train.global_batch)


def pays_off_after(cached: Arithmetic, live: Arithmetic) -> float:
    """Runs after which build and cached runs have cost the teachers less than as many live runs."""
    return cached.build / (live.teachers - cached.teachers)


def arithmetic_of_rows(cells: Iterable[Cell], settings: Settings) -> dict[str, Arithmetic]:
    """Row -> its arithmetic, which no seed changes."""
    rows = {cell.row: cell for cell in cells}
    return {row: arithmetic(cell, settings) for row, cell in rows.items()}
