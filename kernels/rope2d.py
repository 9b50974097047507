"""Rotary position embedding over a 2-D grid (RoPE2D, as in CroCo, DUSt3R and MASt3R).

The head dimension D is split in two halves; the first is rotated by the row index y, the second by the column index x.
Within a half of size D/2 the pair (j, j + D/4), j < D/4, is rotated by the angle p * base^(-4j/D), p the position:

    u' = u cos - v sin,   v' = v cos + u sin

Minimal bytes moved: read and write q and k once: 2 * 2 * B * N * H * D elements.
Shapes: x [..., N, H, D] with positions [..., N, 2] = (y, x); qkv [B, N, 3, H, D].
"""

from __future__ import annotations

import torch
from torch import Tensor


def grid_positions(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Row-major (y, x) indices of a grid, int64 [height * width, 2]."""
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    return torch.stack([y, x], dim=-1)


def rope2d_angles(positions: Tensor, head_dim: int, base: float = 100.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines for every token, float32 whatever the tokens' type.

    bf16 angles would be off by up to 0.06 rad at position 31.

    Args:
        positions: integer [..., N, 2] = (y, x).
        head_dim: D, divisible by 4.

    Returns:
        (cos, sin), each float32 [..., N, 2, D // 4]: the axis (y, x), then the frequency.
    """
    if head_dim % 4:
        raise ValueError(f"RoPE2D needs a head dimension divisible by 4, got {head_dim}")
    quarter = head_dim // 4
    frequency = base ** (-torch.arange(quarter, device=positions.device, dtype=torch.float32) / quarter)
    angle = positions[..., None].float() * frequency  # [..., N, 2, D / 4]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [..., N, H, D] by angles [..., N, 2, D // 4] of `rope2d_angles`; computes in float32."""
    halves = x.float().unflatten(-1, (2, 2, -1))  # [..., N, H, axis, (u, v), D / 4]
    u, v = halves.unbind(-2)
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # one angle for all heads
    return torch.stack([u * cos - v * sin, v * cos + u * sin], dim=-2).flatten(-3).to(x.dtype)


def rope2d(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the queries and keys of qkv [B, N, 3, H, D]; the values pass through.

    Args:
        qkv: [B, N, 3, H, D].
        cos, sin: float32 [N, 2, D // 4] from `rope2d_angles`.

    Returns:
        [B, N, 3, H, D], a new tensor.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"rope2d takes qkv of shape [B, N, 3, heads, head_dim], got {list(qkv.shape)}")
    qk = rotate(qkv[:, :, :2].flatten(2, 3), cos, sin)  # q's and k's heads side by side
    return torch.cat([qk.unflatten(2, (2, -1)), qkv[:, :, 2:]], dim=2)
