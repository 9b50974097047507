"""Standardization of teachers' features per channel, with the statistics of all ranks.

    DUNE   y = (x - mean_batch) / max(std_batch, eps), eps = 1e-3; running statistics serve evaluation
    UNIC   y = (x - mean_run) / (std_run + eps), eps = 1e-6, with the running statistics from before the update; the
           batch deviation that updates them is std + eps

    running = (1 - m) * running + m * batch,   unbiased std, over all images and patches of all ranks

Ranks exchange (count, sum, sum of squares) about a shift that all of them know, the running mean: one all-reduce for
all teachers, 16 bytes a channel. It is packed in float64, so that the first step, where the shift is still 0, loses
nothing either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.moments import moments

Features = Mapping[str, Mapping[str, Tensor]]
"""teacher -> token type -> [B, C] or [B, N, C]"""
AllReduce = Callable[[Tensor], None]
"""Sums a tensor over ranks, in place."""

CONVENTIONS = {"dune": 1e-3, "unic": 1e-6}
"""convention -> eps"""


class Standardizer(NamedTuple):
    """y = (x - mean) * inv_std; float32 [C] each."""

    mean: Tensor
    inv_std: Tensor


class Normalizer(nn.Module):
    """Running statistics of one teacher's token type."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))


class TeacherStatistics(nn.Module):
    """Running and batch statistics of every teacher and token type.

    State: `<teacher>.normalizers.<token>.{mean,std}`, float32 [C], as in the published checkpoints.

    Args:
        teachers: name -> (channels, token types).
        convention: "dune" or "unic", see above.
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
        for name, (channels, token_types) in teachers.items():
            holder = nn.Module()
            holder.normalizers = nn.ModuleDict({token: Normalizer(channels) for token in token_types})
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
            inverse = 1.0 / self._denominator(normalizer.std)
            standardizers.setdefault(name, {})[token] = Standardizer(normalizer.mean.clone(), inverse)
        return standardizers

    @torch.no_grad()
    def update(
        self, features: Features, momentum: float, all_reduce: AllReduce | None = None
    ) -> dict[str, dict[str, Standardizer]]:
        """Takes one global batch in and returns the standardizers that this step trains with.

        Args:
            features: this rank's raw features; ranks may hold different numbers of rows, none excepted.
            momentum: m of the formula for this step; at 0 the statistics are frozen and the running ones standardize,
                as in evaluation, whatever the convention.
            all_reduce: sums a float64 tensor over ranks; None on a single rank.
        """
        if momentum == 0:
            return self.running()
        before = self.running() if self.convention == "unic" else None
        batch = self._batch_statistics(features, all_reduce)
        standardizers: dict[str, dict[str, Standardizer]] = {}
        for (name, token, normalizer), (mean, std) in zip(self.items(), batch, strict=True):
            if self.convention == "unic":
                std = std + self.eps
            standardizers.setdefault(name, {})[token] = Standardizer(mean, 1.0 / self._denominator(std))
            normalizer.mean.lerp_(mean, momentum)
            normalizer.std.lerp_(std, momentum)
        return before or standardizers

    def _denominator(self, std: Tensor) -> Tensor:
        return std.clamp_min(self.eps) if self.convention == "dune" else std + self.eps

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
            statistics.append(((normalizer.mean.double() + delta).float(), variance.sqrt().float()))
        return statistics
