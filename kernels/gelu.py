"""Bias and exact GELU, the epilogue of an MLP's first linear layer.

    u = x + bias,   h = u * Phi(u),   Phi(u) = (1 + erf(u / sqrt(2))) / 2       (not the tanh form)

Backward, u recomputed from x:

    dx = dh * (Phi(u) + u * phi(u)),   phi(u) = exp(-u^2 / 2) / sqrt(2 pi),   dbias = sum_rows dx

For results in bf16, fp16 and float8 the kernels take, with Q(x) = 1 - Phi(x) = 2^P(x) and P of degree 8,

    gelu(u) = max(u, 0) - |u| Q(|u|),   slope(u) = D(|u|) if u < 0 else 1 - D(|u|),   D(x) = Q(x) - x phi(x)

P is the minimax fit to log2 Q on [0, 14.5] with the weight 1 / min(1 + 1 / (30 max(x, 1) Q(x)), 1000). Against float64
h is off by at most 5e-7; relative to itself by 3e-6 for u >= -1, 1e-5 for u >= -3 and 2^-9 (half a unit of bf16) down
to where float32 underflows. The slope is off by 1.2e-6. It takes one special function and 19 instructions an element;
erf takes 43, and its rational forms lose what is left of Q below u = -5. Float32 results would show an error of 3e-6,
so for them the kernels take erf. In all types gelu(-inf) is its limit, 0, where torch has NaN.

x is the matrix product without its bias: the pass that makes dx then makes dbias too, which would otherwise read the
widest tensor of the block again. Arithmetic is float32. Minimal bytes moved, bf16: forward 4 an element, backward 6.
Kept for the backward: x. dbias is the sum of float32 partials [stripe, F] in a fixed order, without atomics, so every
run gives the same bits.

Shapes: x, h [..., F]; bias [F].
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dune_fast.kernels.launching import VIT_SHAPES, Example, Launch, choose, draw, launch, processors
from dune_fast.kernels.library import flat_rows, guard, guard_device, jit, register, tl, triton, use_triton, widen


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """`torch.nn.functional.gelu(x + bias)` in float32 (float64 for float64), cast to x's dtype."""
    wide = widen(x)
    return F.gelu(wide + bias.to(wide.dtype)).to(x.dtype)


def _backward_reference(dh, x, bias):
    u = x.float() + bias.float()
    grad = dh.float() * ((1 + torch.erf(u * math.sqrt(0.5))) / 2 + u * torch.exp(-u * u / 2) / math.sqrt(2 * math.pi))
    return grad.to(x.dtype).contiguous(), flat_rows(grad).sum(0)


@jit
def _upper_tail(x):
    """Q(x) = 1 - Phi(x) for x in [0, 14.5], where it underflows: 2 to the power of a polynomial, fitted to log2 Q."""
    p = 3.9858438327655676e-08 * x - 2.4335611215065e-06
    p = p * x + 6.290317833190784e-05
    p = p * x - 0.0009122294140979648
    p = p * x + 0.00839838944375515
    p = p * x - 0.05373644456267357
    p = p * x - 0.45864999294281006
    p = p * x - 1.1511977910995483
    return tl.exp2(p * x - 0.9999979734420776)


