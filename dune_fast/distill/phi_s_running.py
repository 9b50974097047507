"""PHI-S as published for training: statistics run along, the rotation is made anew every `period` steps, then stays.

    every step     n += c,   sum += sum x,   S += sum (x - m)(x - m)^T   (S about the mean of all rows so far)
    every period   P = H V^T / phi  of S / (n - 1), see `dune_fast.distill.phi_s`; rows with a negative diagonal flipped
    targets        y = P (x - sum / n), with the mean of this step

After 30 periods everything stays: with the published 100 steps P is made at steps 1, 101, ..., 3001.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dune_fast.distill.normalizers import Standardizer
from dune_fast.distill.phi_s import ROWS, SecondMoments, phi_s

AllReduce = Callable[[Tensor], None]
"""Sums a tensor over ranks, in place."""

PERIOD = 100
PERIODS = 30
"""So many periods after the first step the statistics stay as they are."""


class RunningPhiS(nn.Module):
    """Running PHI-S of one teacher's token type.

    State, float64 but for the steps: `count`, `total` [C], `scatter` [C, C], `whiten` [C, C] (P), `alpha` (1 / phi),
    `rotated` (the count that P was made of), `steps`, int64.

    Args:
        channels: C.
        period: steps between two rotations.
        eps: the least phi.
    """

    convention = "phi_s_running"
    count: Tensor
    total: Tensor
    scatter: Tensor
    whiten: Tensor
    alpha: Tensor
    rotated: Tensor
    steps: Tensor

    def __init__(self, channels: int, period: int = PERIOD, eps: float = 1e-6) -> None:
        super().__init__()
        self.period, self.eps = period, eps
        # kept by the host, which so reads the device in two steps of a period: a step may be undone, and then not count
        self._settled = False
        self._unasked = 0  # updates that surely end no period
        for name, value in self._initial(channels).items():
            self.register_buffer(name, value)

    @staticmethod
    def _initial(channels: int) -> dict[str, Tensor]:
        options = {"dtype": torch.float64}
        return {
            "count": torch.zeros((), **options), "total": torch.zeros(channels, **options),
            "scatter": torch.zeros(channels, channels, **options), "whiten": torch.eye(channels, **options),
            "alpha": torch.ones((), **options), "rotated": torch.zeros((), **options),
            "steps": torch.zeros((), dtype=torch.int64),
        }  # fmt: skip

    def restart(self) -> None:
        """Forgets everything: a stage of the training begins."""
        self._settled, self._unasked = False, 0
        for name, value in self._initial(len(self.total)).items():
            getattr(self, name).copy_(value)

    @property
    def mean(self) -> Tensor:
        """Of all rows so far, float64 [C]."""
        return self.total / self.count.clamp_min(1)

    @torch.no_grad()
    def update(
        self, x: Tensor, valid: Tensor | None = None, all_reduce: AllReduce | None = None, leads: bool = True
    ) -> None:
        """Takes a global batch in, and makes P anew where a period is over.

        Args:
            x: this rank's features [..., C]; ranks may hold different numbers of rows, also no rows.
            valid: bool [...], the rows that count; all of them by default.
            all_reduce: sums a float64 tensor over ranks, 8 (1 + C + C^2) bytes; None on a single rank.
            leads: whether this is the one rank whose eigenvectors all take.
        """
        if self._settled:
            self.steps += 1
            return
        if self._unasked:
            self._unasked -= 1
            self._add(x, valid, all_reduce)
            return
        steps = int(self.steps)
        if steps > PERIODS * self.period:
            self._settled = True
            self.steps += 1
            return
        self._add(x, valid, all_reduce)
        if steps % self.period:
            self._unasked = self.period - 1 - steps % self.period  # that far every further step counts
            return
        seen, rotated = torch.stack([self.count, self.rotated]).tolist()
        if seen < 2:
            self.steps.zero_()
        elif seen != rotated:  # of the same rows it would be the same again
            self._rotate(all_reduce, leads)
            self.rotated.fill_(seen)

    @property
    def update_bytes(self) -> int:
        """The most that an update has beside the state: the rows in float64, twice, or the matrices of an `eigh`."""
        channels = len(self.total)
        return 8 * channels * max(channels + 2 * ROWS, 5 * channels)

    def _add(self, x: Tensor, valid: Tensor | None, all_reduce: AllReduce | None) -> None:
        """Takes the batch into count, sum, scatter and, if it has any row, steps."""
        moments = SecondMoments(len(self.total), self.total.device, self.mean)
        moments.add(x, valid)
        if all_reduce is not None:
            all_reduce(moments.sums)
        (count,), shifted, products = moments.parts()
        self.total += shifted + count * moments.shift
        self.count += count
        self.scatter += products - shifted.outer(shifted) / self.count.clamp_min(1)
        self.steps += count > 0

    def running(self) -> Standardizer:
        """What `rotate` leaves to be done: nothing."""
        ones = torch.ones_like(self.total, dtype=torch.float32)
        return Standardizer(torch.zeros_like(ones), ones)

    def inverse(self) -> tuple[Tensor, Tensor]:
        """As `Normalizer.inverse`."""
        return self.unwhiten, self.mean

    def _rotate(self, all_reduce: AllReduce | None, leads: bool) -> None:
        """P and alpha of the covariance so far."""
        covariance = self.scatter / (self.count - 1)
        finite = covariance.isfinite().all()  # eigh refuses what is not: then the loss is NaN, and the step is skipped
        rotation, phi = phi_s(covariance.where(finite, torch.eye(len(covariance)).to(covariance)))
        alpha = phi.clamp_min(self.eps).reciprocal().where(finite, torch.nan)
        whiten = alpha * rotation * torch.where(rotation.diagonal() < 0, -1.0, 1.0)[:, None]
        if all_reduce is not None:  # eigenvectors of equal eigenvalues are a library's choice: one rank's count
            shared = torch.cat([whiten.flatten(), alpha[None]])
            shared = shared if leads else torch.zeros_like(shared)
            all_reduce(shared)
            whiten, alpha = shared[:-1].view_as(whiten), shared[-1]
        self.whiten.copy_(whiten)
        self.alpha.copy_(alpha)

    def rotate(self, x: Tensor) -> Tensor:
        """y of features [..., C], computed in float32 (float64 stays), in their own type."""
        wide = x if x.dtype == torch.float64 else x.float()
        return ((wide - self.mean.to(wide.dtype)) @ self.whiten.T.to(wide.dtype)).to(x.dtype)

    def restore(self, y: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        wide = y if y.dtype == torch.float64 else y.float()
        return (wide @ self.unwhiten.T.to(wide.dtype) + self.mean.to(wide.dtype)).to(y.dtype)

    @property
    def unwhiten(self) -> Tensor:
        """P^-1, float64 [C, C]."""
        return self.whiten.T / self.alpha.square()


def fold(weight: Tensor, bias: Tensor | None, inverse: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """A head's last layer that gives raw features x = inverse y + mean, of one that gives standardized ones, y.

    Args:
        weight, bias: [C, D] and [C] or, of a head that enlarges its grid, [groups C, D] and [groups C].
        inverse: [C, C].
        mean: [C].

    Returns:
        Weight and bias of the same shapes, worked out in float64, in the weight's type.

    Raises:
        ValueError: the layer's outputs are no multiple of C.
    """
    if len(weight) % len(mean):
        raise ValueError(
            f"a layer of {len(weight)} outputs cannot take statistics of {len(mean)} channels in: its outputs must be "
            "a multiple of the channels"
        )
    back, groups = inverse.double(), weight.double().unflatten(0, (-1, len(mean)))  # [groups, C, D]
    shift = torch.zeros_like(groups[..., 0]) if bias is None else bias.double().unflatten(0, (-1, len(mean)))
    folded = (back @ groups).flatten(0, 1), (shift @ back.T + mean.double()).flatten()
    return folded[0].to(weight.dtype), folded[1].to(weight.dtype)
