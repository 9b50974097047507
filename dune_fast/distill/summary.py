"""Losses of summary tokens that scale with the teacher's own spread: angle and tangent sphere; the plain cosine.

    cosine          1 - x . y / (max(|x|, 1e-12) max(|y|, 1e-12))
    angle           theta(x, y)^2 / D,   theta = arccos of the cosine, held within +-(1 - 1e-6)
                    D = max(A / n, 1e-8): the mean of theta(y, mean direction)^2 over all the teacher's vectors so far,
                    1 before the first
    tangent sphere  1 - cos, until `max_samples` vectors of the teacher have been seen; then, with the pole p in their
                    mean direction, the squared distance of log_p(x) and log_p(y), divided by the vectors' variance:
                    log_p(x) = theta / max(sin theta, 1e-6) * (x - p cos theta),   alpha^2 * mean_c (log x - log y)^2

alpha = 1 / sqrt(mean variance of a channel of log_p). The published loss rotates both log maps by PHI-S first; a
rotation that keeps distances up to alpha changes neither the value nor the gradient, so none is made here.

State is buffers, of all ranks' vectors: checkpoints keep it, a step that is skipped gives it back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.distill.standardization import AllReduce

ANGLE_SAMPLES, TANGENT_SAMPLES = 10_000_000, 16_384
"""Vectors that the published losses take into their statistics."""
_MARGIN = 1e-6


def summary_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of [..., C], norms held above 1e-12: [...]."""
    unit = (F.normalize(x, dim=-1, eps=1e-12) for x in (student, teacher))
    return 1.0 - torch.mul(*unit).sum(-1)


def angle(x: Tensor, y: Tensor) -> Tensor:
    """Angle between vectors [..., C] in radians, [...]; its gradient stays finite at 0 and at pi."""
    return F.cosine_similarity(x, y, dim=-1).clamp(-1 + _MARGIN, 1 - _MARGIN).acos()


