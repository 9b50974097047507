"""The hours spent from a cache: teachers once over fixed views of every image, then the student alone."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from dune_fast.engine.cache_shard import bytes_per_view
from dune_fast.engine.config import RunConfig, compose_config
from dune_fast.planner.budget import Alternative, Machine, image_flops, longest, mildest, step_seconds, too_small
from dune_fast.planner.numbers import ESTIMATED, Number

PASSES = 4
"""Over every view, at least: fewer hardly repay the build."""
ECONOMIES: tuple[tuple[str, ...], ...] = (
    (),
    ("cache.components=256",),
    ("cache.components=256", "cache.patch_share=0.5"),
    ("cache.components=128", "cache.patch_share=0.25"),
)
"""What is tried for a disk that does not hold a view of every image in int8: the mildest first."""
FOLDER = "cache"


def cached(
    cfg: RunConfig, experiment: str, overrides: Sequence[str], machine: Machine, hours: float | None,
    disk: float | None, image_kb: float | None, images: int, quality: str,
) -> Alternative:  # fmt: skip
    """The most views that the disk holds and the hours allow, with both commands; where that is less than a view of
    every image in any of `ECONOMIES`, how many views it is in int8, and why there is no command.

    Args: see `alternatives.alternatives`; `quality` is the alternative's.
    """
    about = "teachers once over fixed views, their features from disk"
    datasets = [d for d in cfg.data.datasets.values() if not d.evaluation_only]
    images = images or (0 if any(not d.expected_train for d in datasets) else sum(d.expected_train for d in datasets))
    small: Alternative | None = None
    for economy in ECONOMIES:
        own = [*overrides, "data.views=1", f"cache.folder={FOLDER}", *economy]
        try:
            changed = compose_config([f"experiment={experiment}", *own])
            found = _affordable(cfg, changed, experiment, machine, hours, disk)
        except ValueError as error:
            return small or Alternative("cached", about, quality, why=str(error))
        views, numbers = found
        if disk is None:
            why = "give --disk, e.g. 2TB, to plan it"
            return Alternative("cached", about, quality, numbers=numbers, why=why)
        if not images:
            why = "give --images, how many your datasets have, for its commands"
            return Alternative("cached", about, quality, numbers=numbers, why=why)
        if views >= images:
            own[len(overrides)] = f"data.views={views // images}"
            try:
                return _planned(
                    cfg, experiment, own, machine, hours, image_kb, images * (views // images), numbers, about, quality
                )
            except ValueError as error:
                return Alternative("cached", about, quality, numbers=numbers, why=str(error))
        why = (
            f"disk and hours suffice for {views:,} views in int8, fewer than the {images:,} images: train on a part of "
            "them (a text list of paths as root), whose number --images takes"
        )
        small = small or Alternative("cached", about, quality, numbers=numbers, why=why)
    assert small is not None
    return small


def _affordable(
    live: RunConfig, changed: RunConfig, experiment: str, machine: Machine, hours: float | None, disk: float | None
) -> tuple[int, dict[str, Number]]:
    """Views that the disk holds and the hours allow to build and to see `PASSES` times, and their numbers."""
    size, batch = bytes_per_view(changed), changed.train.global_batch
    numbers = {"disk a view": Number(size / 1e6, f"MB in {changed.cache.format}", ESTIMATED)}
    lies = mildest(changed, machine.gpus, machine.memory) if batch % machine.gpus == 0 else None
    if lies is None:
        raise too_small(changed, experiment, machine)
    trained = step_seconds(lies[0], machine) / batch
    built = image_flops(live)[1] / _rate(machine)
    most = changed.steps * batch / PASSES if hours is None else hours * 3600 / (built + PASSES * trained)
    views = int(min(most, math.inf if disk is None else disk / size))
    return views, numbers | {
        "views": Number(views, "views on disk", ESTIMATED), "disk": Number(views * size / 1e9, "GB", ESTIMATED),
    }  # fmt: skip


def _rate(machine: Machine) -> float:
    """FLOP/s of all GPUs."""
    return machine.gpus * machine.tflops.value * 1e12


def _planned(
    live: RunConfig, experiment: str, own: list[str], machine: Machine, hours: float | None, image_kb: float | None,
    views: int, numbers: dict[str, Number], about: str, quality: str,
) -> Alternative:  # fmt: skip
    """The run that reads so many views, and the command that builds them."""
    changed = compose_config([f"experiment={experiment}", *own])
    building = views * image_flops(live)[1] / _rate(machine) / 3600
    schedule = longest(changed, experiment, own, machine, None if hours is None else hours - building, image_kb)
    size, rate = bytes_per_view(changed), schedule.numbers["speed"].value
    numbers = numbers | schedule.numbers | {
        "views": Number(views, "views on disk", ESTIMATED),
        "disk": Number(views * size / 1e9, "GB", ESTIMATED),
        "building": Number(building, "h", ESTIMATED),
        "passes": Number(schedule.images / views, "times every view", ESTIMATED),
        "features": Number(rate * size / 1e6, "MB/s from disk", ESTIMATED),
        "hours": Number(building + schedule.numbers["hours"].value, "h", ESTIMATED),
    }  # fmt: skip
    if machine.table is not None:
        watts = machine.gpus * machine.table.watts
        numbers["energy"] = Number(numbers["hours"].value * watts / 1e3, "kWh at most", ESTIMATED)
    build = f"dune-fast cache build {shlex.join([f'experiment={experiment}', *own])}"
    if machine.gpus > 1:  # a process a GPU
        n = machine.gpus
        build = f"for i in $(seq {n}); do CUDA_VISIBLE_DEVICES=$((i-1)) {build} --part $i/{n} & done; wait"
    return Alternative("cached", about, quality, schedule, numbers, schedule.command, build=build)
