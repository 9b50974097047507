"""Pictures of a run: PCA and attention maps, explained variance, curves of its metrics.

Each function writes one PNG, to a path or into a buffer. What it shows as numbers comes from `figure_numbers`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import matplotlib
import numpy as np
import torch
from torch import Tensor

from dune_fast.distill.alignment import side_of
from dune_fast.engine.metrics import read_metrics
from dune_fast.evaluate.figure_numbers import (
    LossChanges,
    Records,
    components_for,
    series,
    smooth,
    teachers_of,
    training_records,
)
from dune_fast.evaluate.held_out import pca_rgb
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.student import Student
from dune_fast.teachers.ensemble import TeacherEnsemble

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen before)

Target = Path | BinaryIO
_DRAWN_HEADS = 6
"""Heads of an attention figure at most: more make a picture that is too wide to read."""


def _save(figure: plt.Figure, path: Target, dpi: int = 120) -> None:
    figure.savefig(path, dpi=dpi, format="png")
    plt.close(figure)


def to_display(image: Tensor) -> Tensor:
    """An ImageNet-normalised image [3, H, W] as RGB in [0, 1], [H, W, 3]."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (image.cpu().permute(1, 2, 0) * std + mean).clamp(0, 1)


def _mosaic(
    images: Tensor, columns: Mapping[str, Sequence[np.ndarray]], path: Target, photograph: str, cmap: str | None = None
) -> None:
    """A row a photograph: itself, below the title `photograph`, then one picture of every column."""
    rows, count = len(images), 1 + len(columns)
    figure, axes = plt.subplots(rows, count, figsize=(2.3 * count, 2.45 * rows), squeeze=False, layout="constrained")
    for row in range(rows):
        axes[row, 0].imshow(to_display(images[row]).numpy())
        for axis, pictures in zip(axes[row, 1:], columns.values(), strict=True):
            axis.imshow(pictures[row], interpolation="nearest", cmap=cmap)
    for axis, title in zip(axes[0], [photograph, *columns], strict=True):
        axis.set_title(textwrap.fill(title, 24), fontsize=11)  # what a column of this width takes
    for axis in axes.flat:  # an axis that is off has its title left out of the layout
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    _save(figure, path, dpi=110)


@torch.no_grad()
def pca_figure(
    images: Tensor,
    teachers: TeacherEnsemble,
    students: Mapping[str, Student],
    path: Target,
    whole_map: bool = False,
    photograph: str = "held-out photograph",
) -> dict[str, list[np.ndarray]]:
    """One row a photograph: itself, every teacher, every student's encoder; PCA(3) of patch tokens as colours.

    Args:
        images: ImageNet-normalised [B, 3, H, W].
        students: column title -> student; its un-normalised patch tokens are drawn.
        path: PNG to write.
        whole_map: see `pca_rgb`.
        photograph: title of the first column.

    Returns:
        Column title -> B maps, float32 [rows, columns, 3]; a teacher with `grid: own` has rows and columns of its own.
    """
    features = teachers(images)
    columns: dict[str, Tensor] = {name: tokens["patch"] for name, tokens in features.items() if "patch" in tokens}
    for title, student in students.items():
        columns[title] = student.encoder.split(student.encoder.forward_tokens(images))[2]
        grid = student.encoder.grid(images)
    maps = {}
    for title, tokens in columns.items():
        sides = grid if tokens.shape[1] == math.prod(grid) else (side_of(tokens),) * 2
        maps[title] = [pca_rgb(x.float().cpu(), *sides, whole_map).numpy() for x in tokens]
    _mosaic(images, maps, path, photograph)
    return maps


def attention_figure(images: Tensor, maps: Mapping[str, Tensor], photograph: str, path: Target) -> None:
    """One row a photograph: the mean over heads of every student, then the last student's first heads.

    Every map has the full range of colours.

    Args:
        images: ImageNet-normalised [B, 3, H, W].
        maps: column title -> `figure_numbers.cls_attention`, [B, heads, rows, columns].
        photograph: title of the first column.
    """
    columns = {f"{title}, mean over heads": list(x.mean(1).cpu().numpy()) for title, x in maps.items()}
    *_, (title, last) = maps.items()
    for head in range(min(last.shape[1], _DRAWN_HEADS)):
        columns[f"{title}, head {head + 1}"] = list(last[:, head].cpu().numpy())
    _mosaic(images, columns, path, photograph, "magma")


