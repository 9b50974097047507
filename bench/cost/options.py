"""The ways to spend less, as overrides of the proof's training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """Whether it reads its teachers' features from a cache."""
    few: bool = False
    """Whether it trains on `FEW` images, which come five times and more."""
    views: int = 1
    """Fixed views of an image, where it is cached."""


ONE_TEACHER = ("objective.presample=true", "objective.drop_probability=1")
HALF_SCALE = ("teachers.semantic.scale=0.5", "teachers.saliency.scale=0.5")
THREE_QUARTERS = ("teachers.semantic.scale=0.75", "teachers.saliency.scale=0.75")
ROUTED = ("objective.sharing=none", "objective.route_by_dataset=true")
NO_DROPPING = "objective.drop_probability=0"
FEW = {"objects": ("00[0-1]*.jpg", 200), "natural": ("000[0-4]*.jpg", 50), "interior": ("000[0-4]*.jpg", 50)}
"""Dataset -> pattern of its first images' names, and how many they are."""
FEW_WORDS = tuple(f"data.datasets.{name}.pattern={pattern}" for name, (pattern, _) in FEW.items())


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
        # more updates on as many images
        Option("batches of four, no dropping, a third of the images", (NO_DROPPING, "train.global_batch=4"), 160),
        Option("cached, batches of eight, no dropping", (NO_DROPPING, "train.global_batch=8"), 156, cached=True),
        # the rows above see no image twice
        Option("few images", few=True),
        Option("few images, cached", few=True, cached=True),
        Option("few images, cached, four views", few=True, cached=True, views=4),
    )  # fmt: skip


CACHES = "DUNE_FAST_CACHES"
"""Environment variable: the folder of the caches, one a seed, because a seed has its own views."""


def _cache(option: Option, seed: int) -> str:
    return f"seed{seed}" + (f"_few{option.views}" if option.few else "")


def cost_cells(rows: Sequence[Option], seeds: int = SEEDS) -> list[Cell]:
    """Cells of the proof, seed by seed."""
    cells = []
    for seed in range(seeds):
        for option in rows:
            cache = (f"cache.folder=${{oc.env:{CACHES}}}/{_cache(option, seed)}", f"data.views={option.views}")
            data = FEW_WORDS if option.few else ()
            words = (*option.overrides, *data, *(cache if option.cached else ()))
            cells.append(Cell(option.row, "student", seed, "cost", option.steps, words))
    return cells


def live_steps(settings: Settings) -> int:
    """Of the live run: those of the proof's shorter schedule."""
    return settings.ablation_steps


def smoke_options(settings: Settings) -> tuple[Option, ...]:
    """The same, shorter, on images of 56 px."""
    steps = live_steps(settings)
    return tuple(replace(o, steps=max(2, o.steps * steps // STEPS)) for o in options(small=28))


def cache_words(cell: Cell) -> list[str]:
    """What a cell's build of its cache is told, of all its overrides; empty if it reads none."""
    words = [word for word in cell.overrides if word.startswith(("cache.", "data."))]
    return words if any(word.startswith("cache.folder=") for word in words) else []


def views(cell: Cell, settings: Settings) -> int:
    """Of all training images, in the cell's cache; of one view each where it has none."""
    found = {"objects": settings.scenes.objects, "natural": settings.scenes.photographs}
    found["interior"] = found["natural"]
    if set(FEW_WORDS) <= set(cell.overrides):
        found = {name: min(count, FEW[name][1]) for name, count in found.items()}
    each = [int(word.partition("=")[2]) for word in cell.overrides if word.startswith("data.views=")]
    return sum(found.values()) * (each[0] if each else 1)
