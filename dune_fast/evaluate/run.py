"""Evaluates a finished run: held-out agreement before and after training, figures."""

from __future__ import annotations

import itertools
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
from dune_fast.engine.start import started_student
from dune_fast.evaluate.figures import loss_figure, pca_figure
from dune_fast.evaluate.held_out import WINDOWS, cosine_table, cut, held_out_cosines, window_knn
from dune_fast.student import Student, build_student
from dune_fast.teachers.ensemble import TeacherEnsemble

logger = logging.getLogger(__name__)

_PHOTOGRAPHS = 100  # of which windows are cut


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
    students: dict[str, Student]
    """"drawn", where the run has not started from drawn weights; "before" and "after" the training."""
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
    students = {"before": started_student(cfg, run), "after": trained}
    if cfg.start.wanted or cfg.student_weights:
        drawn = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
        students = {"drawn": drawn, **students}
    dtype = autocast_dtype(cfg.train.precision, device)
    for student in students.values():
        student.eval().to(device).compute_in(dtype, cfg.train.student_stream)
    return Opened(cfg, students, statistics.to(device), device)


def evaluate_run(run: Path, figures: bool, device: torch.device | None = None, must_draw: bool = True) -> dict:
    """Prints cosines and k-NN; writes `held_out.json` and, with `figures`, `pca.png` and `loss.png` into the folder.

    Args:
        run: folder of a finished run.
        figures: whether to draw; the losses only where the run's `metrics.jsonl` is still there.
        device: the first GPU where there is one, by default.
        must_draw: False: what fails in drawing costs a warning.

    Returns:
        "drawn" (see `Opened`), "before" and "after" -> teacher -> token type -> cosine.

    Raises:
        ConfigError: `run` is not a run's folder, or its configuration does not allow figures.
        TeacherWeightsError: the run has not ended, its weights are damaged, or a teacher's weights are not here.
        ValueError: the run's data has no held-out image.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_trained(run, figures, device)
    cfg, teachers = opened.cfg, opened.teachers()
    with ValLoader(cfg.data, cfg.image_size, cfg.evaluation.batch, 0, 1, device) as loader:
        if not loader.num_images:
            raise ValueError(
                f"{run} has no held-out image: name a folder of images that it has not seen in {run / 'config.yaml'}, "
                "data.datasets.<name>.val_root"
            )
        result = held_out_cosines(
            opened.students, teachers, opened.statistics, loader, align=opened.cfg.objective.align
        )
    found = _window_knn(opened, teachers, loader.num_images)
    written = {"images": loader.num_images, **result, "window_knn": found}
    (run / "held_out.json").write_text(json.dumps(written, indent=2) + "\n")
    console = Console(highlight=False)
    console.print(cosine_table(result))
    console.print(f"{loader.num_images} images of {cfg.image_size} px, standardized with the running statistics")
    if found:
        shown = ", ".join(f"{name} {share:.3f}" for name, share in found.items())
        console.print(f"k-NN, windows that find their own photograph by cls: {shown}", soft_wrap=True)
    if figures:
        try:
            drawn = _draw(run, opened, teachers, loader.num_images)
            console.print(f"figures: {', '.join(map(str, drawn))}", soft_wrap=True)
        except Exception as error:
            if must_draw:
                raise
            logger.warning("the figures could not be drawn: %s", error)
    return result


@torch.no_grad()
def _window_knn(opened: Opened, teachers: TeacherEnsemble, num_images: int) -> dict[str, float]:
    """Of the students and of the teachers with a cls token; empty where one photograph is all there is, or no token."""
    cfg, count = opened.cfg, min(num_images, _PHOTOGRAPHS)
    if count < 2:
        return {}
    side, stride = WINDOWS * cfg.image_size, num_images // count
    with ValLoader(cfg.data, side, 1, stride // 2, stride, opened.device) as loader:
        windows = [cut(batch.images, cfg.image_size) for batch in itertools.islice(loader, count)]
    names = [f"teacher {name}" for name, teacher in cfg.teachers.items() if "cls" in teacher.token_types]
    students = {name: student.encoder for name, student in opened.students.items() if student.encoder.num_cls}
    cls: dict[str, list[torch.Tensor]] = {}
    for part in windows:
        tokens = teachers(part) if names else {}
        for name in names:
            cls.setdefault(name, []).append(tokens[name.removeprefix("teacher ")]["cls"].float())
        for name, encoder in students.items():
            cls.setdefault(name, []).append(encoder(part)["x_norm_clstoken"].float())
    return {name: window_knn(torch.stack(cls[name])) for name in (*students, *names)}


def _draw(run: Path, opened: Opened, teachers: TeacherEnsemble, num_images: int) -> list[Path]:
    """`pca.png`, and `loss.png` where there are metrics, in the run's folder."""
    titles = {f"student, {name}": student for name, student in opened.students.items()}
    pca_figure(figure_batch(opened.cfg, num_images, opened.device), teachers, titles, run / "pca.png")
    if not (run / "metrics.jsonl").is_file():
        return [run / "pca.png"]
    loss_figure(run / "metrics.jsonl", run / "loss.png")
    return [run / "pca.png", run / "loss.png"]