def variance_figure(spectra: Mapping[tuple[str, str], Mapping[str, np.ndarray]], path: Target) -> None:
    """Cumulative explained variance over the number of components: one panel for each teacher and dataset.

    Args:
        spectra: (teacher, dataset) -> what -> `figure_numbers.explained_variance`. What is "projection" is drawn
            broken, "raw teacher" thin.
    """
    teachers, datasets = (list(dict.fromkeys(key[i] for key in spectra)) for i in (0, 1))
    size = (4.2 * len(teachers), 3.4 * len(datasets))
    figure, axes = plt.subplots(
        len(datasets), len(teachers), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    styles = {"projection": ("C1", "--", 2.0), "raw teacher": ("0.55", "-", 1.0)}
    for (teacher, dataset), curves in spectra.items():
        axis = axes[datasets.index(dataset), teachers.index(teacher)]
        for what, explained in curves.items():
            colour, line, width = styles.get(what, ("C0", "-", 2.0))
            needed = components_for(explained, 0.9)
            label = f"{what}, 90 % in {needed}" if needed else f"{what}: constant"
            steps = np.arange(1, len(explained) + 1)
            axis.plot(steps, explained, color=colour, linestyle=line, linewidth=width, label=label)
        axis.set(xscale="log", ylim=(0, 1.02), xlim=(1, max(len(explained), 2)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(textwrap.fill(f"{teacher} on {dataset}", 44), fontsize=11)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=9, loc="lower right")
    for axis in axes[-1]:
        axis.set_xlabel("principal components")
    for axis in axes[:, 0]:
        axis.set_ylabel("explained variance")
    _save(figure, path)


def conflict_figure(changes: LossChanges, path: Target) -> None:
    """Pearson correlation and sign agreement of the losses' changes, per pair of teachers; Pearson over the run."""
    count = len(changes.teachers)
    side = max(3.3, 0.75 * count + 1.6)
    panels = 3 if changes.recorded else 2
    widths = [side, side, 1.5 * side][:panels]
    figure, axes = plt.subplots(1, panels, figsize=(sum(widths), side + 0.3), width_ratios=widths, layout="constrained")
    between = "from step to step" if changes.interval == 1 else f"over {changes.interval} steps"
    of = f"of {changes.count} changes {between}" if changes.count else "of every step's changes (running mean)"
    for axis, values, what, low in (
        (axes[0], changes.pearson, "Pearson correlation", -1), (axes[1], changes.agreement, "sign agreement", 0),
    ):  # fmt: skip
        axis.imshow(values, cmap="RdBu", vmin=low, vmax=1)
        for a in range(count):
            for b in range(count):
                strong = abs(2 * (values[a, b] - low) / (1 - low) - 1) > 0.6  # on a dark field
                text = "" if math.isnan(values[a, b]) else f"{values[a, b]:.2f}"
                axis.text(b, a, text, ha="center", va="center", fontsize=9, color="white" if strong else "black")
        names = [textwrap.shorten(name, 20, placeholder="...") for name in changes.teachers]
        axis.set_xticks(range(count), names, rotation=30, ha="right", fontsize=9)
        axis.set_yticks(range(count), names, fontsize=9)
        axis.set_title(f"{what}\n{of}", fontsize=10)
    if changes.recorded:
        for (a, b), (pearson, _) in changes.recorded.items():
            axes[2].plot(changes.steps, pearson, label=f"{a}, {b}", marker="." if len(pearson) < 30 else None)
        axes[2].axhline(0, color="black", linewidth=0.8)
        axes[2].set(xlabel="step", ylim=(-1.02, 1.02))
        axes[2].set_title("Pearson, changes of every step\n(running mean)", fontsize=10)
        axes[2].xaxis.get_major_locator().set_params(integer=True)
        axes[2].grid(alpha=0.3)
        axes[2].legend(frameon=False, fontsize=8)
    _save(figure, path)


def _curves(records: Records, keys: Mapping[str, str], path: Target, ylabel: str, top: float | None = None) -> None:
    """Values over steps, each thin, and smoothed; `keys`: name in the records -> label. "loss" is black."""
    steps = [record["step"] for record in records]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    colour = 0
    for key, label in keys.items():
        values = series(records, key)  # null, which was not finite, is a gap
        style = {"color": "black", "linewidth": 2.2} if key == "loss" else {"color": f"C{colour}", "linewidth": 1.4}
        colour += key != "loss"
        axis.plot(steps, smooth(values, max(1, len(values) // 20)), label=label, **style)
        axis.plot(steps, values, color=style["color"], linewidth=0.6, alpha=0.3)
    last = steps[-1] if steps[-1] > steps[0] else steps[0] + 1
    axis.set(xlabel="step", ylabel=ylabel, xlim=(steps[0], last), ylim=(0, top))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    _save(figure, path)


def draw_losses(records: Records, path: Target) -> None:
    """Loss of the run and of every teacher over the steps that were logged."""
    records = training_records(records)
    losses = {f"loss/{name}": name for name in teachers_of(records)}
    _curves(records, {"loss": "after teacher dropping", **losses}, path, "loss")


def draw_keep_rates(records: Records, path: Target) -> None:
    """Share of the images on which each teacher's loss counted, after teacher dropping."""
    records = training_records(records)
    _curves(records, {f"kept/{name}": name for name in teachers_of(records, "kept/")}, path, "kept share", 1.03)


def draw_held_out(records: Records, path: Target) -> None:
    """Loss of every teacher on held-out images, of the evaluations within the run."""
    records = [record for record in records if "held_out_images" in record]
    _curves(records, {f"held_out/{name}": name for name in teachers_of(records, "held_out/")}, path, "held-out loss")


def loss_figure(metrics: Path, path: Path) -> None:
    """`draw_losses` of a run's `metrics.jsonl`; `path`: PNG to write."""
    draw_losses(read_metrics(metrics), path)
