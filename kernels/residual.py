"""Residual addition with LayerScale, where no norm follows: the end of an encoder or a projector.

    out = x + gamma * (y + b)                   y is a branch's last product, b that layer's bias

Backward, with dout, which is dx too:

    dy = gamma * dout,   db = gamma * sum_rows dout,   dgamma = sum_rows dout * y + b * sum_rows dout

gamma and b may be missing. Where a norm follows, `kernels.layer_norm` does both. Minimal bytes moved for each element
at the end of an encoder (x and out float32, y bf16): forward 10, backward 8, as dout passes through. At the end of a
projector, whose out is bf16 for the product that reads it: forward 8, backward dout 2 + y 2 + dx 4 + dy 2 = 10.
Arithmetic is float32. Kept for the backward: y, if gamma is trained. Kernels and the order of sums: see
`kernels.layer_norm_kernels`.

Shapes: x, y, out [..., C]; gamma, b [C].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dune_fast.kernels.launching import VIT_SHAPES, Example, draw
from dune_fast.kernels.layer_norm import (
    branch_gradients,
    branch_saved,
    branch_sums,
    guard_layer_norm,
    residual_reference,
)
from dune_fast.kernels.layer_norm_kernels import launch_backward, launch_forward
from dune_fast.kernels.library import flat_rows, register, use_triton


def _forward_fused(x, y, gamma, branch_bias, dtype):
    out = x.new_empty(x.shape, dtype=dtype)
    launch_forward(x, y, gamma, branch_bias, None, None, out, None, None, None, 0.0)
    return out


def _backward_fused(dout, y, gamma, branch_bias, dx_dtype, dy_dtype):
    dx, dy, _ = _backward_fake(dout, y, gamma, branch_bias, dx_dtype, dy_dtype)
    written = [None if dtype is None else g for g, dtype in ((dx, dx_dtype), (dy, dy_dtype))]
    return dx, dy, launch_backward(None, dout, None, y, gamma, branch_bias, None, None, None, *written)


def _backward_reference(dout, y, gamma, branch_bias, dx_dtype, dy_dtype):
    dx, dy, sums = _backward_fake(dout, y, gamma, branch_bias, dx_dtype, dy_dtype)
    grad = dout.float()
    if dx_dtype is not None:
        dx.copy_(grad)
    if dy_dtype is not None:
        dy.copy_(grad if gamma is None else grad * gamma.float())
    for i, value in enumerate(branch_sums(flat_rows(grad), y, gamma, branch_bias)):
        sums[i] = value
    return dx, dy, sums


def _backward_fake(dout, y, gamma, branch_bias, dx_dtype, dy_dtype):
    """dx and dy, empty without a type; dgamma if there is a y, then branch_bias's gradient if there is one."""
    dx, dy = (dout.new_empty(0 if t is None else dout.shape, dtype=t or dout.dtype) for t in (dx_dtype, dy_dtype))
    sums = (y is not None) + (branch_bias is not None)
    return dx, dy, dout.new_empty(sums, dout.shape[-1], dtype=torch.float32)


residual_op = register(
    "residual(Tensor x, Tensor y, Tensor? gamma, Tensor? branch_bias, ScalarType dtype) -> Tensor",
    _forward_fused, lambda *args: residual_reference(*args).contiguous(),
    lambda x, y, gamma, branch_bias, dtype: x.new_empty(x.shape, dtype=dtype),
)  # fmt: skip
residual_backward_op = register(
    "residual_backward(Tensor dout, Tensor? y, Tensor? gamma, Tensor? branch_bias, ScalarType? dx_dtype, "
    "ScalarType? dy_dtype) -> (Tensor, Tensor, Tensor)",
    _backward_fused, _backward_reference, _backward_fake,
)  # fmt: skip


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gamma, branch_bias, dtype):
        ctx.save_for_backward(*branch_saved(ctx, y, gamma, branch_bias))
        ctx.dtypes = [None if t is None else t.dtype for t in (x, y, gamma, branch_bias)]
        return residual_op(x, y, gamma, branch_bias, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        y, gamma, branch_bias = ctx.saved_tensors
        x_dtype, y_dtype, *parameter_dtypes = ctx.dtypes
        dx_dtype = None if x_dtype == dout.dtype else x_dtype  # of the gradients that dout itself is not
        dy_dtype = None if gamma is None and y_dtype == dout.dtype else y_dtype
        if dx_dtype is dy_dtype is y is branch_bias is None:
            return dout, dout, None, None, None
        dx, dy, sums = residual_backward_op(dout, y, gamma, branch_bias, dx_dtype, dy_dtype)
        found = branch_gradients(sums, y, branch_bias)
        parameters = (None if g is None else g.to(t) for g, t in zip(found, parameter_dtypes, strict=True))
        return dout if dx_dtype is None else dx, dout if dy_dtype is None else dy, *parameters, None


def residual(
    x: Tensor, y: Tensor, gamma: Tensor | None = None, branch_bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """x + gamma * (y + branch_bias) in one pass, [..., C] in `out_dtype`.

    Arguments and errors: see `kernels.layer_norm.residual_layer_norm`.
    """
    guard_layer_norm("residual", x, y, gamma=gamma, branch_bias=branch_bias)
    if not use_triton(x, y, gamma, branch_bias):
        return residual_reference(x, y, gamma, branch_bias, out_dtype)
    return _Residual.apply(x, y, gamma, branch_bias, out_dtype or x.dtype)


AOT = VIT_SHAPES


def examples(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Example]:
    """The ends of an encoder (out in x's type) and of a projector (out in `dtype`); branches [B, N, C] of `dtype`."""
    p, y = draw(shape[2:], torch.float32, device), draw(shape, dtype, device)
    for stream, out in ((torch.float32, torch.float32), (torch.float32, dtype), (dtype, dtype)):
        kind = f"{str(stream)[6:]} x, {str(out)[6:]} out"
        x, dout = draw(shape, stream, device), draw(shape, out, device)
        yield Example(f"residual, {kind}", residual_op, (x, y, p, p, out))
        args = (dout, y, p, p, None if stream == out else stream, dtype)
        yield Example(f"residual_backward, {kind}", residual_backward_op, args)
    yield Example("residual without parameters", residual_op, (x, y, None, None, torch.float32))
    yield Example("residual_backward of a bias alone", residual_backward_op, (y, None, None, p, None, None))
