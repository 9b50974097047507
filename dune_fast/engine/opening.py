"""What a run says and records when it starts."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from dune_fast.engine.config import as_dict
from dune_fast.engine.devices import device_name, peak_tflops
from dune_fast.engine.flops import run_flops
from dune_fast.engine.memory import SPARE
from dune_fast.engine.metrics import MetricsLog, Workload
from dune_fast.engine.provenance import RunRecord
from dune_fast.engine.trackers import open_trackers

if TYPE_CHECKING:
    from dune_fast.engine.trainer import Trainer

logger = logging.getLogger(__name__)


def open_log(trainer: Trainer, where: dict[str, Any]) -> MetricsLog:
    """Records the start in `run.json`, connects to trackers, opens `metrics.jsonl`."""
    cfg = trainer.cfg
    record = RunRecord(trainer.run_dir)
    entry = record.start(trainer.step, cfg.steps, where)
    trackers = open_trackers(
        cfg.logging, cfg.name, trainer.run_dir, trainer.step, record.content["trackers"], as_dict(cfg)
    )
    record.save()

    def keep(estimate: dict[str, Any]) -> None:
        entry["estimate"] = estimate
        record.save()

    flops = run_flops(cfg, {name: teacher.trunk for name, teacher in trainer.teachers.teachers.items()}).training
    bf16 = trainer.engine.module.autocast_dtype is torch.bfloat16
    peak = peak_tflops(device_name(trainer.device)) if bf16 else None
    workload = Workload(cfg.train.global_batch, trainer.world_size, trainer.device, flops, peak)
    return MetricsLog(
        trainer.run_dir, trainer.step, cfg.steps, workload, trackers, keep, trainer.evaluation_due,
        cfg.evaluation.every,
    )  # fmt: skip


def describe(trainer: Trainer) -> None:
    """Says in a few lines what is trained, on what, where, in which parts."""
    cfg = trainer.cfg
    student, projectors = (
        sum(math.prod(shape) for name, shape in trainer.engine.shapes.items() if name.startswith(part))
        for part in ("encoder.", "projectors.")
    )
    logger.info(
        "%s: %d teachers (%s) into a student of %.1f M (+ %.1f M projectors); %d images in training",
        cfg.name, len(cfg.teachers), ", ".join(cfg.teachers), student / 1e6, projectors / 1e6,
        trainer.loader.num_images,
    )  # fmt: skip
    logger.info(
        "%d steps of %d images at %d px on %d x %s, ZeRO %d, %s; results in %s",
        cfg.steps, cfg.train.global_batch, cfg.image_size, trainer.world_size, trainer.device.type,
        cfg.deepspeed.zero_stage, "bf16" if trainer.engine.module.autocast_dtype else "fp32", trainer.run_dir,
    )  # fmt: skip
    one, several = ("GPU", "GPUs") if trainer.device.type == "cuda" else ("process", "processes")
    where = f"each of {trainer.world_size} {several}" if trainer.world_size > 1 else f"1 {one}"
    logger.info("%d images a step on %s, %s", trainer.fit.images, where, trainer.fit)
    if not trainer.fit.fits:
        logger.warning(
            "by this estimate less than %.0f %% of the memory is left, and the run may end for want of it: take more "
            "devices, train.activation_checkpointing=true, deepspeed=zero2, a smaller student or, for a new run, a "
            "higher train.accumulation or a smaller train.global_batch", 100 * SPARE,
        )  # fmt: skip
    if cfg.train.global_batch > trainer.loader.num_images:
        logger.warning(
            "train.global_batch=%d is more than the %d images in training: a step sees images several times",
            cfg.train.global_batch, trainer.loader.num_images,
        )  # fmt: skip
    if cfg.train.accumulation > 1:
        logger.warning(
            "train.accumulation=%d: the teachers' batch statistics are those of 1/%d of the global batch",
            cfg.train.accumulation, cfg.train.accumulation,
        )  # fmt: skip
