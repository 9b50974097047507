"""Some steps of a recipe on this machine's device, on random images.

ViT teachers have random weights, so that no file is needed; others have their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass

import torch

from dune_fast.dali_pipelines.loader import group_weights
from dune_fast.distill.objective import ownership, term_states
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.distill.step import DistillationStep
from dune_fast.engine.config import RunConfig
from dune_fast.engine.config_sections import CacheConfig, StandardizationConfig
from dune_fast.engine.deepspeed_engine import Engine, init_distributed
from dune_fast.engine.devices import autocast_dtype, device_name
from dune_fast.engine.flops import run_flops
from dune_fast.engine.memory import device_memory, fit
from dune_fast.planner.budget import Machine
from dune_fast.planner.gpus import gpu_of_device
from dune_fast.planner.numbers import MEASURED, Number
from dune_fast.student import build_student
from dune_fast.teachers.config import TeacherConfig, teachers_by_trunk
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.registry import family_class
from dune_fast.teachers.vit import ViTTeacher


def _random_teachers(cfg: RunConfig) -> dict[str, TeacherConfig]:
    """ViT teachers without weights files, others as they are; what reads one trunk still does.

    A ViT whose network its configuration does not say keeps its file: one of no published size, or a reading with
    channels of its own (`projected`, RADIO's summary).
    """
    seeds = {name: seed for seed, group in enumerate(teachers_by_trunk(cfg.teachers), 1) for name in group}
    grid, found = cfg.image_size // cfg.student.patch_size, dict(cfg.teachers)
    for name, teacher in cfg.teachers.items():
        family = family_class(teacher.family)
        if issubclass(family, ViTTeacher):
            side = teacher.image_size or grid * teacher.patch_size  # the size of its position table
            drawn = dataclasses.replace(teacher, weights=f"random:{seeds[name]}", image_size=side)
            with contextlib.suppress(ValueError):
                family.architecture(drawn)
                found[name] = drawn
    return found


@dataclass(frozen=True)
class Calibration:
    """What was measured."""

    device: str
    steps: int
    micro_batch: int
    """Images of a step."""
    seconds: float
    """Of one step, the mean."""
    tflops: float
    memory: int
    """Bytes of the device."""

    def machine(self, gpus: int) -> Machine:
        """So many of this device."""
        rate = Number(self.tflops, "TFLOP/s", MEASURED)
        return Machine(self.device, gpus, self.memory, rate, gpu_of_device(self.device))


def calibrate(cfg: RunConfig, steps: int, gpus: int = 1) -> Calibration:
    """Trains `steps` steps after a few that warm up: one part of the batch each, in the largest size that fits.

    Images are not read: storage and decoding are not in it. ValueError if a teacher's arithmetic is not known, or a
    part of one image does not fit.
    """
    if cfg.cache.folder:  # the rate is that of a step with its teachers
        own = StandardizationConfig() if cfg.standardization.convention == "fixed" else cfg.standardization
        cfg = dataclasses.replace(cfg, cache=CacheConfig(), standardization=own)
    total = run_flops(cfg).training
    if total is None:
        raise ValueError("a teacher's arithmetic is not known without its weights, so a calibration gives no rate")
    device = init_distributed()
    dtype, memory = autocast_dtype(cfg.train.precision, device), device_memory(device, 1)
    lies = fit(cfg, gpus, memory, dtype is not None)
    if not lies.fits:
        raise ValueError(f"one image of this recipe does not fit {device_name(device)}: {lies}")
    size = lies.images // lies.parts
    teachers = _random_teachers(cfg)
    groups = list(cfg.data.groups) or ["generic"]
    own = ownership({name: t.groups for name, t in teachers.items()}, groups, cfg.objective)
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
    student.compute_in(dtype, cfg.train.student_stream)
    student.encoder.activation_checkpointing = cfg.train.activation_checkpointing
    statistics = TeacherStatistics.of(cfg.teacher_features, cfg.standardization)
    step = DistillationStep(
        student, TeacherEnsemble(teachers, cfg.student.patch_size, dtype, device), statistics.to(device), own,
        cfg.objective, cfg.train.seed,
        states=term_states(cfg.objective, cfg.teacher_features, cfg.train.global_batch).to(device),
    )  # fmt: skip
    engine = step.student = Engine(student, cfg.optimizer, size, 0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, cfg.image_size, cfg.image_size, generator=generator).to(device)
    weights = torch.tensor(group_weights(cfg.data, groups), dtype=torch.float) if cfg.data.groups else torch.ones(1)
    group = torch.multinomial(weights, size, replacement=True, generator=generator)
    on_host, group, positions = group.numpy(), group.to(device), torch.arange(size, device=device)

    def run(count: int) -> float:
        began = time.perf_counter()
        for i in range(count):
            engine.backward(step(images, group, positions, i, 0.5, on_host).loss)
            engine.step(1e-6)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / count

    run(max(1, steps // 10))
    seconds = run(steps)
    return Calibration(device_name(device), steps, size, seconds, total * size / seconds / 1e12, memory)
