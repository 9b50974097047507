"""Evaluates a finished run: held-out agreement before and after training, figures."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from dune_fast.dali_pipelines.datasets import Dataset
from dune_fast.dali_pipelines.loader import ValLoader
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.engine.checkpoints import load_run
from dune_fast.engine.config import RunConfig, validate
from dune_fast.engine.devices import autocast_dtype
from dune_fast.engine.warm_start import initial_student
from dune_fast.evaluate.figures import loss_figure, pca_figure
from dune_fast.evaluate.held_out import cosine_table, held_out_cosines
from dune_fast.student import Student
from dune_fast.teachers.ensemble import TeacherEnsemble

logger = logging.getLogger(__name__)


def figure_batch(
    cfg: RunConfig, num_images: int, device: torch.device, datasets: Sequence[Dataset] | None = None
) -> torch.Tensor:
    """Held-out photographs for the figure, evenly spaced over all of them (so over datasets too), [B, 3, S, S]."""
    count = min(cfg.evaluation.figure_images, num_images)
    stride = num_images // count  # a "rank" of the loader takes every stride-th image
    with ValLoader(cfg.data, cfg.evaluation.figure_size, count, stride // 2, stride, device, datasets) as loader:
        return next(iter(loader)).images[:count]


@dataclass(frozen=True)
class Opened:
    """A run's student on a device, in evaluation mode, computing as in the run."""

    cfg: RunConfig
    before: Student
    """As the run has started."""
    after: Student
    statistics: TeacherStatistics
    device: torch.device

    def teachers(self) -> TeacherEnsemble:
        """Built anew; TeacherWeightsError if a teacher's weights are not here."""
        dtype = autocast_dtype(self.cfg.train.precision, self.device)
        return TeacherEnsemble(self.cfg.teachers, self.cfg.student.patch_size, dtype, self.device)


def open_trained(run: Path, figures: bool, device: torch.device) -> Opened:
    """Loads it; `figures`: whether the configuration must allow figures. Raises as `evaluate_run`."""
    cfg, trained, statistics = load_run(run)
    cfg.evaluation.figures = figures
    validate(cfg)  # a run that draws nothing has not looked at the figures' size
    before, after = initial_student(cfg).eval().to(device), trained.to(device)
    dtype = autocast_dtype(cfg.train.precision, device)
    for student in (before, after):
        student.compute_in(dtype, cfg.train.student_stream)
    return Opened(cfg, before, after, statistics.to(device), device)


def evaluate_run(run: Path, figures: bool, device: torch.device | None = None, must_draw: bool = True) -> dict:
    """Prints the cosine table; writes `held_out.json` and, with `figures`, `pca.png` and `loss.png` into the folder.

    Args:
        run: folder of a finished run.
        figures: whether to draw; the losses only where the run's `metrics.jsonl` is still there.
        device: the first GPU where there is one, by default.
        must_draw: False: what fails in drawing costs a warning.

    Returns:
        "before" and "after" -> teacher -> token type -> cosine.

    Raises:
        ConfigError: `run` is not a run's folder, or its configuration does not allow figures.
        TeacherWeightsError: the run has not ended, its weights are damaged, or a teacher's weights are not here.
        ValueError: the run's data has no held-out image.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_trained(run, figures, device)
    cfg, teachers = opened.cfg, opened.teachers()
    students: dict[str, Student] = {"before": opened.before, "after": opened.after}
    with ValLoader(cfg.data, cfg.image_size, cfg.evaluation.batch, 0, 1, device) as loader:
        if not loader.num_images:
            raise ValueError(
                f"{run} has no held-out image: name a folder of images that it has not seen in {run / 'config.yaml'}, "
                "data.datasets.<name>.val_root"
            )
        result = held_out_cosines(students, teachers, opened.statistics, loader)
    (run / "held_out.json").write_text(json.dumps({"images": loader.num_images, **result}, indent=2) + "\n")
    console = Console(highlight=False)
    console.print(cosine_table(result))
    console.print(f"{loader.num_images} images of {cfg.image_size} px, standardized with the running statistics")
    if figures:
        try:
            drawn = _draw(run, opened, teachers, loader.num_images)
            console.print(f"figures: {', '.join(map(str, drawn))}", soft_wrap=True)
        except Exception as error:
            if must_draw:
                raise
            logger.warning("the figures could not be drawn: %s", error)
    return result


def _draw(run: Path, opened: Opened, teachers: TeacherEnsemble, num_images: int) -> list[Path]:
    """`pca.png`, and `loss.png` where there are metrics, in the run's folder."""
    titles = {"student, before": opened.before, "student, after": opened.after}
    pca_figure(figure_batch(opened.cfg, num_images, opened.device), teachers, titles, run / "pca.png")
    if not (run / "metrics.jsonl").is_file():
        return [run / "pca.png"]
    loss_figure(run / "metrics.jsonl", run / "loss.png")
    return [run / "pca.png", run / "loss.png"]
