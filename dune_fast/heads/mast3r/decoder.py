"""MASt3R's decoder: two streams of tokens, one a view, each block of a stream reading the other stream too.

    f_v = decoder_embed(e_v)                                       e_v: the encoder's tokens of view v
    f1', f2' = block1(f1, f2), block2(f2, f1)                      both read the outputs of the step before

    x = x + SA(norm1(x));  x = x + CA(norm2(x), norm_y(y));  x = x + MLP(norm3(x))        block(x, y)

RoPE2D turns the queries of both attentions by the positions of their own view, the keys of the cross-attention by
those of the other one. Leroy et al., "Grounding Image Matching in 3D with MASt3R", ECCV 2024; Wang et al., "DUSt3R",
CVPR 2024. Names of parameters are those of the releases.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dune_fast.heads.head import HeadError
from dune_fast.kernels.attention import cross_attention
from dune_fast.kernels.nn.block import (
    LAYER_NORM_EPS,
    MLP,
    LayerNorm,
    Linear,
    SelfAttention,
    product_dtype,
    run_branch,
)
from dune_fast.kernels.residual import residual
from dune_fast.kernels.rope2d import grid_positions, rope2d_angles, rotate

Angles = tuple[Tensor, Tensor]
"""(cos, sin) of `rope2d_angles`, each float32 [N, 2, head_dim / 4]."""
Grid = tuple[int, int]
"""(rows, columns) of patches."""


class CrossAttention(nn.Module):
    """Multi-head attention of a view's tokens x [B, N, D] to the other view's y [B, M, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.projq, self.projk, self.projv = (Linear(dim, dim) for _ in range(3))
        self.proj = Linear(dim, dim)

    last = property(lambda self: self.proj, doc="The layer whose output is the branch's.")

    def forward(self, x: Tensor, y: Tensor, rope_x: Angles, rope_y: Angles, add_bias: bool = True) -> Tensor:
        q, k, v = (
            proj(z).unflatten(-1, (self.num_heads, -1))  # [B, N or M, H, D / H]
            for proj, z in ((self.projq, x), (self.projk, y), (self.projv, y))
        )
        out = cross_attention(rotate(q, *rope_x), rotate(k, *rope_y), v)
        return self.proj(out.flatten(2), add_bias)


class DecoderBlock(nn.Module):
    """One block of one stream: self-attention, attention to the other stream, MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm_y = (LayerNorm(dim, eps=LAYER_NORM_EPS) for _ in range(4))
        self.attn = SelfAttention(dim, num_heads)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.mlp = MLP(dim, round(dim * mlp_ratio))

    def forward(self, x: Tensor, y: Tensor, rope_x: Angles, rope_y: Angles) -> Tensor:
        """x [B, N, D], the own stream, and y [B, M, D], the other one -> [B, N, D]."""
        dtype = product_dtype(x)
        branch, bias = run_branch(self.attn, self.norm1(x, out_dtype=dtype), rope_x)
        x, normed = self.norm2(x, branch, None, dtype, bias)
        branch, bias = run_branch(self.cross_attn, normed, self.norm_y(y, out_dtype=dtype), rope_x, rope_y)
        x, normed = self.norm3(x, branch, None, dtype, bias)
        branch, bias = run_branch(self.mlp, normed)
        return residual(x, branch, None, bias)


class Decoder(nn.Module):
    """Both streams. Weights are drawn as the release draws them: xavier uniform, zero biases.

    Args:
        width: channels of the encoder's tokens.
        dim: channels of the decoder's.
        depth: blocks of each stream.
        num_heads: attention heads, each of a multiple of 4 channels; HeadError if they do not divide `dim` so.
    """

    def __init__(self, width: int, dim: int = 768, depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4) -> None:
        super().__init__()
        if num_heads < 1 or dim % (4 * num_heads):
            raise HeadError(
                f"a decoder of {dim} channels with {num_heads} attention heads: RoPE2D needs heads of a multiple of 4 "
                "channels, so give a number of heads that divides a quarter of the channels"
            )
        self.head_dim = dim // num_heads
        self.decoder_embed = Linear(width, dim)
        self.dec_blocks = nn.ModuleList(DecoderBlock(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.dec_blocks2 = nn.ModuleList(DecoderBlock(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.dec_norm = LayerNorm(dim, eps=LAYER_NORM_EPS)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def angles(self, grid: Grid, device: torch.device | None = None) -> Angles:
        """RoPE2D's, of a view's grid."""
        return rope2d_angles(grid_positions(*grid, device=device), self.head_dim)

    def forward(self, tokens1: Tensor, tokens2: Tensor, grid1: Grid, grid2: Grid) -> tuple[list[Tensor], list[Tensor]]:
        """What the heads read of each view: its tokens as given, then after every block, the last ones normalised.

        Args:
            tokens1, tokens2: [B, N, width] and [B, M, width], row-major on their grids.
            grid1, grid2: (rows, columns), N and M of them.

        Returns:
            Of each view depth + 1 tensors: [B, N, width], then [B, N, dim].
        """
        rope1, rope2 = self.angles(grid1, tokens1.device), self.angles(grid2, tokens2.device)
        x1, x2 = self.decoder_embed(tokens1), self.decoder_embed(tokens2)
        outputs1, outputs2 = [tokens1], [tokens2]
        for block1, block2 in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            x1, x2 = block1(x1, x2, rope1, rope2), block2(x2, x1, rope2, rope1)
            outputs1.append(x1)
            outputs2.append(x2)
        outputs1[-1], outputs2[-1] = self.dec_norm(x1), self.dec_norm(x2)
        return outputs1, outputs2
