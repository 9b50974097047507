"""The ways to run one distillation step that `python -m bench.step` compares, from the same weights and images."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench.eager_step import EagerStep
from dune_fast.cache.formats import encode
from dune_fast.cache.store import MANIFEST, VERSION, Store, Stored, shard_path, write_shard
from dune_fast.dali_pipelines.loader import Batch
from dune_fast.engine.config import RunConfig
from dune_fast.engine.devices import autocast_dtype
from dune_fast.engine.schedules import ema_momenta, scheduled_rates
from dune_fast.engine.trainer import Trainer
from dune_fast.kernels import philox
from dune_fast.student import build_student
from dune_fast.teachers.ensemble import TeacherEnsemble

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
    read_views: Callable[[np.ndarray], Stored] | None = None
    """Set by a trainer that reads a cache, whose views are the images of the pool."""

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
        views = on_host % self.num_images
        features = None if self.read_views is None else self.read_views(views)(self.device)
        return Batch(
            self._pool[step % POOL], positions, self._group, torch.zeros_like(self._group), [""] * batch, step,
            self._groups, views, features, on_host,
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
    cache: str = ""
    """Teachers' features from a cache in this format, one of `dune_fast.cache.formats.FORMATS`; empty: teachers run."""


_LEAN = {"stream": "bf16", "epilogue_gelu": True}
_FP8 = {"precision": "fp8", "stream": "bf16"}
ROUTED = {"sharing": "none", "route_by_dataset": True}
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
    train, cache = dataclasses.replace(cfg.train, **variant.train), cfg.cache
    if variant.cache:
        cache = dataclasses.replace(cache, folder="runs/cache", format=variant.cache)
    return dataclasses.replace(cfg, teachers=teachers, objective=objective, train=train, cache=cache)


def build(cfg: RunConfig, variant: Variant, loader: SyntheticLoader) -> Step:
    """A step that can be called, of a configuration from `synthetic_config`; weights are the same for every variant."""
    cfg = configure(copy.deepcopy(cfg), variant)
    return _eager(cfg, loader) if variant.eager else _ours(cfg, loader)


def _eager(cfg: RunConfig, loader: SyntheticLoader) -> Step:
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
    eager = EagerStep(cfg, student, loader.device, autocast_dtype(cfg.train.precision, loader.device))
    optimizer, norms = cfg.optimizer, cfg.standardization
    peak = optimizer.peak(cfg.train.global_batch)
    rates = scheduled_rates(
        optimizer.schedule, cfg.steps, peak, optimizer.min_lr, optimizer.warmup_fraction, optimizer.warmup_start
    )
    momenta = ema_momenta(cfg.steps, norms.ema_start, norms.ema_end)

    def step(i: int) -> Tensor:
        batch = loader[i]
        return torch.tensor(eager(batch.images, batch.positions, i, float(rates[i]), float(momenta[i])))

    return step


def _ours(cfg: RunConfig, loader: SyntheticLoader) -> Step:
    """The trainer's own step: what a user's run does between two batches, and the reading of a cache."""
    with ExitStack() as patches, tempfile.TemporaryDirectory() as folder:
        cfg = dataclasses.replace(cfg, output_dir=folder)
        if cfg.cache.folder:
            loader = copy.copy(loader)  # which the other variants do not read from
            store = write_cache(cfg, loader)
            patches.enter_context(mock.patch("dune_fast.engine.distillation.open_cache", lambda *_: store))
        patches.enter_context(mock.patch("dune_fast.engine.distillation.TrainLoader", lambda *_, **__: loader))
        trainer = Trainer(cfg)

    def step(i: int) -> Tensor:
        trainer.step = i
        return trainer.train_step(loader[i])["loss"]

    return step


def write_cache(cfg: RunConfig, loader: SyntheticLoader) -> Store:
    """A cache of the pool's images, as the configuration's teachers see them, in a folder that goes with the loader."""
    folder = Path(tempfile.mkdtemp(prefix="dune_fast_cache_"))
    weakref.finalize(loader, shutil.rmtree, folder)
    dtype = autocast_dtype(cfg.train.precision, loader.device)
    teachers = TeacherEnsemble(cfg.teachers, cfg.student.patch_size, dtype, loader.device)
    loader.read_views = None
    rows = loader.num_images // POOL
    for i in range(POOL):
        tensors: dict[str, Tensor] = {}
        for teacher, kinds in teachers(loader[i].images).items():
            for kind, x in kinds.items():
                tensors |= encode(f"{teacher}/{kind}", x, cfg.cache.format)
        stored = {name: x.cpu().contiguous() for name, x in tensors.items()}
        write_shard(shard_path(folder, i), stored, torch.ones(rows, dtype=torch.bool), {})
    manifest = {"version": VERSION, "views": loader.num_images, "rows": rows}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return Store(str(folder), [(name, kind) for name, t in cfg.teachers.items() for kind in t.token_types])