@jit
def gelu(u, DTYPE: tl.constexpr):
    """GELU of float32 values, for a result of type DTYPE; see the header for its error."""
    # beyond 14.5 nothing changes but that infinity times 0 cannot happen; NaN stays NaN
    if tl.float32 == DTYPE:
        u = tl.maximum(u, -14.5, propagate_nan=tl.PropagateNan.ALL)
        return 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    size = tl.minimum(tl.abs(u), 14.5, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(u, 0.0) - size * _upper_tail(size)


@jit
def _gelu_slope(u, DTYPE: tl.constexpr):
    """The derivative of `gelu`."""
    if tl.float32 == DTYPE:
        u = tl.clamp(u, -14.5, 14.5, propagate_nan=tl.PropagateNan.ALL)
        return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
    size = tl.minimum(tl.abs(u), 14.5, propagate_nan=tl.PropagateNan.ALL)
    density = tl.exp2(size * -0.7213475204444817 * size - 1.3257480647361593)  # exp(-u^2 / 2) / sqrt(2 pi)
    below = _upper_tail(size) - size * density
    return tl.where(u > 0, 1.0 - below, below)


@jit
def _forward_kernel(x, bias, h, rows, stride_x, F: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr):
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # 64 bits: rows * F passes 2^31
    col = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    keep = (col < F) | (F % BLOCK_F == 0)
    inside = (row < rows)[:, None] & keep[None, :]
    u = tl.load(x + row[:, None] * stride_x + col[None, :], mask=inside, other=0.0).to(tl.float32)
    u += tl.load(bias + col, mask=keep, other=0.0).to(tl.float32)[None, :]
    tl.store(h + row[:, None] * F + col[None, :], gelu(u, h.dtype.element_ty).to(h.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    dh, x, bias, dx, partials, rows, stride_dh, stride_x,
    F: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a block of columns in one stripe of rows (every stripes-th tile)."""
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    stripe, stripes = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    col = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    keep = (col < F) | (F % BLOCK_F == 0)
    b = tl.load(bias + col, mask=keep, other=0.0).to(tl.float32)[None, :]
    dbias = tl.zeros([ROWS, BLOCK_F], tl.float32)
    for start in tl.range(stripe * ROWS, rows, stripes * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & keep[None, :]
        u = tl.load(x + row[:, None] * stride_x + col[None, :], mask=inside, other=0.0).to(tl.float32) + b
        up = tl.load(dh + row[:, None] * stride_dh + col[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = up * _gelu_slope(u, x.dtype.element_ty)  # 0 outside
        tl.store(dx + row[:, None] * F + col[None, :], grad.to(dx.dtype.element_ty), mask=inside)
        dbias += grad
    tl.store(partials + stripe * F + col, tl.sum(dbias, 0), mask=keep)


FORWARD = {"default": [Launch(65536, {"ROWS": 8, "BLOCK_F": 256, "num_warps": 4})]}
"""By channels; the tile of a program. Not yet measured: 16 elements a thread, 2 loads of 16 bytes. 19 instructions an
element, so that bytes are the limit. 256 divides every ViT's MLP. 32 registers let 64 warps be resident."""
BACKWARD = {"default": [Launch(65536, {"ROWS": 8, "BLOCK_F": 256, "STAGES": 3, "per_processor": 6, "num_warps": 4})]}
"""By channels; the tile of an iteration, and how many programs share a multiprocessor where x has two bytes. Not yet
measured: 16 elements a thread, 28 instructions an element. 6 programs have 1 to 2 tiles of 8 KiB each on their way, 48
to 96 KiB a multiprocessor where 40 would do, and stay resident with up to 80 registers (64 to 72 are used)."""


def _forward_fused(x, bias):
    h = x.new_empty(x.shape)
    x = flat_rows(x)
    rows, channels = x.shape
    options = choose(FORWARD, x.device, channels)
    grid = triton.cdiv(rows, options["ROWS"]) * triton.cdiv(channels, options["BLOCK_F"])
    launch(_forward_kernel, (grid,), x, bias.contiguous(), h, rows, x.stride(0), F=channels, **options)
    return h


def _backward_fused(dh, x, bias):
    dx, _ = _backward_fake(dh, x, bias)
    dh, x = flat_rows(dh), flat_rows(x)
    rows, channels = x.shape
    options = choose(BACKWARD, x.device, channels)
    blocks = triton.cdiv(channels, options["BLOCK_F"])
    resident = options.pop("per_processor") * 2 // x.element_size() * processors(x.device)
    stripes = max(1, min(triton.cdiv(rows, options["ROWS"]), resident // blocks))  # all at once: no second wave
    partials = x.new_empty(stripes, channels, dtype=torch.float32)
    launch(
        _backward_kernel, (stripes * blocks,), dh, x, bias.contiguous(), dx, partials,
        rows, dh.stride(0), x.stride(0), F=channels, **options,
    )  # fmt: skip
    return dx, partials.sum(0)


def _backward_fake(dh, x, bias):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=torch.float32)


bias_gelu_op = register(
    "bias_gelu(Tensor x, Tensor bias) -> Tensor",
    _forward_fused, lambda x, bias: bias_gelu_reference(x, bias).contiguous(), lambda x, bias: x.new_empty(x.shape),
)  # fmt: skip
bias_gelu_backward_op = register(
    "bias_gelu_backward(Tensor dh, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    _backward_fused, _backward_reference, _backward_fake,
)  # fmt: skip


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return bias_gelu_op(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        x, bias = ctx.saved_tensors
        dx, dbias = bias_gelu_backward_op(dh, x, bias)
        return dx, dbias.to(bias.dtype)


def guard_bias_gelu(operation: str, x: Tensor, bias: Tensor) -> None:
    """The checks that every form of the operation shares; ValueError."""
    guard_device(operation, x=x, bias=bias)
    guard(
        x.ndim >= 1 and x.is_floating_point() and bias.shape == x.shape[-1:],
        f"{operation} takes floating-point x [..., F] and bias [F]", x=x, bias=bias,
    )  # fmt: skip


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Exact GELU of x + bias, [..., F] in x's dtype; ValueError if shapes, types or devices do not fit.

    Args:
        x: a matrix product before its bias [..., F], fp32, bf16 or fp16 (others take the reference), any strides.
        bias: [F].
    """
    guard_bias_gelu("bias_gelu", x, bias)
    return _BiasGelu.apply(x, bias) if use_triton(x, bias) else bias_gelu_reference(x, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of x W^T + b, [..., F], in the epilogue of the product, for frozen models: it is written once.

    On CUDA it is one kernel of cuBLASLt, whose GELU is the tanh form: within 5e-4 of the exact one, less than what
    rounding to bf16 changes where |u| > 0.25. On a CPU torch applies the exact form to the rounded product. No gradient
    flows. x [..., D], weight [F, D] and bias [F] are bf16 or fp16; ValueError if shapes, types or devices do not fit.
    """
    guard_device("linear_gelu", x=x, weight=weight, bias=bias)
    guard(
        x.ndim >= 1 and weight.shape == (*bias.shape, x.shape[-1]) and x.dtype == weight.dtype == bias.dtype,
        "linear_gelu takes x [..., D], weight [F, D] and bias [F] of one type", x=x, weight=weight, bias=bias,
    )  # fmt: skip
    with torch.no_grad():
        out = torch._addmm_activation(bias, flat_rows(x), weight.t(), use_gelu=True)
    return out.view(*x.shape[:-1], len(bias))


AOT = VIT_SHAPES


def examples(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Example]:
    """Products of MLPs, [B, N, 4 * C] of `dtype`, with parameters of float32 and of `dtype`."""
    x, dh = (draw((*shape[:2], 4 * shape[2]), dtype, device) for _ in range(2))
    for kept in (torch.float32, dtype):
        bias = draw(x.shape[2:], kept, device)
        yield Example(f"bias_gelu, {str(kept)[6:]} bias", bias_gelu_op, (x, bias))
        yield Example(f"bias_gelu_backward, {str(kept)[6:]} bias", bias_gelu_backward_op, (dh, x, bias))
