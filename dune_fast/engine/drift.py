"""Before a run's first step: do its teachers, in the precision they train with, still say what they say in float32?"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from dune_fast.engine.provenance import gather
from dune_fast.teachers.drift import MIN_IMAGES, DriftError, drift_rows, measure_drift, refusal
from dune_fast.teachers.ensemble import TeacherEnsemble

logger = logging.getLogger(__name__)

FILE = "drift.json"
"""In the run's folder: an entry for each teacher and token type, see `teachers.drift.Drift`."""


def check_teachers(teachers: TeacherEnsemble, images: Tensor, run_dir: Path, names: Collection[str]) -> None:
    """Measures the drift and writes `drift.json`; all ranks call it. Nothing to do if all are in float32.

    Args:
        images: of this rank, ImageNet-normalised [B, 3, H, W].
        names: the teachers that this rank looks at; each is one rank's.

    Raises:
        DriftError: on every rank, if a teacher's precision changes its features too much and is not forced.
    """
    if all(cfg.precision == "fp32" for cfg in teachers.configs.values()):
        return
    began, count = time.perf_counter(), len(images)
    mine = [name for name in names if teachers.configs[name].precision != "fp32"]
    measured = gather((count, mine, measure_drift(teachers, images, mine) if mine and count >= MIN_IMAGES else []))
    drifts = [drift for _, _, found in measured for drift in found]
    if dist.get_rank() == 0:
        if few := {count: ", ".join(low) for count, low, found in measured if low and not found}:
            logger.warning(
                "low precision of %s is not compared with float32: that takes %d images and a step has %s on their "
                "rank; `dune-fast teachers drift` does it apart",
                ", ".join(few.values()), MIN_IMAGES, " and ".join(map(str, few)),
            )  # fmt: skip
        if drifts:
            (run_dir / FILE).write_text(json.dumps([drift.as_dict() for drift in drifts], indent=2) + "\n")
            rows = [f"{name} {token} {precision} {drift}" for name, token, precision, drift, *_ in drift_rows(drifts)]
            logger.info(
                "teachers against float32 on %s images, 1 - mean token cosine: %s (%.1f s, train.drift_images=0 leaves "
                "it out)", " and ".join(str(count) for count, _, found in measured if found), ", ".join(rows),
                time.perf_counter() - began,
            )  # fmt: skip
    if message := refusal(drifts):
        raise DriftError(message)
