"""The ways to spend less, as overrides of the proof's training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.proof.cells import Cell

STEPS = 120
"""Of the live run, which the others are compared with."""
SEEDS = 3


@dataclass(frozen=True)
class Option:
    """One row: how a run departs from the live one."""

    row: str
    overrides: tuple[str, ...] = ()
    steps: int = STEPS
    cached: bool = False
    """Whether it reads its teachers' features from a cache of one view an image."""


SMALL_FIRST = "progressive=[{until: 0.5, image_size: 56}]"
SMALL_LONG = "progressive=[{until: 0.8, image_size: 56}]"
ONE_TEACHER = ("objective.presample=true", "objective.drop_probability=1")
HALF_SCALE = ("teachers.semantic.scale=0.5", "teachers.saliency.scale=0.5")
THREE_QUARTERS = ("teachers.semantic.scale=0.75", "teachers.saliency.scale=0.75")
ROUTED = ("objective.sharing=none", "objective.route_by_dataset=true")

OPTIONS = (
    Option("live, from drawn weights", ("student_weights=",)),
    Option("live"),
    Option("cached", cached=True),
    Option("routed", ROUTED),
    Option("pre-sampled", ("objective.presample=true",)),
    Option("progressive", (SMALL_FIRST,)),
    Option("a third of the steps", steps=40),
    Option("progressive to the end, one teacher an image", (SMALL_LONG, *ONE_TEACHER)),
    Option("cached, two thirds of the steps", steps=78, cached=True),
    Option("progressive, at the live cost", (SMALL_FIRST,), 188),
    Option("pre-sampled, at the live cost", ("objective.presample=true",), 138),
    Option("routed, at the live cost", ROUTED, 148),
    Option("progressive to the end", (SMALL_LONG,)),
    Option("half scale", HALF_SCALE),
    Option("half scale, at the live cost", HALF_SCALE, 188),
    Option("three quarters scale", THREE_QUARTERS),
    Option("half of the patches", ("objective.patch_share=0.5",)),
    Option("average of the weights", ("train.ema=0.95",)),
)


CACHES = "DUNE_FAST_CACHES"
"""Environment variable: the folder of the caches, one a seed, because a seed has its own views."""


def cost_cells(options: Sequence[Option], seeds: int = SEEDS) -> list[Cell]:
    """Cells of the proof, seed by seed."""
    cells = []
    for seed in range(seeds):
        for option in options:
            cache = (f"cache.folder=${{oc.env:{CACHES}}}/seed{seed}", "data.views=1") if option.cached else ()
            cells.append(Cell(option.row, "student", seed, "cost", option.steps, (*option.overrides, *cache)))
    return cells