class AngleDispersion(nn.Module):
    """The angle loss of one teacher; see the head of this file.

    State: `count`, `direction` [C] (sum of the teacher's raw vectors), `squares` (A), float64.

    Args:
        channels: C.
        max_samples: no more vectors are taken in once so many have been.
    """

    count: Tensor
    direction: Tensor
    squares: Tensor

    def __init__(self, channels: int, max_samples: float = ANGLE_SAMPLES) -> None:
        super().__init__()
        self.max_samples = max_samples
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("direction", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros((), dtype=torch.float64))

    def live(self) -> list[Tensor]:
        """What a skipped step gives back."""
        return list(self.buffers())

    @torch.no_grad()
    def update(self, teacher: Tensor, slots: Tensor, all_reduce: AllReduce | None = None) -> None:
        """Takes a rank's part of a global batch in.

        Args:
            teacher: [n, C]; n may be 0.
            slots: see `TangentSphere.update`; not looked at.
            all_reduce: sums a float64 tensor over ranks; None on a single rank.
        """
        rows, more = teacher.double(), self.count < self.max_samples
        sums = torch.cat([rows.new_full((1,), len(rows)), rows.sum(0)])
        _sum(sums, all_reduce)
        count, direction = self.count + sums[0], self.direction + sums[1:]
        squares = angle(rows, (direction / count.clamp_min(1)).expand_as(rows)).square().sum()
        _sum(squares, all_reduce)
        # chosen by value, not by the host: nothing is read from the device
        self.count.copy_(torch.where(more, count, self.count))
        self.direction.copy_(torch.where(more, direction, self.direction))
        self.squares.copy_(torch.where(more, self.squares + squares, self.squares))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Loss of every image, float32 [n], of vectors [n, C]."""
        spread = (self.squares / self.count.clamp_min(1)).clamp_min(1e-8)
        dispersion = torch.where(self.count > 0, spread, 1.0)  # of a teacher whose turn has not come
        return angle(student.float(), teacher.float()).square() / dispersion.float()


class TangentSphere(nn.Module):
    """The tangent-sphere loss of one teacher; see the head of this file.

    State: `count`; `samples` [max_samples + batch + 1, C], unit vectors, the first `count` of them (the last row is
    nobody's), none once the statistics stay; `pole` and `tangent_mean` [C], `alpha`. The count is int64, samples are
    float32, the rest is float64.

    Args:
        channels: C.
        max_samples: the statistics are made, and stay, once so many vectors have been seen.
        batch: images of a global batch.
    """

    count: Tensor
    samples: Tensor
    pole: Tensor
    tangent_mean: Tensor
    alpha: Tensor

    def __init__(self, channels: int, max_samples: int = TANGENT_SAMPLES, batch: int = 1024) -> None:
        super().__init__()
        self.max_samples, self.batch = max_samples, batch
        self._settled = False  # read once: before it is true, `count` is read at every step
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("samples", torch.zeros(max_samples + batch + 1, channels))
        self.register_buffer("pole", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("tangent_mean", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float64))

    def live(self) -> list[Tensor]:
        """What a skipped step gives back; rows of `samples` behind the restored count are written again."""
        return [self.count, self.pole, self.tangent_mean, self.alpha]

    @torch.no_grad()
    def update(self, teacher: Tensor, slots: Tensor, all_reduce: AllReduce | None = None) -> None:
        """Takes a rank's part of a global batch in.

        Args:
            teacher: [n, C]; n may be 0.
            slots: int64 [n], places of these images in the global batch, of all ranks different ones: vectors are
                kept in this order, for any number of ranks.
            all_reduce: sums a float32 tensor over ranks; None on a single rank.
        """
        if self._settled:
            return
        if int(self.count) >= self.max_samples:  # since the step before, which nobody undoes any more
            self._settled, self.samples = True, self.samples.new_empty(0, self.samples.shape[1])
            return
        total = self.count.new_full((), len(teacher))
        _sum(total, all_reduce)
        if not total:  # a teacher that no rank has an image for
            return
        rows = teacher.new_zeros(self.batch, teacher.shape[-1] + 1, dtype=torch.float32)
        unit = F.normalize(teacher.float(), dim=-1, eps=1e-12)
        rows.index_copy_(0, slots, F.pad(unit, (0, 1), value=1.0))  # the last column: whether there is one
        _sum(rows, all_reduce)
        given = rows[:, -1] > 0
        nobody = torch.full_like(given, len(self.samples) - 1, dtype=torch.int64)
        at = torch.where(given, self.count + given.cumsum(0) - 1, nobody)
        self.samples.index_copy_(0, at, rows[:, :-1])
        self.count += given.sum()
        if (count := int(self.count)) >= self.max_samples:
            self._settle(self.samples[:count].double())

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        if (given := state_dict.get(f"{prefix}samples")) is not None and not len(given):
            self.samples = self.samples.new_empty(given.shape)  # of a sphere that had let them go
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _settle(self, unit: Tensor) -> None:
        """Pole, mean and scale of unit vectors [n, C]."""
        self.pole.copy_(F.normalize(unit.mean(0), dim=0))
        tangent = self.log_map(unit)
        self.tangent_mean.copy_(tangent.mean(0))
        self.alpha.copy_(tangent.var(0).mean().clamp_min(1e-12).rsqrt())

    def log_map(self, x: Tensor) -> Tensor:
        """The tangent vectors at the pole of unit vectors [n, C], in their type."""
        pole = self.pole.to(x.dtype)
        cosine = (x * pole).sum(-1, keepdim=True).clamp(-1 + _MARGIN, 1 - _MARGIN)
        theta = cosine.acos()
        return theta / theta.sin().clamp_min(1e-6) * (x - pole * cosine)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Loss of every image, float32 [n], of vectors [n, C]."""
        student, teacher = student.float(), teacher.float()
        plain = summary_cosine(student, teacher)
        logs = [self.log_map(F.normalize(x, dim=-1, eps=1e-12)) for x in (student, teacher)]
        squared = self.alpha.float().square() * (logs[0] - logs[1]).square().mean(-1)
        return torch.where(self.count >= self.max_samples, squared, plain)


def _sum(x: Tensor, all_reduce: AllReduce | None) -> None:
    if all_reduce is not None:
        all_reduce(x)
