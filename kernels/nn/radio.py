"""RADIO's ViT in evaluation: several summary tokens, a position table larger than the image, whole attention.

Positions are added to the patches alone; the table of M x M patches is resized bilinearly to a square of the grid's
longer side, whose top-left window is taken (CPE). Summary and register tokens come in front without positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.kernels.nn.patches import SharedPatches
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig


@dataclass
class RADIOConfig(ViTConfig):
    """Architecture of a `RADIOViT`; `cls_token` is true: there is at least one."""

    num_cls: int = 1
    """Summary tokens, one for each of its own teachers with another name."""
    summaries: tuple[int, ...] = (0,)
    """Indices of those that together are the summary."""
    normalized: bool = False
    """Whether the patches are standardized by a matrix that the weights bring, after the last block."""


def cropped_positions(table: Tensor, height: int, width: int) -> Tensor:
    """A table [1, M * M, D] for a grid, [1, height * width, D]: see the top of the file. In float32."""
    side = math.isqrt(table.shape[1])
    if height == width == side:
        return table.float()
    square = table.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    longer = max(height, width)
    square = F.interpolate(square, size=(longer, longer), mode="bilinear", align_corners=False)
    return square[:, :, :height, :width].flatten(2).transpose(1, 2)


class RADIOViT(VisionTransformer):
    """Tokens in the order [summaries, registers, patches]."""

    cfg: RADIOConfig

    def __init__(self, cfg: RADIOConfig) -> None:
        super().__init__(cfg)
        dim = cfg.embed_dim
        del self.cls_token
        if cfg.num_registers:
            del self.register_tokens
        self.prefix_tokens = nn.Parameter(torch.zeros(1, self.num_prefix_tokens, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (cfg.image_size // cfg.patch_size) ** 2, dim))
        if cfg.normalized:
            self.register_buffer("feature_mean", torch.zeros(dim))
            self.register_buffer("feature_matrix", torch.zeros(dim, dim))

    @property
    def num_cls(self) -> int:
        return self.cfg.num_cls

    def embed(self, images: Tensor, patches: SharedPatches | None = None) -> Tensor:
        x = self.patch_embed(images, patches) + cropped_positions(self.pos_embed, *self.grid(images))
        return torch.cat([self.prefix_tokens.to(x.dtype).expand(len(x), -1, -1), x], dim=1)

    def standardized(self, patches: Tensor) -> Tensor:
        """Patches [B, N, D] as the release gives them."""
        if not self.cfg.normalized:
            return patches
        return F.linear(patches - self.feature_mean.to(patches.dtype), self.feature_matrix.to(patches.dtype))
