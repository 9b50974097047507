"""LayerNorm, alone and fused with the residual addition and LayerScale that stand before it in a pre-norm transformer.

    x' = x + gamma * y                          (LayerScale of the branch output y; gamma may be missing)
    h  = (x' - mean) * rstd * weight + bias     mean and rstd = 1 / sqrt(var + eps) over the C channels of x'

Backward, with dh and dx' (the gradient that reaches x' past the norm), n = (x' - mean) * rstd and g = dh * weight:

    dx = dx' + rstd * (g - mean_c(g) - n * mean_c(g * n)),   dy = gamma * dx
    dgamma = sum_rows dx * y,   dweight = sum_rows dh * n,   dbias = sum_rows dh

Arithmetic is float32 whatever is stored. h is the norm of x' as stored: the backward, which reads that, sees the same
numbers.

Minimal bytes moved for each element, fp32 stream and bf16 branch [all bf16]: forward x 4 + y 2 + x' 4 + h 2 = 12 [8],
where multiply, add, norm and cast apart move 32; backward dh 2 + dx' 4 + x' 4 + y 2 + dx 4 + dy 2 = 18 [12]. Kept for
the backward: x' (an output, held anyway), mean and rstd (8 bytes a row), and y if gamma is trained: nothing else holds
y, and (x' - x) / gamma would lose its digits at gamma = 1e-4. Sums over rows are float32 partials added in a fixed
order: no atomics, and every run gives the same bits.

Shapes: x, y, x', h [..., C]; gamma, weight, bias [C]; mean, rstd float32 [rows].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launching import VIT_CHANNELS, choose, launch, processors
from kernels.layer_norm_kernels import BACKWARD, FORWARD, backward_kernel, forward_kernel
from kernels.library import guard, guard_device, register, triton, use_triton

# ---------------------------------------------------------------- reference


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.nn.functional.layer_norm` in float32 (float64 for float64), then cast."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(out_dtype or x.dtype)


def residual_layer_norm_reference(
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(x', LN(x')) in plain torch; float32 inside (float64 for float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    branch = y.to(wide) if gamma is None else y.to(wide) * gamma.to(wide)
    out = (x.to(wide) + branch).to(x.dtype)
    return out, layer_norm_reference(out, weight, bias, eps, out_dtype)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.float().reshape(-1, x.shape[-1]), -1, correction=0)
    return mean, (var + eps).rsqrt()


def _forward_reference(x, weight, bias, eps, dtype):
    return layer_norm_reference(x, weight, bias, eps, dtype), *_statistics(x, eps)


def _residual_forward_reference(x, y, gamma, weight, bias, eps, dtype):
    out, h = residual_layer_norm_reference(x, y, gamma, weight, bias, eps, dtype)
    return out, h, *_statistics(out, eps)


def _backward_reference(dh, dout, x, y, gamma, weight, mean, rstd, branch_dtype):
    dx, dy, sums = _backward_outputs(x, y, gamma, weight, branch_dtype)
    channels = x.shape[-1]
    up = dh.float().reshape(-1, channels)
    normed = (x.float().reshape(-1, channels) - mean[:, None]) * rstd[:, None]
    if weight is not None:
        sums[0], sums[1] = (up * normed).sum(0), up.sum(0)
        up = up * weight.float()
    grad = rstd[:, None] * (up - up.mean(1, keepdim=True) - normed * (up * normed).mean(1, keepdim=True))
    if dout is not None:
        grad = grad + dout.float().reshape(-1, channels)
    if y is not None:
        sums[-1] = (grad * y.float().reshape(-1, channels)).sum(0)
    dx.view(-1, channels).copy_(grad)
    if not _dx_serves(x, gamma, branch_dtype):
        dy.view(-1, channels).copy_(grad if gamma is None else grad * gamma.float())
    return dx, dy, sums


# ---------------------------------------------------------------- implementation


def flat_rows(x: Tensor) -> Tensor:
    """x [..., C] as [rows, C] with adjacent channels, a view where one row stride describes it."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _contiguous(*parameters: Tensor | None) -> list[Tensor | None]:
    return [None if p is None else p.contiguous() for p in parameters]


def _residual_forward_fused(x, y, gamma, weight, bias, eps, dtype):
    out, h, mean, rstd = _residual_forward_fake(x, y, gamma, weight, bias, eps, dtype)
    x, y = flat_rows(x), None if y is None else flat_rows(y)
    rows, channels = x.shape
    options = choose(FORWARD, x.device, channels)
    launch(
        forward_kernel, (triton.cdiv(rows, options["ROWS"]),),
        x, y, *_contiguous(gamma, weight, bias), out, h, mean, rstd,
        rows, x.stride(0), _stride(y), eps, C=channels, BLOCK_C=triton.next_power_of_2(channels), **options,
    )  # fmt: skip
    return out, h, mean, rstd


