"""The longest schedule of a recipe within some hours on some GPUs."""

from __future__ import annotations

import copy
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from dune_fast.engine.config import RunConfig
from dune_fast.engine.flops import TRAINED, run_flops
from dune_fast.engine.memory import Fit, fit
from dune_fast.planner.beside import beside
from dune_fast.planner.gpus import EFFICIENCY, FP8_TEACHER, GPU, LINK_SHARE, PCIE_GB_S
from dune_fast.planner.numbers import COUNTED, ESTIMATED, Number
from dune_fast.planner.scale import exposed_seconds, sent_bytes

IMAGE_KB = 110.0
"""Mean size of an image file, where none is given: ImageNet-1K's training part, 138 GB of 1,281,167 files."""
DECODE_MS = 13.9
"""CPU time to read and decode one image to 336 px from 512 px: bench/results/cpu/data.json, on another machine."""

REMEDIES: tuple[tuple[str, ...], ...] = (
    (),
    ("train.activation_checkpointing=true",),
    ("deepspeed=zero2",),
    ("train.activation_checkpointing=true", "deepspeed=zero2"),
    ("train.activation_checkpointing=true", "deepspeed=zero3"),
)
"""What is tried for a device that is too small, beside more parts of the batch: the mildest first."""


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind in one computer."""

    name: str
    gpus: int
    memory: int
    """Bytes of each."""
    tflops: Number
    """What one reaches in a training step."""
    table: GPU | None = None
    """Its line in the table of GPUs."""

    @property
    def how(self) -> str:
        """How what follows from the rate is known."""
        return ESTIMATED if self.tflops.how == ESTIMATED else f"{ESTIMATED} from the {self.tflops.how} rate"


def of_table(name: str, gpu: GPU, gpus: int) -> Machine:
    """GPUs of the table, at the assumed share of their rate."""
    rate = Number(EFFICIENCY * gpu.bf16, "TFLOP/s", ESTIMATED)
    return Machine(name, gpus, gpu.memory_gib * 2**30, rate, gpu)


def image_flops(cfg: RunConfig) -> tuple[float, float]:
    """Of one image in a training step: what is trained, forward and backward; teachers, an FP8 one by its time."""
    flops = run_flops(cfg)
    if flops.all_teachers is None:
        unknown = ", ".join(name for name, count in flops.teachers.items() if count is None)
        raise ValueError(f"the arithmetic of {unknown} is not known without weights: there are no hours to plan")
    again = 1 if cfg.train.activation_checkpointing else 0  # the encoder's forward pass
    trained = (TRAINED + again) * flops.student + TRAINED * flops.projectors
    factors = {name: FP8_TEACHER if t.precision == "fp8" else 1.0 for name, t in cfg.teachers.items()}
    return trained, sum(factors[name] * (count or 0) for name, count in flops.teachers.items())


def mildest(cfg: RunConfig, count: int, available: int) -> tuple[RunConfig, Fit, tuple[str, ...]] | None:
    """The mildest change with which a run fits `count` devices of `available` bytes: the changed configuration, how it
    lies in memory, and the overrides beside train.accumulation. None if nothing is enough."""
    for overrides in REMEDIES:
        changed = copy.deepcopy(cfg)
        changed.train.accumulation = 0
        for override in overrides:
            if override.startswith("deepspeed="):
                changed.deepspeed.zero_stage = int(override[-1])
            else:
                changed.train.activation_checkpointing = True
        found = fit(changed, count, available)
        if found.fits:
            changed.train.accumulation = found.parts
            return changed, found, overrides
    return None


@dataclass(frozen=True)
class Schedule:
    """What a machine can do of a recipe."""

    experiment: str
    machine: Machine
    steps: int
    images: int
    full: bool
    """Whether that is all of the recipe."""
    command: str
    numbers: dict[str, Number]
    fit: Fit


@dataclass(frozen=True)
class Alternative:
    """One way to spend the hours."""

    name: str
    about: str
    quality: str
    schedule: Schedule | None = None
    numbers: dict[str, Number] = field(default_factory=dict)
    command: str = ""
    """Empty where there is none, and `why` says why."""
    why: str = ""
    build: str = ""
    """What is to be run before the command."""


def too_small(cfg: RunConfig, experiment: str, machine: Machine) -> ValueError:
    """For a machine on which nothing fits."""
    return ValueError(
        f"{experiment} does not fit {machine.gpus} x {machine.name} with {machine.memory / 2**30:.0f} GiB: no number "
        "of parts, activation checkpointing or ZeRO stage is enough; take more GPUs, a smaller student or image_size, "
        "or teachers in precision=fp8"
    )


def step_seconds(cfg: RunConfig, machine: Machine) -> float:
    """Of one step: compute, and the part of the gradients' transfer that nothing hides. `cfg` has its accumulation."""
    trained, frozen = image_flops(cfg)
    images, rate = cfg.train.global_batch / machine.gpus, machine.tflops.value * 1e12
    compute = images * (trained + frozen) / rate
    link = (machine.table.link if machine.table else PCIE_GB_S) * LINK_SHARE * 1e9
    backward = images * trained * 2 / 3 / rate / max(1, cfg.train.accumulation)
    return compute + exposed_seconds(cfg, sent_bytes(cfg, machine.gpus), link, backward)


