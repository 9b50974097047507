"""Segment Anything's image encoder: a ViT whose blocks attend within windows, some everywhere, and a neck.

    score[i, j] = q[i] . k[j] / sqrt(d) + q[i] . R_h[y_i - y_j + n - 1] + q[i] . R_w[x_i - x_j + n - 1]

R_h, R_w [2 n - 1, d] are tables of one block, n the side of its window or grid; for another side they are resized
linearly. A grid that is no multiple of the window is padded on the right and below. The padding takes part in
attention: its tokens are zeros before qkv, so each is the layer's bias after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.kernels.fp8 import FP8Rows
from dune_fast.kernels.nn.block import LAYER_NORM_EPS, LayerNorm, Linear, run_blocks
from dune_fast.kernels.nn.patches import SharedPatches
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig


@dataclass
class SAMConfig(ViTConfig):
    """Architecture of a `SAMEncoder`; cls, registers, LayerScale and the final norm are none."""

    window: int = 14
    """Side of a window, in patches."""
    global_blocks: tuple[int, ...] = ()
    """Indices from 0 of the blocks that attend everywhere."""
    neck: int = 256
    """Channels of the map that the neck makes; 0 where the weights have none."""


def relative_table(table: Tensor, side: int) -> Tensor:
    """A table [2 n - 1, d] for a window or grid of `side` patches, resized linearly: float32 [2 side - 1, d]."""
    if len(table) == 2 * side - 1:
        return table.float()
    return F.interpolate(table.float().t()[None], size=2 * side - 1, mode="linear", align_corners=False)[0].t()


def relative_scores(q: Tensor, table: Tensor, axis: int, shape: tuple[int, int]) -> Tensor:
    """q [B, heads, h w, d] times the table's rows of one axis of `shape` (h, w): [B, heads, h w, its side]."""
    side = shape[axis]
    steps = torch.arange(side, device=table.device)
    rows = relative_table(table, side)[steps[:, None] - steps + side - 1].to(q.dtype)  # [side, side, d]
    q = q.unflatten(2, shape)  # [B, heads, h, w, d]
    form = "bnyxc,ykc->bnyxk" if axis == 0 else "bnyxc,xkc->bnyxk"
    return torch.einsum(form, q, rows).flatten(2, 3)


class WindowedAttention(nn.Module):
    """Self-attention with relative positions, within windows or, with `window` 0, everywhere. x: [B, h, w, D]."""

    def __init__(self, dim: int, num_heads: int, window: int, side: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        rows = 2 * (window or side) - 1
        self.rel_pos_h = nn.Parameter(torch.zeros(rows, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(rows, dim // num_heads))

    last = property(lambda self: self.proj, doc="The layer whose output is the branch's.")

    def forward(self, x: Tensor | FP8Rows, rope: None = None, add_bias: bool = True) -> Tensor:
        qkv = self.qkv(x)  # [B, h, w, 3 D]
        batch, height, width, _ = qkv.shape
        if not self.window:
            return self.proj(self._attend(qkv), add_bias)
        w, down, right = self.window, -height % self.window, -width % self.window
        if down or right:
            padded = self.qkv.bias.to(qkv.dtype).expand(batch, height + down, width + right, -1).clone()
            padded[:, :height, :width] = qkv
            qkv = padded
        windows = qkv.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3)  # [B, rows, columns, w, w, 3 D]
        out = self._attend(windows.flatten(0, 2)).unflatten(0, windows.shape[:3])
        out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]
        return self.proj(out, add_bias)

    def _attend(self, qkv: Tensor) -> Tensor:
        """Attention over all of qkv [B, h, w, 3 D], with its positions: [B, h, w, D]."""
        shape = (qkv.shape[1], qkv.shape[2])
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
        rows = relative_scores(q, self.rel_pos_h, 0, shape)
        columns = relative_scores(q, self.rel_pos_w, 1, shape)
        bias = (rows[..., :, None] + columns[..., None, :]).flatten(3)  # [B, heads, N, N]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out.transpose(1, 2).flatten(2).unflatten(1, shape)


class ChannelNorm(LayerNorm):
    """LayerNorm over the channels of a map [B, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


class SAMEncoder(VisionTransformer):
    """Images [B, 3, H, W] -> maps [B, h, w, D] after chosen blocks; `neck` makes [B, 256, h, w] of the last one's."""

    cfg: SAMConfig

    def __init__(self, cfg: SAMConfig) -> None:
        super().__init__(cfg)
        side = cfg.image_size // cfg.patch_size
        for i, block in enumerate(self.blocks):
            window = 0 if i in cfg.global_blocks else cfg.window
            block.attn = WindowedAttention(cfg.embed_dim, cfg.num_heads, window, side)
        if cfg.neck:
            self.neck = nn.Sequential(
                nn.Conv2d(cfg.embed_dim, cfg.neck, 1, bias=False), ChannelNorm(cfg.neck, eps=LAYER_NORM_EPS),
                nn.Conv2d(cfg.neck, cfg.neck, 3, padding=1, bias=False), ChannelNorm(cfg.neck, eps=LAYER_NORM_EPS),
            )  # fmt: skip

    def block_outputs(
        self, images: Tensor, blocks: Sequence[int], patches: SharedPatches | None = None
    ) -> dict[int, Tensor]:
        """As `VisionTransformer.block_outputs`, of maps [B, h, w, D]."""
        x = self.embed(images, patches)
        x = x.to(self.stream(x)).unflatten(1, self.grid(images))
        return {i: x for i, x in enumerate(run_blocks(self.blocks[: max(blocks) + 1], x)) if i in blocks}

    def forward(self, images: Tensor) -> Tensor:
        """The neck's map [B, 256, h, w], or the last block's [B, h, w, D] where there is no neck."""
        last = len(self.blocks) - 1
        x = self.block_outputs(images, [last])[last]
        return self.neck(x.permute(0, 3, 1, 2)) if self.cfg.neck else x
