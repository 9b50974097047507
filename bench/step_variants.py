"""The ways to run one distillation step that `python -m bench.step` compares, from the same weights and images."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bench.eager_step import EagerStep, Timer
from dune_fast.distill.objective import ownership
from dune_fast.distill.standardization import Features, TeacherStatistics
from dune_fast.distill.step import DistillationStep
from dune_fast.engine.config import RunConfig
from dune_fast.engine.deepspeed_engine import Engine
from dune_fast.engine.schedules import ema_momenta, learning_rates, scaled_learning_rate
from dune_fast.nn.student import build_student
from kernels import philox
from teachers.ensemble import TeacherEnsemble

GROUPS = ("generic", "3d", "human")
"""Of a synthetic batch: a third of the images each, in turns."""
POOL = 4
"""Synthetic batches that take turns, so that no step finds its images in a cache."""


class SyntheticImages:
    """Batches of random images that stay on the device: smooth fields with noise on top, ImageNet-normalised in scale.

    Args:
        batch: images a step.
        size: their side in pixels.
        device: where they stay.
    """

    def __init__(self, batch: int, size: int, device: torch.device) -> None:
        self.batch, self.device = batch, device
        self._pool = []
        for i in range(POOL):
            generator = torch.Generator().manual_seed(i)
            coarse = torch.randn(batch, 3, 8, 8, generator=generator).to(device)
            images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
            pixels = torch.arange(images.numel(), device=device)
            noise = philox.uniform4(i, philox.ORDER, pixels, 0)[:, 0].view_as(images)
            self._pool.append(images + noise - 0.5)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(images [B, 3, H, W], dataset group int64 [B], global position int64 [B]) of a step."""
        slots = torch.arange(self.batch, device=self.device)
        return self._pool[step % POOL], slots % len(GROUPS), step * self.batch + slots


Step = Callable[[tuple[Tensor, Tensor, Tensor], int], Tensor]
"""(a batch of `SyntheticImages`, step) -> the loss, on the device or read by the host."""


@dataclass(frozen=True)
class Variant:
    """One way to run the step."""

    name: str
    about: str
    eager: bool = False
    compile: bool = False
    teacher_precision: str = ""
    """Overrides the teachers' `precision`; empty leaves the configuration's."""
    route: bool = False
    """Data sharing "none", and each teacher on its own images only."""


VARIANTS = (
    Variant("eager", "plain PyTorch, published structure", eager=True),
    Variant("eager+compile", "the same, student and teachers under torch.compile", eager=True, compile=True),
    Variant("ours", "this project as configured, bf16"),
    Variant("ours+fp8", "the same with FP8 teachers", teacher_precision="fp8"),
    Variant("ours+routing", "the same, each teacher on its own images", route=True),
)


def synthetic_config(cfg: RunConfig) -> RunConfig:
    """The configuration with random teachers, so that no weights file is needed."""
    teachers = {
        name: dataclasses.replace(teacher, weights=f"random:{i + 1}")
        for i, (name, teacher) in enumerate(cfg.teachers.items())
    }
    return dataclasses.replace(cfg, teachers=teachers)


def configure(cfg: RunConfig, variant: Variant) -> RunConfig:
    """What a variant changes in the configuration."""
    if variant.teacher_precision:
        # random weights have outliers that trained ones have not: the drift is measured elsewhere
        changed = {"precision": variant.teacher_precision, "force_precision": True}
        teachers = {name: dataclasses.replace(teacher, **changed) for name, teacher in cfg.teachers.items()}
        cfg = dataclasses.replace(cfg, teachers=teachers)
    if variant.route:
        cfg = dataclasses.replace(
            cfg, objective=dataclasses.replace(cfg.objective, sharing="none", route_by_dataset=True)
        )
    return cfg


class OurStep:
    """This project's step: what `dune_fast.engine.trainer` does with a batch, and nothing that it does besides."""

    def __init__(
        self, distill: DistillationStep, engine: Engine, rates: np.ndarray, momenta: np.ndarray, timer: Timer
    ) -> None:
        self.distill, self.engine, self.rates, self.momenta, self.timer = distill, engine, rates, momenta, timer

        def student(images: Tensor) -> Features:
            with timer("student forward"):
                return engine(images)

        distill.student = student
        for name, teacher in distill.teachers.teachers.items():
            self._time_trunk(teacher.trunk, f"teacher {name}")

    def __call__(self, data: tuple[Tensor, Tensor, Tensor], step: int) -> Tensor:
        with self.timer("forward"):
            loss, metrics, _ = self.distill(*data, step, float(self.momenta[step]))
        with self.timer("backward"):
            self.engine.backward(loss)
        with self.timer("optimizer"):
            self.engine.step(float(self.rates[step]))
        return metrics["loss"]

    def _time_trunk(self, trunk: nn.Module, part: str) -> None:
        stack = ExitStack()
        trunk.register_forward_pre_hook(lambda *_: stack.enter_context(self.timer(part)) and None)
        trunk.register_forward_hook(lambda *_: stack.close())


def build(
    cfg: RunConfig,
    variant: Variant,
    batch: int,
    steps: int,
    device: torch.device,
    dtype: torch.dtype | None,
    timer: Timer,
) -> Step:
    """A step that can be called; weights are the same for every variant.

    Args:
        cfg: from `synthetic_config`.
        variant: what to build.
        batch: images a step.
        steps: length that the schedules are made for.
        device, dtype: where, and autocast's type (None: float32).
        timer: surrounds the parts of a step.
    """
    cfg = configure(copy.deepcopy(cfg), variant)
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
    peak = scaled_learning_rate(cfg.optimizer.lr_per_256, batch)
    rates = learning_rates(steps, peak, cfg.optimizer.min_lr, cfg.optimizer.warmup_fraction)
    momenta = ema_momenta(steps, cfg.standardization.ema_start, cfg.standardization.ema_end)
    if variant.eager:
        eager = EagerStep(cfg, student, device, dtype, variant.compile, timer)

        def run_eager(data: tuple[Tensor, Tensor, Tensor], step: int) -> Tensor:
            images, _, positions = data
            return torch.tensor(eager(images, positions, step, float(rates[step]), float(momenta[step])))

        return run_eager

    student.autocast_dtype = dtype
    engine = Engine(student.to(device), cfg.optimizer, batch, cfg.deepspeed.zero_stage, cfg.deepspeed.options)
    teachers = TeacherEnsemble(cfg.teachers, cfg.student.patch_size, dtype).to(device)
    own = ownership({n: t.groups for n, t in cfg.teachers.items()}, GROUPS, cfg.objective, device)
    convention = cfg.standardization
    norms = TeacherStatistics(cfg.teacher_features, convention.convention, convention.eps).to(device)
    distill = DistillationStep(engine, teachers, norms, own, cfg.objective, cfg.train.seed)
    return OurStep(distill, engine, rates, momenta, timer)
