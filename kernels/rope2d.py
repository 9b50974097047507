"""Rotary position embedding over a 2-D grid (RoPE2D, as in CroCo, DUSt3R and MASt3R).

The head dimension D is split in two halves; the first is rotated by the row index y, the second by the column index x.
Within a half of size D/2 the pair (j, j + D/4), j < D/4, is rotated by the angle p * base^(-4j/D), p the position:

    u' = u cos - v sin,   v' = v cos + u sin

The backward is the inverse rotation, sin replaced by -sin; it keeps nothing but the tables of cosines and sines.

Minimal bytes moved, bf16: q and k read and written once, 8 * B * N * H * D (the tables, 4 * N * D bytes, stay in the
cache for all images). `rope2d_` moves just that, in place. `rope2d`, for training, also copies v: 12 * B * N * H * D.
In place, autograd would clone the gradient of the written view and copy it into that of its base, which moves more.

Shapes: x [..., N, H, D] with positions [..., N, 2] = (y, x); qkv [B, N, 3, H, D]; cos, sin float32 [N, 2, D/4].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dune_fast.kernels.launching import VIT_CHANNELS, Example, Launch, choose, draw, launch
from dune_fast.kernels.library import followed, guard, guard_device, jit, register, tl, triton, use_triton, widen


def grid_positions(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Row-major (y, x) indices of a grid, int64 [height * width, 2]."""
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    return torch.stack([y, x], dim=-1)


def rope2d_angles(positions: Tensor, head_dim: int, base: float = 100.0) -> tuple[Tensor, Tensor]:
    """(cos, sin) of positions (y, x), integers [..., N, 2]: float32 [..., N, 2, D // 4], by axis and frequency.

    Float32 whatever the tokens' type: bf16 angles would be off by up to 0.06 rad at position 31. ValueError if
    `head_dim` D is no multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"RoPE2D needs a head dimension divisible by 4, got {head_dim}")
    quarter = head_dim // 4
    frequency = base ** (-torch.arange(quarter, device=positions.device, dtype=torch.float32) / quarter)
    angle = positions[..., None].float() * frequency  # [..., N, 2, D / 4]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [..., N, H, D] by angles [..., N, 2, D // 4] of `rope2d_angles`; in float32 (float64 for float64)."""
    wide = widen(x)
    # as whole heads: x cos + (v, u) (-sin, sin), two passes over all channels instead of six over quarters
    cos, sin = (torch.cat(pair, -1).flatten(-2).unsqueeze(-2).to(wide.dtype) for pair in ((cos, cos), (-sin, sin)))
    swapped = wide.unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)  # [..., N, H, axis, (u, v), D / 4] -> (v, u)
    return (wide * cos).addcmul_(swapped, sin).to(x.dtype)


