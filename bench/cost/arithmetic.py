"""Floating-point operations of a cell's run, as `dune_fast.engine.flops` counts them, and of the build of its cache.

The first weights (`start`), which all rows but one share, and the evaluation are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.cost.options import cache_words
from bench.proof.cells import Cell, Settings
from dune_fast.engine.config import RunConfig, compose_config
from dune_fast.engine.flops import run_flops


@dataclass(frozen=True)
class Arithmetic:
    """Of one run, in operations."""

    teachers: int
    """Their forward passes within the run."""
    run: int
    """Teachers, student and projectors, the backward passes included."""
    build: int = 0
    """The teachers' forward passes on every view of the cache; 0 without one."""

    @property
    def first(self) -> int:
        """Of a run that has to build its cache first."""
        return self.run + self.build


def arithmetic(cell: Cell, settings: Settings) -> Arithmetic:
    """Of a cell. ValueError if the operations of a teacher are not known."""
    cached = cache_words(cell)
    words = [word for word in cell.overrides if word not in cached]
    cfg = _compose(settings, cell, [*words, *(["cache.folder=cache", "data.views=1"] if cached else [])])
    images = cell.steps * cfg.train.global_batch
    teachers, run = _known(cfg)
    if not cached:
        return Arithmetic(images * teachers, images * run)
    per_view, _ = _known(_compose(settings, cell, []))
    return Arithmetic(images * teachers, images * run, views(settings) * per_view)


def views(settings: Settings) -> int:
    """Of a cache of one view of every training image."""
    return settings.scenes.objects + 2 * settings.scenes.photographs


def pays_off_after(cached: Arithmetic, live: Arithmetic) -> float:
    """Runs after which build and cached runs have cost the teachers less than as many live runs."""
    return cached.build / (live.teachers - cached.teachers)


def arithmetic_of_rows(cells: Iterable[Cell], settings: Settings) -> dict[str, Arithmetic]:
    """Row -> its arithmetic, which no seed changes."""
    rows = {cell.row: cell for cell in cells}
    return {row: arithmetic(cell, settings) for row, cell in rows.items()}


def _compose(settings: Settings, cell: Cell, words: list[str]) -> RunConfig:
    run = [f"experiment={settings.experiment}", f"train.steps={cell.steps}", "start.teacher=", *settings.overrides]
    return compose_config([*run, *words])


def _known(cfg: RunConfig) -> tuple[int, int]:
    """(teachers, all) of an image in a step."""
    flops = run_flops(cfg)
    if flops.all_teachers is None or flops.training is None:
        raise ValueError(f"the operations of a teacher are not known: {flops.teachers}")
    return flops.all_teachers, flops.training
