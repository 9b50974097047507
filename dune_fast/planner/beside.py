"""What a run takes beside its steps, in seconds: start-up, checkpoints, evaluations. Assumptions, not measurements.

A checkpoint is copied to the host while the run waits, and written while it goes on; the last one is waited for.
Held-out images are those that the configuration counts (`holdout`, `expected_val`); folders are not looked into.
"""

from __future__ import annotations

from dataclasses import dataclass

from dune_fast.engine.config import RunConfig
from dune_fast.engine.flops import run_flops
from dune_fast.engine.memory import checkpoint_bytes
from dune_fast.planner.gpus import LINK_SHARE, PCIE_GB_S

START_S = 120.0
"""Processes that meet, the list of images, weights that are read, kernels that are compiled."""
DISK_GB_S = 1.0
"""What the disk of a run takes."""


@dataclass(frozen=True)
class Beside:
    """Seconds beside the steps."""

    once: float
    """Of the whole run."""
    step: float
    """Of a step, a mean."""


def beside(cfg: RunConfig, gpus: int, flops_per_second: float) -> Beside:
    """Of a run on so many GPUs that reach `flops_per_second` together."""
    train, flops, size = cfg.train, run_flops(cfg), checkpoint_bytes(cfg)
    copied = size / gpus / (PCIE_GB_S * LINK_SHARE * 1e9)
    student, frozen = flops.student + flops.projectors, flops.all_teachers or 0
    datasets = cfg.data.datasets.values()
    held_out = sum(d.holdout or d.expected_val for d in datasets if not d.evaluation_only)
    look = held_out * (student + frozen) / flops_per_second
    once = START_S + size / (DISK_GB_S * 1e9) + (2 * look if cfg.evaluation.held_out else 0.0)
    ahead = cfg.start.images * gpus if cfg.start.wanted else 0  # by one rank
    tokens = {cfg.standardization.of(token) for t in cfg.teachers.values() for token in t.token_types}
    ahead += cfg.standardization.phi_s_batches * train.global_batch if "phi_s" in tokens else 0
    once += ahead * (student + frozen) / flops_per_second
    step = copied / train.checkpoint_every
    if cfg.evaluation.every:
        neighbours = 2 * cfg.evaluation.knn_images * flops.student if cfg.evaluation.knn_dataset else 0
        step += (look + neighbours / flops_per_second) / cfg.evaluation.every
    return Beside(once, step)
