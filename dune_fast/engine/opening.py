"""What a run says and records when it starts."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch

from dune_fast.dali_pipelines.loader import TrainLoader
from dune_fast.distill.normalizers import BATCH
from dune_fast.engine.config import as_dict
from dune_fast.engine.devices import device_name, peak_tflops
from dune_fast.engine.flops import Flops
from dune_fast.engine.memory import SPARE
from dune_fast.engine.metrics import MetricsLog, Workload
from dune_fast.engine.optimizer import TRUNK
from dune_fast.engine.provenance import RunRecord
from dune_fast.engine.stages import Stage, partitions, shares
from dune_fast.engine.task import Place, Task
from dune_fast.engine.trackers import open_trackers

logger = logging.getLogger(__name__)


class Opened(Place, Protocol):
    """What is read here of a run that is about to start; the `Trainer` has it."""

    task: Task
    evaluation_due: bool


class OpenedDistillation(Protocol):
    """What is read here of a distillation."""

    loader: TrainLoader
    stages: Sequence[Stage]


def open_log(run: Opened, where: dict[str, Any]) -> MetricsLog:
    """Records the start in `run.json`, has trackers connect, opens `metrics.jsonl`."""
    cfg = run.cfg
    record = RunRecord(run.run_dir)
    entry = record.start(run.step, cfg.steps, where)
    for key, value in run.task.record().items():
        record.keep(entry, key, value)
    trackers = open_trackers(
        cfg.logging, cfg.name, run.run_dir, run.step, dict(record.content["trackers"]), as_dict(cfg),
        record.keep_tracker,
    )  # fmt: skip
    work = run.task.work()
    peak = peak_tflops(device_name(run.device)) if run.dtype is torch.bfloat16 else None
    workload = Workload(cfg.train.global_batch, run.world_size, run.device, work.flops, peak, work.stages)
    keep = partial(record.keep, entry, "estimate")
    due, every = run.evaluation_due, cfg.evaluation.every
    return MetricsLog(run.run_dir, run.step, cfg.steps, workload, trackers, keep, due, every)


def stage_costs(parts: Sequence[tuple[Stage, Flops]]) -> tuple[tuple[int, float], ...]:
    """`metrics.Workload.stages`: by operations or, where these are not known, by pixels."""
    if len(parts) == 1:
        return ()
    counts = [float(stage.image_size**2 if flops.training is None else flops.training) for stage, flops in parts]
    steps = [stage.end - stage.first for stage, _ in parts]
    mean = sum(n * count for n, count in zip(steps, counts, strict=True)) / sum(steps)
    return tuple((stage.end, count / mean) for (stage, _), count in zip(parts, counts, strict=True))


def describe(run: Place, task: OpenedDistillation) -> None:
    """Says in a few lines what a distillation trains, on what, where, in which parts."""
    cfg = run.cfg
    student, projectors = (
        sum(math.prod(shape) for name, shape in run.engine.shapes.items() if name.startswith(TRUNK) == of_trunk)
        for of_trunk in (True, False)
    )
    logger.info(
        "%s: %d teachers (%s) into a student of %.1f M (+ %.1f M projectors); %d images in training",
        cfg.name, len(cfg.teachers), ", ".join(cfg.teachers), student / 1e6, projectors / 1e6,
        task.loader.num_images,
    )  # fmt: skip
    logger.info(
        "%d steps of %d images at %d px on %d x %s, ZeRO %d, %s; results in %s",
        cfg.steps, cfg.train.global_batch, cfg.image_size, run.world_size, run.device.type,
        run.engine.zero_stage, "bf16" if run.dtype else "fp32", run.run_dir,
    )  # fmt: skip
    for stage in [s for s in task.stages if s is not task.stages[-1] or s.sizes or s.teachers]:
        logger.info("progressive: steps %d to %d at %s", stage.first + 1, stage.end, stage)
    portions = shares(cfg) if cfg.partitions else []
    for part, stage, share in zip(cfg.partitions, partitions(cfg), portions, strict=True):
        logger.info(
            "partition by %s: %d images of a step at %s, teachers %s, counts %.3g", cfg.partition_by, part.images,
            stage.px, ", ".join(stage.teachers or cfg.teachers), share,
        )  # fmt: skip
    one, several = ("GPU", "GPUs") if run.device.type == "cuda" else ("process", "processes")
    where = f"each of {run.world_size} {several}" if run.world_size > 1 else f"1 {one}"
    logger.info("%d images a step on %s, %s", run.fit.images, where, run.fit)
    if not run.fit.fits:
        logger.warning(
            "by this estimate less than %.0f %% of the memory is left, and the run may end for want of it: take more "
            "devices, train.activation_checkpointing=true, deepspeed.zero_stage=2, a smaller student or, for a new "
            "run, a higher train.accumulation or a smaller train.global_batch", 100 * SPARE,
        )  # fmt: skip
    if cfg.train.global_batch > task.loader.num_images:
        logger.warning(
            "train.global_batch=%d is more than the %d images in training: a step sees images several times",
            cfg.train.global_batch, task.loader.num_images,
        )  # fmt: skip
    if cfg.train.accumulation > 1 and {cfg.standardization.of(token) for token in ("cls", "patch")} & set(BATCH):
        logger.warning(
            "train.accumulation=%d: the teachers' batch statistics are those of 1/%d of the global batch",
            cfg.train.accumulation, cfg.train.accumulation,
        )  # fmt: skip
