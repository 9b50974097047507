"""SAK's head of one task: four levels in a quarter of the width, fused on a grid of a quarter of the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHRINK = 4
"""Pixels of the image, in each direction, that one position of the output stands for."""


class DecodeHead(nn.Module):
    """Linear(D -> D / 4) a level, bilinear to a quarter of the image, Conv3 + BatchNorm + GELU, Conv1.

    Args:
        dim: channels of a level, D.
        outputs: channels of the task's output.
        levels: how many there are.
    """

    def __init__(self, dim: int, outputs: int, levels: int = 4) -> None:
        super().__init__()
        part = dim // 4
        self.linears = nn.ModuleList(nn.Linear(dim, part) for _ in range(levels))
        fused = part * levels
        self.linear_fuse = nn.Sequential(nn.Conv2d(fused, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.GELU())
        self.last_conv = nn.Conv2d(dim, outputs, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """[B, outputs, H / 4, W / 4] of maps [B, D, h, w] of images of H x W pixels, which is `size`."""
        quarter = (size[0] // SHRINK, size[1] // SHRINK)
        parts = [
            F.interpolate(linear(x.movedim(1, -1)).movedim(-1, 1), quarter, mode="bilinear", align_corners=False)
            for linear, x in zip(self.linears, maps, strict=True)
        ]
        return self.last_conv(self.linear_fuse(torch.cat(parts, 1)))