def longest(
    cfg: RunConfig,
    experiment: str,
    overrides: Sequence[str],
    machine: Machine,
    hours: float | None,
    image_kb: float | None = None,
) -> Schedule:
    """The longest schedule, at most the recipe's own; ValueError if the machine is too small or the time too short.

    Args:
        cfg: the recipe's, with `overrides`, which belong into the command.
        hours: None for the whole recipe.
        image_kb: mean size of an image file.
    """
    batch = cfg.train.global_batch
    if batch % machine.gpus:
        raise ValueError(
            f"{experiment} has {batch} images a step, which {machine.gpus} GPUs cannot share evenly; give "
            f"train.global_batch={-(-batch // machine.gpus) * machine.gpus}"
        )
    found = mildest(cfg, machine.gpus, machine.memory)
    if found is None:
        raise too_small(cfg, experiment, machine)
    cfg, lies, remedies = found
    seconds, other = step_seconds(cfg, machine), beside(cfg, machine.gpus, machine.gpus * machine.tflops.value * 1e12)
    left = math.inf if hours is None else (hours * 3600 - other.once) / (seconds + other.step)
    steps = int(min(cfg.steps, left)) // 2 * 2
    if steps < 2:
        raise ValueError(
            f"{hours:g} hours are not enough for 2 steps of {experiment}, one of which takes about {seconds:.2g} s, "
            f"and {other.once / 60:.2g} minutes beside them"
        )
    besides = (other.once + steps * other.step) / 3600
    how, images, taken = machine.how, steps * batch, steps * seconds / 3600 + besides
    rate, kb = batch / seconds, IMAGE_KB if image_kb is None else image_kb
    length_how = COUNTED if steps == cfg.steps else how
    numbers = {
        "images": Number(images, "images", length_how),
        "steps": Number(steps, f"steps of {batch:,}", length_how),
        "share of the recipe": Number(100 * steps / cfg.steps, "%", length_how),
        "micro-batch": Number(lies.images // lies.parts, "images a GPU", ESTIMATED),
        "accumulation": Number(lies.parts, "parts", ESTIMATED),
        "memory": Number(lies.needed / 2**30, f"of {lies.available / 2**30:.0f} GiB a GPU", ESTIMATED),
        "statistics": Number(batch // lies.parts, "images at a time standardize the teachers", ESTIMATED),
        "speed": Number(rate, "images/s", how),
        "storage": Number(rate * kb / 1e3, "MB/s", how if image_kb is not None else ESTIMATED),
        "decoding": Number(rate * DECODE_MS / 1e3, "CPU cores", ESTIMATED),
        "beside the steps": Number(besides, "h for start-up, evaluations and checkpoints", ESTIMATED),
        "hours": Number(taken, "h", how),
    }
    if machine.table is not None:
        numbers["energy"] = Number(taken * machine.gpus * machine.table.watts / 1e3, "kWh at most", ESTIMATED)
    length = f"train.steps={steps}" if cfg.train.steps is not None else f"train.images={images}"
    own = [*overrides, *([length] if steps < cfg.steps else []), f"train.accumulation={lies.parts}", *remedies]
    command = f"dune-fast distill -n {machine.gpus} experiment={experiment} {shlex.join(own)}"
    return Schedule(experiment, machine, steps, images, steps == cfg.steps, command, numbers, lies)
