"""Pictures of a run: PCA maps of teachers and student, loss curves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from dune_fast.engine.metrics import read_metrics
from dune_fast.evaluate.held_out import pca_rgb
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.student import Student
from dune_fast.teachers.ensemble import TeacherEnsemble

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen before)


def to_display(image: Tensor) -> Tensor:
    """An ImageNet-normalised image [3, H, W] as RGB in [0, 1], [H, W, 3]."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (image.cpu().permute(1, 2, 0) * std + mean).clamp(0, 1)


@torch.no_grad()
def pca_figure(images: Tensor, teachers: TeacherEnsemble, students: Mapping[str, Student], path: Path) -> None:
    """One row a photograph: itself, every teacher, every student's encoder; PCA(3) of patch tokens as colours.

    Args:
        images: ImageNet-normalised [B, 3, H, W].
        students: column title -> student; its un-normalised patch tokens are drawn.
        path: PNG to write.
    """
    features = teachers(images)
    columns: dict[str, Tensor] = {name: tokens["patch"] for name, tokens in features.items() if "patch" in tokens}
    for title, student in students.items():
        columns[title] = student.encoder.split(student.encoder.forward_tokens(images))[2]
        height, width = student.encoder.grid(images)
    rows, count = len(images), 1 + len(columns)
    figure, axes = plt.subplots(rows, count, figsize=(2.3 * count, 2.45 * rows), squeeze=False, layout="constrained")
    for row in range(rows):
        axes[row, 0].imshow(to_display(images[row]).numpy())
        for axis, tokens in zip(axes[row, 1:], columns.values(), strict=True):
            axis.imshow(pca_rgb(tokens[row].float().cpu(), height, width).numpy(), interpolation="nearest")
    for axis, title in zip(axes[0], ["held-out photograph", *columns], strict=True):
        axis.set_title(textwrap.fill(title, 24), fontsize=11)  # what a column of this width takes
    for axis in axes.flat:  # an axis that is off has its title left out of the layout
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Centred moving average; shorter windows at both ends. [n] -> [n]."""
    half = window // 2
    return np.array([np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def loss_figure(metrics: Path, path: Path) -> None:
    """Loss of the run and of every teacher over the steps that were logged.

    Args:
        metrics: the run's `metrics.jsonl`.
        path: PNG to write.
    """
    records = [record for record in read_metrics(metrics) if "loss" in record]  # others are of evaluations
    steps = [record["step"] for record in records]
    teachers = sorted(key for key in records[-1] if key.startswith("loss/") and key.count("/") == 1)
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for index, key in enumerate(["loss", *teachers]):
        values = np.array([record[key] for record in records], float)  # null, which was not finite, is a gap
        style = {"color": "black", "linewidth": 2.2} if key == "loss" else {"color": f"C{index - 1}", "linewidth": 1.4}
        label = "after teacher dropping" if key == "loss" else key.removeprefix("loss/")
        axis.plot(steps, smooth(values, max(1, len(values) // 20)), label=label, **style)
        axis.plot(steps, values, color=style["color"], linewidth=0.6, alpha=0.3)
    axis.set(xlabel="step", ylabel="loss", xlim=(steps[0], steps[-1]), ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
