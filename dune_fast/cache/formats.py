"""How features are stored: float32, bfloat16, or a byte a number with a scale for every image and channel.

    int8   x ~ scale * q          scale = max |x| / 127 over the image's tokens
    fp8    x ~ scale * q          scale = max |x| / 448, q in float8_e4m3fn

With a basis (`cache.components`) x stands for the coefficients of patch tokens, which are decoded to the teacher's own
channels again:

    coefficients = (tokens - mean) components [C, K],    tokens ~ mean + coefficients components^T

A summary token (cls) has no other tokens to share a scale with, and is one of hundreds: in int8 and fp8 it is stored in
bfloat16, and it has no basis.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FORMATS = ("fp32", "bf16", "int8", "fp8")

_PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LARGEST = {"int8": 127.0, "fp8": 448.0}
SCALE = ".scale"
"""Suffix of the tensor that holds the scales."""


class Basis(NamedTuple):
    """Principal components of one teacher's patch tokens, float32."""

    mean: Tensor
    """[C]"""
    components: Tensor
    """[C, K], orthonormal columns."""

    def to(self, device: torch.device) -> Basis:
        """The same on a device."""
        return Basis(*(x.to(device, non_blocking=True) for x in self))


def encode(name: str, x: Tensor, form: str, basis: Basis | None = None) -> dict[str, Tensor]:
    """Features to what is stored.

    Args:
        name: of the tensor.
        x: [B, N, C] patch tokens or [B, C] summary tokens, float32 or bfloat16.
        form: one of `FORMATS`.
        basis: of the patch tokens, on their device.
    """
    if basis is not None and x.ndim == 3:
        x = (x.float() - basis.mean) @ basis.components
    if form in _PLAIN or x.ndim == 2:
        return {name: x.to(_PLAIN.get(form, torch.bfloat16))}
    x = x.float()
    scale = (x.abs().amax(1, keepdim=True) / _LARGEST[form]).clamp_min(1e-30)  # [B, 1, C]
    q = x / scale
    stored = q.round().to(torch.int8) if form == "int8" else q.to(torch.float8_e4m3fn)
    return {name: stored, name + SCALE: scale}


def decode(name: str, stored: dict[str, Tensor], basis: Basis | None = None) -> Tensor:
    """The inverse, but for rounding: float32 where float32 was stored, else bfloat16. Arguments: see `encode`."""
    x = stored[name]
    kind = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    if name + SCALE in stored:
        x = x.float() * stored[name + SCALE]
    if basis is not None and x.ndim == 3:
        x = torch.addmm(basis.mean, x.float().flatten(0, 1), basis.components.T).unflatten(0, x.shape[:2])
    return x.to(kind)
