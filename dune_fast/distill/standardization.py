"""Standardization of teachers' features per channel, with the statistics of all ranks.

    DUNE   y = (x - mean_batch) / max(std_batch, eps), eps = 1e-3; running statistics serve evaluation
    UNIC   y = (x - mean_run) / (std_run + eps), eps = 1e-6, with the running statistics from before the update; the
           batch deviation that updates them is std + eps
    PHI-S  y = (R x - mean) / max(phi, eps), eps = 1e-6: rotated by R first, see `dune_fast.distill.phi_s`
    fixed  y = (x - mean_all) / max(std_all, eps), eps = 1e-3: over all training images, known beforehand

    running = (1 - m) * running + m * batch,   unbiased std, over all images and patches of all ranks

PHI-S has no running statistics: `estimate` takes rotation, mean of R x and phi from the first batches of the run,
before its first step; then they are frozen. Its standardizer is per channel like the others, with equal deviations, so
one loss kernel serves all conventions; the rotation is one matrix product before it, in the features' own type.

Ranks exchange (count, sum, sum of squares) about a shift that all of them know, the running mean: one all-reduce for
all teachers, 16 bytes a channel. It is packed in float64, so that the first step, where the shift is still 0, loses
nothing either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dune_fast.distill.phi_s import SecondMoments, phi_s
from dune_fast.kernels.moments import moments

Features = Mapping[str, Mapping[str, Tensor]]
"""teacher -> token type -> [B, C] or [B, N, C]"""
AllReduce = Callable[[Tensor], None]
"""Sums a tensor over ranks, in place."""

CONVENTIONS = {"dune": 1e-3, "unic": 1e-6, "phi_s": 1e-6, "fixed": 1e-3}
"""convention -> eps"""
FROZEN = ("phi_s", "fixed")
"""Those whose statistics are known before the first step and stay."""


class Standardizer(NamedTuple):
    """y = (x - mean) * inv_std; float32 [C] each."""

    mean: Tensor
    inv_std: Tensor


class Normalizer(nn.Module):
    """Running statistics of one teacher's token type; where features are rotated, those of the rotated ones."""

    mean: Tensor
    std: Tensor
    rotation: Tensor | None

    def __init__(self, channels: int, rotated: bool = False, frozen: bool = False) -> None:
        super().__init__()
        # statistics that were not estimated must show: NaN makes every loss NaN
        self.register_buffer("mean", torch.full((channels,), torch.nan) if frozen else torch.zeros(channels))
        self.register_buffer("std", torch.full((channels,), torch.nan) if frozen else torch.ones(channels))
        self.register_buffer("rotation", torch.full((channels, channels), torch.nan) if rotated else None)

    def rotate(self, x: Tensor) -> Tensor:
        """R x for features [..., C], in their own type; x itself where there is no rotation."""
        return x if self.rotation is None else x @ self.rotation.T.to(x.dtype)

    def rotate_back(self, x: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        return x if self.rotation is None else x @ self.rotation.to(x.dtype)


class TeacherStatistics(nn.Module):
    """Running and batch statistics of every teacher and token type.

    State: `<teacher>.normalizers.<token>.{mean,std}`, float32 [C], as in the published checkpoints; for PHI-S
    `rotation` [C, C] too.

    Args:
        teachers: name -> (channels, token types).
        convention: one of CONVENTIONS, see above.
        eps: of the formula; the convention's own by default.
    """

    def __init__(
        self, teachers: Mapping[str, tuple[int, Sequence[str]]], convention: str = "dune", eps: float | None = None
    ) -> None:
        super().__init__()
        if convention not in CONVENTIONS:
            raise ValueError(f"standardization convention {convention!r}; choose one of {', '.join(CONVENTIONS)}")
        self.convention = convention
        self.eps = CONVENTIONS[convention] if eps is None else eps
        for name, (channels, token_types, *_) in teachers.items():
            holder = nn.Module()
            holder.normalizers = nn.ModuleDict(
                {token: Normalizer(channels, convention == "phi_s", convention in FROZEN) for token in token_types}
            )
            self.add_module(name, holder)

    def items(self) -> list[tuple[str, str, Normalizer]]:
        """(teacher, token type, running statistics), in a fixed order."""
        return [
            (name, token, normalizer)
            for name, teacher in self.named_children()
            for token, normalizer in teacher.normalizers.items()
        ]

    def running(self) -> dict[str, dict[str, Standardizer]]:
        """Standardizers of the running statistics, for evaluation."""
        standardizers: dict[str, dict[str, Standardizer]] = {}
        for name, token, normalizer in self.items():
            inverse = 1.0 / self.denominator(normalizer.std)
            standardizers.setdefault(name, {})[token] = Standardizer(normalizer.mean.clone(), inverse)
        return standardizers

    @torch.no_grad()
    def update(
        self, features: Features, momentum: float, all_reduce: AllReduce | None = None
    ) -> dict[str, dict[str, Standardizer]]:
        """Takes one global batch in and returns the standardizers that this step trains with.

        Args:
            features: this rank's raw features, `rotated`; ranks may hold different numbers of rows, also no rows.
            momentum: m of the formula for this step; at 0 the statistics are frozen and the running ones standardize,
                as in evaluation, whatever the convention. PHI-S and fixed statistics have none.
            all_reduce: sums a float64 tensor over ranks; None on a single rank.
        """
        if momentum == 0 or self.convention in FROZEN:
            return self.running()
        before = self.running() if self.convention == "unic" else None
        batch = self._batch_statistics(features, all_reduce)
        standardizers: dict[str, dict[str, Standardizer]] = {}
        for (name, token, normalizer), (mean, std) in zip(self.items(), batch, strict=True):
            if self.convention == "unic":
                std = std + self.eps
            standardizers.setdefault(name, {})[token] = Standardizer(mean, 1.0 / self.denominator(std))
            normalizer.mean.lerp_(mean, momentum)
            normalizer.std.lerp_(std, momentum)
        return before or standardizers

    def rotated(self, features: Features) -> Features:
        """Raw features in the basis that the standardizers are for: PHI-S rotates, the others leave them alone."""
        if self.convention != "phi_s":
            return features
        return self._map(features, lambda normalizer, x: normalizer.rotate(x))

    def restored(self, standardized: Features) -> Features:
        """Standardized features, or what a student takes for them, in the teachers' own scale and basis."""
        return self._map(
            standardized,
            lambda normalizer, x: normalizer.rotate_back(x * self.denominator(normalizer.std) + normalizer.mean),
        )

    @torch.no_grad()
    def estimate(self, batches: Iterable[Features], all_reduce: AllReduce | None = None) -> None:
        """PHI-S: rotations, means and scales from raw features; replaces what there was.

        Ranks that are on different devices may find different eigenvectors of equal eigenvalues: share one rank's
        buffers afterwards.

        Args:
            batches: this rank's features, batch by batch; their union over ranks and batches counts, not its parts.
            all_reduce: sums a float64 tensor over ranks, 8 (C + 1)^2 bytes a token type and fewer; None on one rank.

        Raises:
            HadamardError: there is no rotation for a teacher's number of channels.
            ValueError: another convention, or a token type without any row.
        """
        if self.convention != "phi_s":
            raise ValueError(f"the convention {self.convention!r} estimates nothing beforehand; 'phi_s' does")
        moments = [SecondMoments(len(normalizer.mean), normalizer.mean.device) for _, _, normalizer in self.items()]
        for features in batches:
            for (name, token, _), sums in zip(self.items(), moments, strict=True):
                sums.add(features[name][token])
        for (name, token, normalizer), sums in zip(self.items(), moments, strict=True):
            if all_reduce is not None:
                all_reduce(sums.sums)
            if sums.sums[0] < 2:
                raise ValueError(f"PHI-S got no two rows of {name}'s {token} tokens: give it more batches")
            mean, covariance = sums.mean_and_covariance()
            rotation, scale = phi_s(covariance)
            normalizer.rotation.copy_(rotation)
            normalizer.mean.copy_(rotation @ mean)
            normalizer.std.copy_(scale)

    @torch.no_grad()
    def fix(self, moments: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> None:
        """The convention "fixed": takes its statistics, teacher -> token type -> mean and deviation [C]."""
        assert self.convention == "fixed", self.convention
        for name, token, normalizer in self.items():
            for own, given in zip((normalizer.mean, normalizer.std), moments[name][token], strict=True):
                own.copy_(given)

    def _map(self, features: Features, function: Callable[[Normalizer, Tensor], Tensor]) -> Features:
        normalizers = {(name, token): normalizer for name, token, normalizer in self.items()}
        return {
            name: {token: function(normalizers[name, token], x) for token, x in tokens.items()}
            for name, tokens in features.items()
        }

    def denominator(self, std: Tensor) -> Tensor:
        """What features are divided by, of their deviations, by the convention."""
        return std + self.eps if self.convention == "unic" else std.clamp_min(self.eps)

    def _batch_statistics(self, features: Features, all_reduce: AllReduce | None) -> list[tuple[Tensor, Tensor]]:
        """Global mean and unbiased deviation, float32 [C], in the order of `items`."""
        packed = []
        for name, token, normalizer in self.items():
            x = features[name][token]
            rows = x.numel() // x.shape[-1]
            count = torch.full((1,), rows, dtype=torch.float64, device=x.device)
            if rows:
                mean, m2 = (moment.double() for moment in moments(x))
                delta = mean - normalizer.mean.double()
                packed += [count, rows * delta, m2 + rows * delta.square()]
            else:
                packed += [count, count.new_zeros(2 * x.shape[-1])]
        sums = torch.cat(packed)
        if all_reduce is not None:
            all_reduce(sums)
        statistics = []
        at = 0
        for _, _, normalizer in self.items():
            channels = len(normalizer.mean)
            count, total, squares = sums[at : at + 1 + 2 * channels].split([1, channels, channels])
            at += 1 + 2 * channels
            delta = total / count.clamp_min(1)
            variance = (squares - count * delta.square()).clamp_min(0) / (count - 1).clamp_min(1)
            std = torch.where(count > 1, variance.sqrt().float(), normalizer.std)  # fewer than two rows: unchanged
            statistics.append(((normalizer.mean.double() + delta).float(), std))
        return statistics
