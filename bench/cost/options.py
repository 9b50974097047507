"""The ways to spend less, as overrides of the proof's training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.proof.cells import Cell, Settings

LIVE, DRAWN = "live", "live, from drawn weights"
"""The row that the others are compared with, and the published way of starting."""
STEPS = 120
"""Of the live run."""
SEEDS = 3


@dataclass(frozen=True)
class Option:
    """One row: how a run departs from the live one."""

    row: str
    overrides: tuple[str, ...] = ()
    steps: int = STEPS
    cached: bool = False
    """Whether it reads its teachers' features from a cache of one view an image."""


ONE_TEACHER = ("objective.presample=true", "objective.drop_probability=1")
HALF_SCALE = ("teachers.semantic.scale=0.5", "teachers.saliency.scale=0.5")
THREE_QUARTERS = ("teachers.semantic.scale=0.75", "teachers.saliency.scale=0.75")
ROUTED = ("objective.sharing=none", "objective.route_by_dataset=true")
NO_DROPPING = "objective.drop_probability=0"
HALF_BATCH = ("train.global_batch=8", "optimizer.lr_per_256=0.0064")


def options(small: int = 56) -> tuple[Option, ...]:
    """The rows; `small` is the side in pixels of the images that `progressive` begins with, half of the run's."""
    small_first = f"progressive=[{{until: 0.5, image_size: {small}}}]"
    small_long = f"progressive=[{{until: 0.8, image_size: {small}}}]"
    return (
        Option(DRAWN, ("student_weights=",)),
        Option(LIVE),
        Option("cached", cached=True),
        Option("routed", ROUTED),
        Option("pre-sampled", ("objective.presample=true",)),
        Option("progressive", (small_first,)),
        Option("a third of the steps", steps=40),
        Option("progressive to the end, one teacher an image", (small_long, *ONE_TEACHER)),
        Option("cached, two thirds of the steps", steps=78, cached=True),
        Option("progressive, at the live cost", (small_first,), 188),
        Option("pre-sampled, at the live cost", ("objective.presample=true",), 138),
        Option("routed, at the live cost", ROUTED, 148),
        Option("progressive to the end", (small_long,)),
        Option("half scale", HALF_SCALE),
        Option("half scale, at the live cost", HALF_SCALE, 188),
        Option("three quarters scale", THREE_QUARTERS),
        Option("half of the patches", ("objective.patch_share=0.5",)),
        Option("average of the weights", ("train.ema=0.95",)),
        # more updates on as many images; the rate of a step stays
        Option("a third of the images, half the batch, no dropping", (*HALF_BATCH, NO_DROPPING), 80),
        Option("cached, two thirds of the images, half the batch, no dropping", (*HALF_BATCH, NO_DROPPING), 156, True),
        Option("cached, two thirds of the images, a quarter of the batch, no dropping",
               ("train.global_batch=4", "optimizer.lr_per_256=0.0128", NO_DROPPING), 312, True),
    )  # fmt: skip


CACHES = "DUNE_FAST_CACHES"
"""Environment variable: the folder of the caches, one a seed, because a seed has its own views."""


def cost_cells(rows: Sequence[Option], seeds: int = SEEDS) -> list[Cell]:
    """Cells of the proof, seed by seed."""
    cells = []
    for seed in range(seeds):
        for option in rows:
            cache = (f"cache.folder=${{oc.env:{CACHES}}}/seed{seed}", "data.views=1") if option.cached else ()
            cells.append(Cell(option.row, "student", seed, "cost", option.steps, (*option.overrides, *cache)))
    return cells


def live_steps(settings: Settings) -> int:
    """Of the live run: those of the proof's shorter schedule."""
    return settings.ablation_steps


def smoke_options(settings: Settings) -> tuple[Option, ...]:
    """The same, shorter, on images of 56 px."""
    steps = live_steps(settings)
    return tuple(Option(o.row, o.overrides, max(2, o.steps * steps // STEPS), o.cached) for o in options(small=28))


def cache_words(cell: Cell) -> list[str]:
    """What a cell's build of its cache is told, of all its overrides; empty if it reads none."""
    words = [word for word in cell.overrides if word.startswith(("cache.", "data.views"))]
    return words if any(word.startswith("cache.folder=") for word in words) else []
