"""The walk of a batch through one distillation step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dune_fast.distill.objective import ObjectiveConfig, coefficients, combine, teacher_losses
from dune_fast.distill.standardization import AllReduce, Features, TeacherStatistics


class StepOutput(NamedTuple):
    """Loss of this rank's batch, a scalar with gradient, and metrics, detached scalars on the device."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass
class DistillationStep:
    """Images in, loss out.

    No I/O, nothing read by the host, no logic of ranks but the one all-reduce that is passed in.
    """

    student: Callable[[Tensor], Features]
    """The student, wrapped or not: images -> teacher -> token type -> projection."""
    teachers: Callable[[Tensor], Features]
    """The frozen teachers: images -> teacher -> token type -> raw features."""
    statistics: TeacherStatistics
    """Updated in place by every step."""
    own: Tensor
    """Which dataset group counts for which teacher, bool [T, G], of `objective.ownership`."""
    objective: ObjectiveConfig
    seed: int = 0
    all_reduce: AllReduce | None = None

    def __call__(self, images: Tensor, groups: Tensor, positions: Tensor, step: int, momentum: float) -> StepOutput:
        """One forward pass.

        Args:
            images: ImageNet-normalised [B, 3, H, W].
            groups: int64 [B], dataset group of each image.
            positions: int64 [B], global index of each image in the run.
            step: of the run.
            momentum: of the teachers' running statistics.
        """
        projections = self.student(images)  # teacher -> token type -> [B, C] or [B, N, C]
        features = self.teachers(images)  # the same shapes, frozen
        standardizers = self.statistics.update(features, momentum, self.all_reduce)
        losses, parts = teacher_losses(projections, features, standardizers, self.objective)  # [T, B]
        c = coefficients(losses, self.own, groups, positions, step, self.seed, self.objective)  # [T, B]
        loss = combine(losses, c)
        return StepOutput(loss, self.metrics(loss, losses, c, parts, list(features)))

    @staticmethod
    def metrics(
        loss: Tensor, losses: Tensor, c: Tensor, parts: dict[str, Tensor], names: list[str]
    ) -> dict[str, Tensor]:
        """Means over this rank's batch: the loss, each teacher's before dropping, its share of the kept, its parts."""
        metrics = {"loss": loss.detach()}
        means, shares = losses.detach().mean(1), c.sum(1) / c.sum().clamp_min(1.0)
        for i, name in enumerate(names):
            metrics[f"loss/{name}"] = means[i]
            metrics[f"share/{name}"] = shares[i]
        metrics.update({f"loss/{key}": value.mean() for key, value in parts.items()})
        return metrics
