"""How features are stored: float32, bfloat16, or a byte a number with a scale for every image and channel.

    int8   x ~ scale * q          scale = max |x| / 127 over the image's tokens
    fp8    x ~ scale * q          scale = max |x| / 448, q in float8_e4m3fn

A summary token (cls) has no other tokens to share a scale with: in these two formats it is stored in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = ("fp32", "bf16", "int8", "fp8")

_PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LARGEST = {"int8": 127.0, "fp8": 448.0}
SCALE = ".scale"
"""Suffix of the tensor that holds the scales."""


def encode(name: str, x: Tensor, form: str) -> dict[str, Tensor]:
    """Features to what is stored.

    Args:
        name: of the tensor.
        x: [B, N, C] patch tokens or [B, C] summary tokens, float32 or bfloat16.
        form: one of `FORMATS`.
    """
    if form in _PLAIN or x.ndim == 2:
        return {name: x.to(_PLAIN.get(form, torch.bfloat16))}
    x = x.float()
    scale = (x.abs().amax(1, keepdim=True) / _LARGEST[form]).clamp_min(1e-30)  # [B, 1, C]
    q = x / scale
    stored = q.round().to(torch.int8) if form == "int8" else q.to(torch.float8_e4m3fn)
    return {name: stored, name + SCALE: scale}


def decode(name: str, stored: dict[str, Tensor]) -> Tensor:
    """The inverse, but for rounding: float32 where float32 was stored, else bfloat16."""
    x = stored[name]
    if name + SCALE not in stored:
        return x
    return (x.float() * stored[name + SCALE]).to(torch.bfloat16)
