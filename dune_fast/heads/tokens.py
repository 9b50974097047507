"""What heads read of an encoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dune_fast.kernels.nn.vit import VisionTransformer


class EncoderTokens(NamedTuple):
    """Of B images; N = rows x columns patches, row-major."""

    cls: Tensor | None
    """[B, C], after the final norm; None where the encoder has none."""
    patch: Tensor
    """[B, N, C], after the final norm."""
    raw_cls: Tensor | None
    """[B, C], before the final norm."""
    raw_patch: Tensor
    """[B, N, C], before the final norm."""
    grid: tuple[int, int]
    """(rows, columns)."""


@torch.no_grad()
def encode(encoder: VisionTransformer, images: Tensor) -> EncoderTokens:
    """One pass of the frozen encoder over images [B, 3, H, W], normalised as `encoder.transform` does."""
    found = encoder(images)
    raw_cls, _, raw_patch = encoder.split(found["x_prenorm"])
    cls = found.get("x_norm_clstoken")
    return EncoderTokens(cls, found["x_norm_patchtokens"], raw_cls, raw_patch, encoder.grid(images))
