"""What a step's loss takes of a device's memory beside the student's own, counted on tensors without data.

Teachers' features are standardized or rotated, laid on one grid with the student's projections and compared, forward
and backward, by the code that trains: what is enlarged, sampled or kept in float32 is counted as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dune_fast.distill.alignment import View
from dune_fast.distill.objective import ObjectiveConfig, teacher_losses
from dune_fast.distill.standardization import StandardizationConfig, TeacherStatistics
from dune_fast.distill.terms import TermWeights
from dune_fast.engine.fake_memory import Alive, by_value, without_content
from dune_fast.kernels.library import traced


class Compared(NamedTuple):
    """A teacher whose patches are compared with the student's."""

    name: str
    channels: int
    student: int
    """Patches of the student's projection, of an image."""
    teacher: int
    """Patches of the teacher, of an image."""
    dtype: torch.dtype
    """Of the student's projection."""
    view: int = 0
    """Side of its own crop in pixels; 0 where it sees the student's."""


@by_value
def loss_cost(
    objective: ObjectiveConfig, standardization: StandardizationConfig, teachers: Sequence[Compared], dtype: torch.dtype
) -> tuple[int, int]:
    """The most bytes that features, what becomes of them, and the projections' gradients have at once: fixed, and of an
    image. Summaries, which are little, are left out.

    Args:
        dtype: of the teachers' features.
    """
    objective = dataclasses.replace(objective, cls=TermWeights())
    widths = {teacher.name: (teacher.channels, ("patch",)) for teacher in teachers}
    with torch.device("meta"):
        statistics = TeacherStatistics.of(widths, standardization)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def most(images: int) -> int:
        projections = {
            t.name: {"patch": torch.empty(images, t.student, t.channels, dtype=t.dtype, requires_grad=True)}
            for t in teachers
        }
        views = {
            t.name: View(torch.empty(images, 3, 3), None, torch.empty(images, t.view, t.view))
            for t in teachers if t.view
        }  # fmt: skip

        def loss() -> Tensor:  # after which the features are kept as far as the backward pass needs them
            features = {t.name: {"patch": torch.empty(images, t.teacher, t.channels, dtype=dtype)} for t in teachers}
            features = statistics.rotated(features)
            return teacher_losses(projections, features, statistics.running(), objective, views=views)[0].mean()

        with Alive() as alive:
            loss().backward()
            return alive.most

    with mode, traced():
        without_content(statistics, mode)
        one, each = most(1), (most(128) - most(64)) // 64
    return one - each, each  # never below the peak: what is fixed may rule a small part, and less so a larger one
