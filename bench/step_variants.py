"""The ways to run one distillation step that `python -m bench.step` compares, from the same weights and images."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench.eager_step import EagerStep
from dune_fast.dali_pipelines.loader import Batch
from dune_fast.engine.config import RunConfig
from dune_fast.engine.devices import autocast_dtype
from dune_fast.engine.schedules import ema_momenta
from dune_fast.engine.trainer import Trainer
from dune_fast.kernels import philox
from dune_fast.student import build_student

GROUPS = ("generic", "3d", "human")
"""Of a synthetic batch: a third of the images each, in turns."""
POOL = 4
"""Synthetic batches that take turns, so that no step finds its images in a cache."""


class SyntheticLoader:
    """Stands in for `TrainLoader`: batches of random images that stay on the device, smooth fields with noise on top.

    Args:
        batch: images a step.
        size: their side in pixels.
        device: where they stay.
    """

    groups = list(GROUPS)
    dataset_names = ["synthetic"]
    datasets = ()
    waited_s = 0.0

    def __init__(self, batch: int, size: int, device: torch.device) -> None:
        self.num_images, self.device = batch * POOL, device
        self.broken = {"synthetic": 0}
        self._groups = np.arange(batch) % len(GROUPS)
        # moved once: a copy from memory that is not pinned would make the host wait at every step
        self._group = torch.from_numpy(self._groups).to(device)
        self._pool = []
        for i in range(POOL):
            generator = torch.Generator().manual_seed(i)
            coarse = torch.randn(batch, 3, 8, 8, generator=generator).to(device)
            images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
            pixels = torch.arange(images.numel(), device=device)
            noise = philox.uniform4(i, philox.ORDER, pixels, 0)[:, 0].view_as(images)
            self._pool.append(images + noise - 0.5)

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step."""
        batch = len(self._groups)
        positions = step * batch + torch.arange(batch, device=self.device)
        on_host = step * batch + np.arange(batch)
        return Batch(
            self._pool[step % POOL], positions, self._group, torch.zeros_like(self._group), [""] * batch, step,
            self._groups, positions_on_host=on_host,
        )

    def close(self) -> None:
        """Nothing is open."""


Step = Callable[[int], Tensor]
"""step -> the loss, on the device or read by the host."""


@dataclass(frozen=True)
class Variant:
    """One way to run the step."""

    name: str
    about: str
    eager: bool = False
    teachers: Mapping[str, object] = field(default_factory=dict)
    """What it changes in every teacher's configuration."""
    objective: Mapping[str, object] = field(default_factory=dict)
    """What it changes in `objective`."""
    train: Mapping[str, object] = field(default_factory=dict)
    """What it changes in `train`."""


_LEAN = {"stream": "bf16", "epilogue_gelu": True}
_FP8 = {"precision": "fp8", "stream": "bf16"}
ROUTED = {"sharing": "none", "route_by_dataset": True}
"""Of the objective: each teacher on its own images only."""
VARIANTS = (
    Variant("eager", "plain PyTorch, published structure", eager=True),
    Variant("ours", "this project as configured, bf16"),
    Variant("ours+lean", "the same, teachers with a bf16 stream and GELU in the product's epilogue", teachers=_LEAN),
    Variant("ours+fp8", "the same with FP8 teachers, bf16 stream", teachers=_FP8),
    Variant("ours+routing", "the same, each teacher on its own images", objective=ROUTED),
    Variant("ours+bf16stream", "the same, the student's tokens in bf16", train={"student_stream": "bf16"}),
)


def synthetic_config(cfg: RunConfig, batch: int, steps: int) -> RunConfig:
    """The configuration with random teachers, so that no weights file is needed, for one process."""
    teachers = {
        name: dataclasses.replace(teacher, weights=f"random:{i + 1}")
        for i, (name, teacher) in enumerate(cfg.teachers.items())
    }
    train = dataclasses.replace(cfg.train, global_batch=batch, steps=steps, log_every=max(2, steps))
    return dataclasses.replace(cfg, teachers=teachers, student_weights="", train=train)


def configure(cfg: RunConfig, variant: Variant) -> RunConfig:
    """What a variant changes in the configuration."""
    teachers = {name: dataclasses.replace(teacher, **variant.teachers) for name, teacher in cfg.teachers.items()}
    objective = dataclasses.replace(cfg.objective, **variant.objective)
    train = dataclasses.replace(cfg.train, **variant.train)
    return dataclasses.replace(cfg, teachers=teachers, objective=objective, train=train)


def build(cfg: RunConfig, variant: Variant, loader: SyntheticLoader) -> Step:
    """A step that can be called, of a configuration from `synthetic_config`; weights are the same for every variant."""
    cfg = configure(copy.deepcopy(cfg), variant)
    return _eager(cfg, loader) if variant.eager else _ours(cfg, loader)


def _eager(cfg: RunConfig, loader: SyntheticLoader) -> Step:
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
    eager = EagerStep(cfg, student, loader.device, autocast_dtype(cfg.train.precision, loader.device))
    optimizer, norms = cfg.optimizer, cfg.standardization
    rates = optimizer.rates(cfg.steps, cfg.train.global_batch)
    momenta = ema_momenta(cfg.steps, norms.ema_start, norms.ema_end)

    def step(i: int) -> Tensor:
        batch = loader[i]
        return torch.tensor(eager(batch.images, batch.positions, i, float(rates[i]), float(momenta[i])))

    return step


def _ours(cfg: RunConfig, loader: SyntheticLoader) -> Step:
    """The trainer's own step: what a user's run does between two batches."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = dataclasses.replace(cfg, output_dir=folder)
        with mock.patch("dune_fast.engine.distillation.TrainLoader", lambda *_, **__: loader):
            trainer = Trainer(cfg)

    def step(i: int) -> Tensor:
        trainer.step = i
        return trainer.train_step(loader[i])["loss"]

    return step
