"""What is known of one teacher's token type, and how its features are standardized with it; running PHI-S aside.

The conventions are in `dune_fast.distill.standardization`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dune_fast.distill.stored_statistics import bf16_standardized

CONVENTIONS = {"dune": 1e-3, "unic": 1e-6, "phi_s": 1e-6, "fixed": 1e-3, "none": 1e-3, "phi_s_running": 1e-6,
               "stored": 0.0, "stored_bf16": 0.0}  # fmt: skip
"""convention -> eps"""
FROZEN = ("phi_s", "fixed", "none", "stored", "stored_bf16")
"""Those whose statistics are known before the first step and stay."""
BATCH = ("dune", "unic")
"""Those that take the statistics of a batch."""
ROTATED = ("phi_s", "phi_s_running")
"""Those that need a Hadamard matrix of the teacher's channels."""
STORED = ("stored", "stored_bf16")
"""Those whose statistics are in files, see `dune_fast.distill.stored_statistics`."""
PREPARED = (*ROTATED, "stored_bf16")
"""Those that change features before their standardizer sees them."""


class Standardizer(NamedTuple):
    """y = (x - mean) * inv_std; float32 [C] each."""

    mean: Tensor
    inv_std: Tensor


class Normalizer(nn.Module):
    """Running statistics of one teacher's token type; where features are rotated, those of the rotated ones."""

    mean: Tensor
    std: Tensor
    rotation: Tensor | None

    def __init__(self, channels: int, convention: str, eps: float) -> None:
        super().__init__()
        self.convention, self.eps = convention, eps
        # statistics that were not estimated must show: NaN makes every loss NaN
        known = convention not in FROZEN or convention == "none"
        self.register_buffer("mean", torch.zeros(channels) if known else torch.full((channels,), torch.nan))
        self.register_buffer("std", torch.ones(channels) if known else torch.full((channels,), torch.nan))
        rotated = convention == "phi_s"
        self.register_buffer("rotation", torch.full((channels, channels), torch.nan) if rotated else None)

    def rotate(self, x: Tensor) -> Tensor:
        """R x for features [..., C], in their own type; x itself where there is no rotation. Where arithmetic is
        bfloat16's, standardized features: what follows changes them no more."""
        if self.convention == "stored_bf16":
            return bf16_standardized(x, self.mean, self.std)
        return x if self.rotation is None else x @ self.rotation.T.to(x.dtype)

    def restore(self, y: Tensor) -> Tensor:
        """Raw features of standardized ones [..., C]."""
        x = y * self.denominator(self.std) + self.mean
        return x if self.rotation is None else x @ self.rotation.to(x.dtype)

    def running(self) -> Standardizer:
        """The standardizer of the running statistics."""
        if self.convention == "stored_bf16":
            return Standardizer(torch.zeros_like(self.mean), torch.ones_like(self.std))
        return Standardizer(self.mean.clone(), 1.0 / self.denominator(self.std))

    def denominator(self, std: Tensor) -> Tensor:
        """What features are divided by, of their deviations, by the convention."""
        return std + self.eps if self.convention == "unic" else std.clamp_min(self.eps)

    def inverse(self) -> tuple[Tensor, Tensor]:
        """The matrix [C, C] and the vector [C] of x = matrix y + vector, float64; for `phi_s_running.fold`."""
        scale, mean = self.denominator(self.std).double(), self.mean.double()
        if self.rotation is None:
            return scale.diag(), mean
        back = self.rotation.double().T
        return back * scale, back @ mean
