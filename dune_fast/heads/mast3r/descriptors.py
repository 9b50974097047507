"""MASt3R's head of local descriptors: a patch's tokens to a descriptor, and its confidence, of each of its pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dune_fast.kernels.nn.block import MLP, Linear


class DescriptorMLP(MLP):
    """[encoder's token, decoder's last token] -> the channels of p x p pixels.

    Args:
        width: channels of both tokens together.
        channels: of a pixel: the descriptor's and, where there is one, its confidence.
        patch_size: p, in pixels.
    """

    def __init__(self, width: int, channels: int, patch_size: int) -> None:
        super().__init__(width, 4 * width)
        self.fc2 = Linear(4 * width, channels * patch_size**2)
        self.patch_size = patch_size

    def forward(self, encoded: Tensor, decoded: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, h * w, E] and [B, h * w, D], row-major on `grid` = (h, w) -> [B, channels, ph, pw]."""
        x = super().forward(torch.cat([encoded, decoded], dim=-1))  # [B, h * w, channels * p * p]
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, grid), self.patch_size)