def _forward_fused(x, weight, bias, eps, dtype):
    return _residual_forward_fused(x, None, None, weight, bias, eps, dtype)[1:]


def _backward_fused(dh, dout, x, y, gamma, weight, mean, rstd, branch_dtype):
    dx, dy, sums = _backward_outputs(x, y, gamma, weight, branch_dtype)
    dh, dout, x, y = (None if t is None else flat_rows(t) for t in (dh, dout, x, y))
    rows, channels = x.shape
    options = choose(BACKWARD, x.device, channels)
    if torch.version.hip:  # the limit is one of NVIDIA's compiler
        del options["maxnreg"]
    programs = min(triton.cdiv(rows, options["ROWS"]), options.pop("per_processor") * processors(x.device))
    partials = sums.new_empty(len(sums), programs, channels)
    launch(
        backward_kernel, (programs,), dh, dout, x, y, *_contiguous(gamma, weight), mean, rstd, dx,
        None if _dx_serves(x, gamma, branch_dtype) else dy, partials,
        rows, dh.stride(0), _stride(dout), x.stride(0), _stride(y),
        C=channels, BLOCK_C=triton.next_power_of_2(channels), **options,
    )  # fmt: skip
    return dx, dy, partials.sum(1)


def _residual_forward_fake(x, y, gamma, weight, bias, eps, dtype):
    out = None if y is None else x.new_empty(x.shape)
    mean, rstd = (x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32) for _ in range(2))
    return out, x.new_empty(x.shape, dtype=dtype), mean, rstd


def _forward_fake(x, weight, bias, eps, dtype):
    return _residual_forward_fake(x, None, None, weight, bias, eps, dtype)[1:]


def _dx_serves(x, gamma, branch_dtype):
    """Whether the backward writes no gradient of a branch: there is none, or dx is its gradient too."""
    return branch_dtype is None or (gamma is None and branch_dtype == x.dtype)


def _backward_outputs(x, y, gamma, weight, branch_dtype):
    """dx; dy, empty if `_dx_serves`; the sums dweight and dbias if there is a weight, then dgamma if there is a y."""
    dy = x.new_empty(0 if _dx_serves(x, gamma, branch_dtype) else x.shape, dtype=branch_dtype or x.dtype)
    sums = x.new_empty(2 * (weight is not None) + (y is not None), x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape), dy, sums


def _backward_fake(dh, dout, x, y, gamma, weight, mean, rstd, branch_dtype):
    return _backward_outputs(x, y, gamma, weight, branch_dtype)


layer_norm_op = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _forward_fused, _forward_reference, _forward_fake,
)  # fmt: skip
residual_layer_norm_op = register(
    "residual_layer_norm(Tensor x, Tensor y, Tensor? gamma, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _residual_forward_fused, _residual_forward_reference, _residual_forward_fake,
)  # fmt: skip
layer_norm_backward_op = register(
    "layer_norm_backward(Tensor dh, Tensor? dout, Tensor x, Tensor? y, Tensor? gamma, Tensor? weight, "
    "Tensor mean, Tensor rstd, ScalarType? branch_dtype) -> (Tensor, Tensor, Tensor)",
    _backward_fused, _backward_reference, _backward_fake,
)  # fmt: skip


class _LayerNorm(torch.autograd.Function):
    """h, or (x', h) where there is a branch y."""

    @staticmethod
    def forward(ctx, x, y, gamma, weight, bias, eps, dtype):
        if y is None:
            h, mean, rstd = layer_norm_op(x, weight, bias, eps, dtype)
            out = x
        else:
            out, h, mean, rstd = residual_layer_norm_op(x, y, gamma, weight, bias, eps, dtype)
        ctx.save_for_backward(out, y if ctx.needs_input_grad[2] else None, gamma, weight, mean, rstd)
        ctx.branch_dtype = None if y is None else y.dtype
        ctx.dtypes = [None if p is None else p.dtype for p in (gamma, weight, bias)]
        return h if y is None else (out, h)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        *dout, dh = upstream
        out, y, gamma, weight, mean, rstd = ctx.saved_tensors
        branch = ctx.branch_dtype
        dx, dy, sums = layer_norm_backward_op(dh, *(dout or [None]), out, y, gamma, weight, mean, rstd, branch)
        dgamma = dweight = dbias = None
        gamma_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if ctx.needs_input_grad[2]:
            dgamma = sums[-1].to(gamma_dtype)
        if weight_dtype is not None:
            dweight = sums[0].to(weight_dtype)
            dbias = None if bias_dtype is None else sums[1].to(bias_dtype)
        if _dx_serves(out, gamma, branch):
            dy = None if branch is None else dx
        return dx, dy, dgamma, dweight, dbias, None, None


