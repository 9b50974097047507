"""Before a run's first step: do its teachers, in the precision they train with, still say what they say in float32?"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from dune_fast.teachers.drift import MIN_IMAGES, DriftError, drift_rows, measure_drift, refusal
from dune_fast.teachers.ensemble import TeacherEnsemble

logger = logging.getLogger(__name__)

FILE = "drift.json"
"""In the run's folder: an entry for each teacher and token type, see `teachers.drift.Drift`."""


def check_teachers(teachers: TeacherEnsemble, images: Tensor, run_dir: Path) -> None:
    """Measures the drift on rank 0 and writes `drift.json`; all ranks call it. Nothing to do if all are in float32.

    Args:
        images: of this rank, ImageNet-normalised [B, 3, H, W].

    Raises:
        DriftError: on every rank, if a teacher's precision changes its features too much and is not forced.
    """
    if all(teacher.config.precision == "fp32" for teacher in teachers.teachers.values()):
        return
    if len(images) < MIN_IMAGES:
        if dist.get_rank() == 0:
            logger.warning(
                "teachers' low precision is not compared with float32: that takes %d images and a step has %d on this "
                "rank; `dune-fast teachers drift` does it apart", MIN_IMAGES, len(images),
            )  # fmt: skip
        return
    message = [""]
    if dist.get_rank() == 0:
        began = time.perf_counter()
        drifts = measure_drift(teachers, images)
        (run_dir / FILE).write_text(json.dumps([drift.as_dict() for drift in drifts], indent=2) + "\n")
        rows = [f"{name} {token} {precision} {drift}" for name, token, precision, drift, *_ in drift_rows(drifts)]
        logger.info(
            "teachers against float32 on %d images, 1 - mean token cosine: %s (%.1f s, train.drift_images=0 leaves "
            "it out)", len(images), ", ".join(rows), time.perf_counter() - began,
        )  # fmt: skip
        message = [refusal(drifts)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(message)
    if message[0]:
        raise DriftError(message[0])
