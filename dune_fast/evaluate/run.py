"""Evaluates a finished run: held-out agreement before and after training, figures."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from dali_pipelines.loader import ValLoader
from dune_fast.engine.checkpoints import load_run
from dune_fast.engine.config import RunConfig
from dune_fast.engine.trainer import autocast_dtype
from dune_fast.evaluate.figures import loss_figure, pca_figure
from dune_fast.evaluate.held_out import cosine_table, held_out_cosines
from dune_fast.nn.student import Student, build_student
from teachers.ensemble import TeacherEnsemble

logger = logging.getLogger(__name__)


def _held_out(cfg: RunConfig, size: int, batch: int, device: torch.device) -> ValLoader:
    return ValLoader(cfg.data, size, batch, 0, 1, device)


def evaluate_run(run: Path, figures: bool, device: torch.device | None = None) -> dict:
    """Prints the cosine table, writes `held_out.json` and, with `figures`, `pca.png` and `loss.png` into the run's folder.

    Args:
        run: folder of a finished run.
        figures: whether to draw.
        device: the first GPU where there is one, by default.

    Returns:
        "before" and "after" -> teacher -> token type -> cosine.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg, trained, statistics = load_run(run)
    untrained = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed).eval()
    students: dict[str, Student] = {"before": untrained.to(device), "after": trained.to(device)}
    dtype = autocast_dtype(cfg.train.precision, device)
    teachers = TeacherEnsemble(cfg.teachers, cfg.student.patch_size, dtype).to(device)
    loader = _held_out(cfg, cfg.image_size, cfg.evaluation.batch, device)
    result = held_out_cosines(students, teachers, statistics.to(device), loader, dtype)
    (run / "held_out.json").write_text(json.dumps({"images": len(loader), **result}, indent=2) + "\n")
    console = Console(highlight=False)
    console.print(cosine_table(result), f"{loader.num_images} images, {cfg.image_size} px; running statistics standardize")
    if figures:
        small = replace(cfg.evaluation, batch=cfg.evaluation.figure_images)
        batch = next(iter(_held_out(cfg, small.figure_size, small.batch, device)))
        titles = {"student, before": students["before"], "student, after": students["after"]}
        pca_figure(batch.images[: small.batch], teachers, titles, run / "pca.png")
        loss_figure(run / "metrics.jsonl", run / "loss.png")
        console.print(f"figures: {run / 'pca.png'}, {run / 'loss.png'}")
    return result