# ---------------------------------------------------------------- public


def guard_layer_norm(operation: str, x: Tensor, y: Tensor | None = None, **parameters: Tensor | None) -> None:
    """The checks that every form of the operation shares; ValueError."""
    guard_device(operation, x=x, y=y, **parameters)
    rule = f"{operation} takes floating-point x [..., C]"
    guard(x.ndim >= 1 and x.shape[-1] > 0 and x.is_floating_point(), rule, x=x)
    if y is not None:
        guard(y.shape == x.shape and y.is_floating_point(), f"{operation} takes x and y of one shape", x=x, y=y)
    for name, parameter in parameters.items():
        if parameter is not None:
            guard(parameter.shape == x.shape[-1:], f"{operation} takes {name} [C]", x=x, **{name: parameter})
    guard(
        parameters.get("bias") is None or parameters.get("weight") is not None,
        f"{operation} takes a bias only beside a weight", bias=parameters.get("bias"),
    )  # fmt: skip


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: [..., C], fp32, bf16 or fp16 (others take the plain reference), any strides, C up to 4096 on a GPU.
        weight, bias: [C], or None; no bias without a weight.
        eps: added to the variance.
        out_dtype: of the result, e.g. that of the matrix product that reads it; x's by default.

    Returns:
        [..., C].

    Raises:
        ValueError: shapes, types or devices do not fit.
    """
    guard_layer_norm("layer_norm", x, weight=weight, bias=bias)
    if not use_triton(x, weight, bias):
        return layer_norm_reference(x, weight, bias, eps, out_dtype)
    return _LayerNorm.apply(x, None, None, weight, bias, eps, out_dtype or x.dtype)


def residual_layer_norm(
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x' = x + gamma * y and LN(x') in one pass.

    Args:
        x: the residual stream [..., C], fp32, bf16 or fp16 (others take the plain reference), C up to 4096 on a GPU.
        y: the branch's output, of x's shape, any of these types.
        gamma: LayerScale [C], or None for 1.
        weight, bias: [C], or None; no bias without a weight.
        eps: added to the variance.
        out_dtype: of LN(x'), e.g. that of the matrix product that reads it; x's by default.

    Returns:
        (x' in x's dtype, LN(x') in `out_dtype`), both [..., C].

    Raises:
        ValueError: shapes, types or devices do not fit.
    """
    guard_layer_norm("residual_layer_norm", x, y, gamma=gamma, weight=weight, bias=bias)
    if not use_triton(x, y, gamma, weight, bias):
        return residual_layer_norm_reference(x, y, gamma, weight, bias, eps, out_dtype)
    return _LayerNorm.apply(x, y, gamma, weight, bias, eps, out_dtype or x.dtype)


def aot_calls(device: torch.device) -> Iterator[tuple[str, Callable]]:
    """What to compile ahead of time: a training step (fp32 stream, bf16 branch) and frozen teachers (all bf16)."""
    rows, bf16 = 128 * 577, torch.bfloat16
    for channels in VIT_CHANNELS:
        mean = torch.empty(rows, device=device)
        y = torch.empty(rows, channels, dtype=bf16, device=device)
        for dtype in (torch.float32, bf16):
            x, p = y.to(dtype), torch.empty(channels, dtype=dtype, device=device)
            calls = {
                "layer_norm": partial(_forward_fused, x, p, p, 1e-6, bf16),
                "layer_norm_backward": partial(_backward_fused, y, None, x, None, None, p, mean, mean, None),
                "residual_layer_norm": partial(_residual_forward_fused, x, y, p, p, p, 1e-6, bf16),
                "residual_layer_norm_backward": partial(_backward_fused, y, x, x, y, p, p, mean, mean, bf16),
                "residual_layer_norm without gamma": partial(_residual_forward_fused, x, y, None, p, p, 1e-6, bf16),
            }
            for name, call in calls.items():
                yield f"{name} {str(dtype)[6:]} {channels}", call
