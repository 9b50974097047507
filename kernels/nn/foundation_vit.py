"""The frozen ViTs of CLIP, SigLIP, DINOv3 and EUPE: the encoder of `vit.py` and what theirs have beside it.

- `pre_norm`: a LayerNorm before the first block (CLIP).
- `pos_embed: rope2d` with cls and registers, which are not rotated; positions are centres of patches in [-1, 1], so a
  grid of any size covers the same angles (DINOv3):

      angle = 2 pi (2 (k + 1/2) / n - 1) / period,   k < n: row of n rows, or column of n columns

- `pool`: cls is read by a learned query from all patches (SigLIP):

      y = Attention(query, patches);   cls = y + MLP(LN(y))

- `projection`: a linear layer, without bias, from cls to the space that texts share (CLIP).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.kernels.nn.block import ACTIVATIONS, LAYER_NORM_EPS, MLP, MLP_KINDS, LayerNorm, Linear
from dune_fast.kernels.nn.draws import StepDraws
from dune_fast.kernels.nn.patches import SharedPatches
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig


@dataclass
class FoundationConfig(ViTConfig):
    """Architecture of a `FoundationViT`."""

    norm_eps: float = LAYER_NORM_EPS
    """Epsilon of every LayerNorm."""
    pre_norm: bool = False
    """Whether there is a LayerNorm before the first block."""
    pool: bool = False
    """Whether cls is read from the patches by attention."""
    projection: int = 0
    """Channels of cls after its projection; 0 for none."""

    mlp_kinds = (*MLP_KINDS, *ACTIVATIONS)


def centred_angles(height: int, width: int, periods: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angles of a grid's patches, row-major: float32 [height * width, 2, D / 4], rows before columns.

    `periods` [D / 4], of a head of D channels, are in units of half a grid's side.
    """
    rows, columns = (
        (torch.arange(n, device=periods.device, dtype=torch.float32) + 0.5) / n * 2 - 1 for n in (height, width)
    )
    centres = torch.stack([rows.repeat_interleave(width), columns.repeat(height)], dim=-1)
    angles = 2 * math.pi * centres[..., None] / periods  # [N, 2, D / 4]
    return angles.cos(), angles.sin()


class AttentionPool(nn.Module):
    """A learned query that reads all patches, then an MLP around which the result is added. [B, N, D] -> [B, D]."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, activation: str, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.probe = nn.Parameter(torch.zeros(1, 1, dim))
        self.in_proj = Linear(dim, 3 * dim)
        self.out_proj = Linear(dim, dim)
        self.norm = LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, hidden_dim, activation)

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        weight, bias = self.in_proj.weight, self.in_proj.bias
        query = F.linear(self.probe.to(x.dtype), weight[:dim], bias[:dim]).expand(len(x), -1, -1)
        key, value = F.linear(x, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        heads = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        y = self.out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))  # [B, 1, D]
        return (y + self.mlp(self.norm(y)))[:, 0]


class FoundationViT(VisionTransformer):
    """See the top of the file; `forward` and `block_outputs` are `VisionTransformer`'s."""

    cfg: FoundationConfig

    def __init__(self, cfg: FoundationConfig) -> None:
        super().__init__(cfg)
        dim = cfg.embed_dim
        if cfg.pre_norm:
            self.norm_pre = LayerNorm(dim, eps=cfg.norm_eps)
        if cfg.pool:
            self.pool = AttentionPool(dim, cfg.num_heads, int(dim * cfg.mlp_ratio), cfg.mlp, cfg.norm_eps)
        if cfg.projection:
            self.projection = nn.Linear(dim, cfg.projection, bias=False)
        if cfg.pos_embed == "rope2d":
            self.register_buffer("rope_periods", torch.zeros(dim // cfg.num_heads // 4))

    def embed(self, images: Tensor, patches: SharedPatches | None = None, draws: StepDraws | None = None) -> Tensor:
        x = super().embed(images, patches, draws)
        if self.cfg.pos_embed == "rope2d":  # cls and registers, which the table does not bring
            tokens = [self.cls_token, self.register_tokens] if self.cfg.num_registers else [self.cls_token]
            x = torch.cat([torch.cat(tokens, dim=1).expand(len(x), -1, -1), x], dim=1)
        return self.norm_pre(x) if self.cfg.pre_norm else x

    def rope(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.cfg.pos_embed != "rope2d":
            return None
        cos, sin = centred_angles(*self.grid(images), self.rope_periods)
        still = (0, 0, 0, 0, self.num_prefix_tokens, 0)  # tokens before the patches are turned by no angle
        return F.pad(cos, still, value=1.0), F.pad(sin, still)