def rope2d_reference(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope2d` in plain torch."""
    qk = rotate(qkv[:, :, :2].flatten(2, 3), cos, sin)  # q's and k's heads side by side
    return torch.cat([qk.unflatten(2, (2, -1)), qkv[:, :, 2:]], dim=2)


@jit
def _rotate_kernel(
    qkv, cos, sin, out, tokens, heads, stride_b, stride_n, stride_s, stride_h, stride_d,
    D: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """One program: one token, all heads of q and k; in place where out is None, else v is copied too."""
    QUARTER: tl.constexpr = D // 4
    program = tl.program_id(0)
    token = program % tokens
    source = qkv + (program // tokens).to(tl.int64) * stride_b + token.to(tl.int64) * stride_n
    pair = tl.arange(0, PAIRS)  # axis * D/4 + j
    row = tl.arange(0, HEADS)  # q's heads, then k's
    keep = pair < 2 * QUARTER
    inside = (row < 2 * heads)[:, None] & keep[None, :]
    c = tl.load(cos + token * 2 * QUARTER + pair, mask=keep, other=0.0)[None, :]
    s = tl.load(sin + token * 2 * QUARTER + pair, mask=keep, other=0.0)[None, :]
    if INVERSE:
        s = -s
    first = pair // QUARTER * 2 * QUARTER + pair % QUARTER  # u's channel, v's is D/4 further
    head = (row // heads).to(tl.int64) * stride_s + (row % heads).to(tl.int64) * stride_h
    at = source + head[:, None] + first[None, :] * stride_d
    u = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(at + QUARTER * stride_d, mask=inside, other=0.0).to(tl.float32)
    turned_u = (u * c - v * s).to(qkv.dtype.element_ty)
    turned_v = (v * c + u * s).to(qkv.dtype.element_ty)
    if out is None:
        tl.store(at, turned_u, mask=inside)
        tl.store(at + QUARTER * stride_d, turned_v, mask=inside)
    else:
        target = out + program.to(tl.int64) * 3 * heads * D
        to = target + row[:, None] * D + first[None, :]
        tl.store(to, turned_u, mask=inside)
        tl.store(to + QUARTER, turned_v, mask=inside)
        values = (row < heads)[:, None] & keep[None, :]
        at = source + 2 * stride_s + (row.to(tl.int64) * stride_h)[:, None] + first[None, :] * stride_d
        to = target + 2 * heads * D + row[:, None] * D + first[None, :]
        tl.store(to, tl.load(at, mask=values), mask=values)
        tl.store(to + QUARTER, tl.load(at + QUARTER * stride_d, mask=values), mask=values)


TABLE = {"default": [Launch(256, {"num_warps": 1}), Launch(512, {"num_warps": 2}), Launch(4096, {"num_warps": 4})]}
"""By heads * head_dim. Not yet measured: 8 to 16 elements a thread. At D = 64 u and v of a head are whole 32-byte
sectors."""


def _launch(qkv: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None, inverse: bool) -> None:
    batch, tokens, _, heads, dim = qkv.shape
    launch(
        _rotate_kernel, (batch * tokens,), qkv, cos.contiguous(), sin.contiguous(), out, tokens, heads, *qkv.stride(),
        D=dim, HEADS=triton.next_power_of_2(2 * heads), PAIRS=triton.next_power_of_2(dim // 2), INVERSE=inverse,
        **choose(TABLE, qkv.device, heads * dim),
    )  # fmt: skip


def _fused(qkv, cos, sin, inverse):
    out = qkv.new_empty(qkv.shape)
    _launch(qkv, cos, sin, out, inverse)
    return out


def _fused_(qkv, cos, sin):
    _launch(qkv[:, :, :2], cos, sin, None, False)  # v stays as it is


def _reference_(qkv, cos, sin):
    for qk in qkv[:, :, :2].unbind(0):  # an image's float32 copies fit a CPU's cache; those of all are fresh pages
        qk.copy_(rotate(qk.flatten(1, 2), cos, sin).unflatten(1, (2, -1)))


rope2d_op = register(
    "rope2d(Tensor qkv, Tensor cos, Tensor sin, bool inverse) -> Tensor",
    _fused, lambda qkv, cos, sin, inverse: rope2d_reference(qkv, cos, -sin if inverse else sin),
    lambda qkv, *_: qkv.new_empty(qkv.shape),
)  # fmt: skip
rope2d_inplace_op = register(
    "rope2d_(Tensor(a!) qkv, Tensor cos, Tensor sin) -> ()", _fused_, _reference_, lambda qkv, cos, sin: None
)


class _Rope2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rope2d_op(qkv, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return rope2d_op(dout, *ctx.saved_tensors, True), None, None


def _guard(operation: str, qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    guard_device(operation, qkv=qkv, cos=cos, sin=sin)
    guard(
        qkv.ndim == 5 and qkv.shape[2] == 3 and qkv.shape[4] % 4 == 0 and qkv.is_floating_point(),
        f"{operation} takes floating-point qkv of shape [B, N, 3, heads, head_dim], head_dim a multiple of 4", qkv=qkv,
    )  # fmt: skip
    table = (qkv.shape[1], 2, qkv.shape[4] // 4)
    rule = f"{operation} takes cos and sin [N, 2, head_dim / 4]"
    guard(cos.shape == sin.shape == table, rule, qkv=qkv, cos=cos, sin=sin)


def rope2d(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the queries and keys of qkv [B, N, 3, H, D], into a new tensor; the values pass through.

    qkv is fp32, bf16 or fp16 (others take the plain reference), with any strides; cos and sin are float32
    [N, 2, D // 4] from `rope2d_angles`. ValueError if shapes, types or devices do not fit.
    """
    _guard("rope2d", qkv, cos, sin)
    return _Rope2d.apply(qkv, cos, sin) if use_triton(qkv, cos, sin) else rope2d_reference(qkv, cos, sin)


def rope2d_(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope2d` in place; returns `qkv` itself. ValueError also if autograd follows `qkv`."""
    _guard("rope2d_", qkv, cos, sin)
    guard(not followed(qkv), "rope2d_ writes in place, call rope2d on a tensor that needs a gradient", qkv=qkv)
    if use_triton(qkv, cos, sin):
        rope2d_inplace_op(qkv, cos, sin)
    else:
        _reference_(qkv, cos, sin)
    return qkv


AOT = tuple(((128, 1024, channels), dtype) for channels in VIT_CHANNELS for dtype in (torch.bfloat16, torch.float32))


def examples(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Example]:
    """qkv [B, N, 3, C / 64, 64] of `dtype`, forward in place and not, and backward."""
    images, tokens, channels = shape
    qkv = draw((images, tokens, 3, channels // 64, 64), dtype, device)
    cos, sin = (draw((tokens, 2, 16), torch.float32, device) for _ in range(2))
    yield Example("rope2d_", rope2d_inplace_op, (qkv, cos, sin))
    yield Example("rope2d", rope2d_op, (qkv, cos, sin, False))
    yield Example("rope2d backward", rope2d_op, (qkv, cos, sin, True))
