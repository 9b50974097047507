"""LayerNorm, alone and fused with the residual addition and LayerScale that stand before it in a pre-norm transformer.

    x' = x + gamma * (y + b)                    (LayerScale of a branch; y is its last product, b that layer's bias)
    h  = (x' - mean) * rstd * weight + bias     mean and rstd = 1 / sqrt(var + eps) over the C channels of x'

Backward, with dh and dx' (the gradient that reaches x' past the norm), n = (x' - mean) * rstd and g = dh * weight:

    dx = dx' + rstd * (g - mean_c(g) - n * mean_c(g * n)),   dy = gamma * dx,   db = gamma * sum_rows dx
    dgamma = sum_rows dx * (y + b) = sum_rows dx * y + b * sum_rows dx
    dweight = sum_rows dh * n,   dbias = sum_rows dh

gamma and b may be missing. b is added here and not by the product, so that the pass that makes dx makes its gradient
too. `kernels.residual` is x' alone. Arithmetic is float32 whatever is stored. h is the norm of x' as stored, because
the backward reads that.

Minimal bytes moved for each element, fp32 stream and bf16 branch [all bf16]: forward x 4 + y 2 + x' 4 + h 2 = 12 [8],
where multiply, add, norm and cast apart move 32; backward dh 2 + dx' 4 + x' 4 + y 2 + dx 4 + dy 2 = 18 [12]. Kept for
the backward: x' (an output, held anyway), mean and rstd (8 bytes a row), and y if gamma is trained: (x' - x) / gamma
would lose its digits. Sums over rows are float32 partials, added in a fixed order, so every run gives the same bits.

Shapes: x, y, x', h [..., C]; gamma, b, weight, bias [C]; mean, rstd float32 [rows].
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dune_fast.kernels.launching import VIT_SHAPES, Example, draw
from dune_fast.kernels.layer_norm_kernels import launch_backward, launch_forward
from dune_fast.kernels.library import flat_rows, guard, guard_device, register, use_triton, widen


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.nn.functional.layer_norm` in float32 (float64 for float64), then cast."""
    wide = widen(x)
    weight, bias = (None if p is None else p.to(wide.dtype) for p in (weight, bias))
    return F.layer_norm(wide, x.shape[-1:], weight, bias, eps).to(out_dtype or x.dtype)


def residual_reference(
    x: Tensor, y: Tensor, gamma: Tensor | None, branch_bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x + gamma * (y + branch_bias) in plain torch; float32 inside (float64 for float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    branch = y.to(wide)
    if branch_bias is not None:
        branch = branch + branch_bias.to(wide)
    if gamma is not None:
        if branch is y or branch.requires_grad or gamma.requires_grad:
            branch = branch * gamma.to(wide)
        else:
            branch.mul_(gamma.to(wide))
    # a CPU spends more time on fresh pages than on sums: in place where the branch is a tensor of this function's own
    out = x.to(wide) + branch if branch is y else branch.add_(x.to(wide))
    return out.to(out_dtype or x.dtype)


def residual_layer_norm_reference(
    x: Tensor, y: Tensor, gamma: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    out_dtype: torch.dtype | None = None, branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x', LN(x')) in plain torch; float32 inside (float64 for float64)."""
    out = residual_reference(x, y, gamma, branch_bias)
    return out, layer_norm_reference(out, weight, bias, eps, out_dtype)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.float().reshape(-1, x.shape[-1]), -1, correction=0)
    return mean, (var + eps).rsqrt()


def _forward_reference(x, weight, bias, eps, dtype):
    return layer_norm_reference(x, weight, bias, eps, dtype), *_statistics(x, eps)


def _residual_forward_reference(x, y, gamma, branch_bias, weight, bias, eps, dtype):
    out, h = residual_layer_norm_reference(x, y, gamma, weight, bias, eps, dtype, branch_bias)
    return out, h, *_statistics(out, eps)


def branch_sums(grad: Tensor, y: Tensor | None, gamma: Tensor | None, branch_bias: Tensor | None) -> list[Tensor]:
    """dgamma if there is a y, then branch_bias's gradient if there is one, of the float32 gradient of x' [rows, C]."""
    sums, total = [], grad.sum(0)
    if y is not None:
        dgamma = (grad * flat_rows(y).float()).sum(0)
        sums.append(dgamma if branch_bias is None else dgamma + branch_bias.float() * total)
    if branch_bias is not None:
        sums.append(total if gamma is None else total * gamma.float())
    return sums


def _backward_reference(dh, dout, x, y, gamma, branch_bias, weight, mean, rstd, branch_dtype):
    dx, dy, sums = _backward_fake(dh, dout, x, y, gamma, branch_bias, weight, mean, rstd, branch_dtype)
    up = flat_rows(dh).float()
    normed = (flat_rows(x).float() - mean[:, None]) * rstd[:, None]
    affine = []
    if weight is not None:
        affine = [(up * normed).sum(0), up.sum(0)]
        up = up * weight.float()
    grad = rstd[:, None] * (up - up.mean(1, keepdim=True) - normed * (up * normed).mean(1, keepdim=True))
    if dout is not None:
        grad = grad + flat_rows(dout).float()
    for i, value in enumerate([*affine, *branch_sums(grad, y, gamma, branch_bias)]):
        sums[i] = value
    dx.view(-1, x.shape[-1]).copy_(grad)
    if not _dx_serves(x, gamma, branch_dtype):
        dy.view(-1, x.shape[-1]).copy_(grad if gamma is None else grad * gamma.float())
    return dx, dy, sums


def _residual_forward_fused(x, y, gamma, branch_bias, weight, bias, eps, dtype):
    outputs = _residual_forward_fake(x, y, gamma, branch_bias, weight, bias, eps, dtype)
    launch_forward(x, y, gamma, branch_bias, weight, bias, *outputs, eps)
    return outputs


def _forward_fused(x, weight, bias, eps, dtype):
    return _residual_forward_fused(x, None, None, None, weight, bias, eps, dtype)[1:]


def _backward_fused(dh, dout, x, y, gamma, branch_bias, weight, mean, rstd, branch_dtype):
    dx, dy, _ = _backward_fake(dh, dout, x, y, gamma, branch_bias, weight, mean, rstd, branch_dtype)
    own_dy = None if _dx_serves(x, gamma, branch_dtype) else dy
    return dx, dy, launch_backward(dh, dout, x, y, gamma, branch_bias, weight, mean, rstd, dx, own_dy)


def _residual_forward_fake(x, y, gamma, branch_bias, weight, bias, eps, dtype):
    out = None if y is None else x.new_empty(x.shape)
    mean, rstd = (x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32) for _ in range(2))
    return out, x.new_empty(x.shape, dtype=dtype), mean, rstd


def _forward_fake(x, weight, bias, eps, dtype):
    return _residual_forward_fake(x, None, None, None, weight, bias, eps, dtype)[1:]


def _dx_serves(x, gamma, branch_dtype):
    """Whether the backward writes no gradient of a branch: there is none, or dx is its gradient too."""
    return branch_dtype is None or (gamma is None and branch_dtype == x.dtype)


def _backward_fake(dh, dout, x, y, gamma, branch_bias, weight, mean, rstd, branch_dtype):
    """dx; dy, empty if `_dx_serves`; sums: dweight and dbias, dgamma, branch_bias's gradient, as far as there are."""
    dy = x.new_empty(0 if _dx_serves(x, gamma, branch_dtype) else x.shape, dtype=branch_dtype or x.dtype)
    sums = 2 * (weight is not None) + (y is not None) + (branch_bias is not None)
    return x.new_empty(x.shape), dy, x.new_empty(sums, x.shape[-1], dtype=torch.float32)


layer_norm_op = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _forward_fused, _forward_reference, _forward_fake,
)  # fmt: skip
residual_layer_norm_op = register(
    "residual_layer_norm(Tensor x, Tensor y, Tensor? gamma, Tensor? branch_bias, Tensor? weight, Tensor? bias, "
    "float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _residual_forward_fused, _residual_forward_reference, _residual_forward_fake,
)  # fmt: skip
layer_norm_backward_op = register(
    "layer_norm_backward(Tensor dh, Tensor? dout, Tensor x, Tensor? y, Tensor? gamma, Tensor? branch_bias, "
    "Tensor? weight, Tensor mean, Tensor rstd, ScalarType? branch_dtype) -> (Tensor, Tensor, Tensor)",
    _backward_fused, _backward_reference, _backward_fake,
)  # fmt: skip


class _LayerNorm(torch.autograd.Function):
    """h, or (x', h) where there is a branch y."""

    @staticmethod
    def forward(ctx, x, y, gamma, branch_bias, weight, bias, eps, dtype):
        if y is None:
            h, mean, rstd = layer_norm_op(x, weight, bias, eps, dtype)
            out = x
        else:
            out, h, mean, rstd = residual_layer_norm_op(x, y, gamma, branch_bias, weight, bias, eps, dtype)
        ctx.save_for_backward(out, *branch_saved(ctx, y, gamma, branch_bias), weight, mean, rstd)
        ctx.branch_dtype = None if y is None else y.dtype
        ctx.dtypes = [None if p is None else p.dtype for p in (gamma, branch_bias, weight, bias)]
        return h if y is None else (out, h)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        *dout, dh = upstream
        out, y, gamma, branch_bias, weight, _, _ = saved = ctx.saved_tensors
        dx, dy, sums = layer_norm_backward_op(dh, *(dout or [None]), *saved, ctx.branch_dtype)
        if _dx_serves(out, gamma, ctx.branch_dtype):
            dy = None if ctx.branch_dtype is None else dx
        affine = [None, None] if weight is None else list(sums[:2])
        parameters = [*branch_gradients(sums, y, branch_bias), *affine]
        gradients = (None if g is None or t is None else g.to(t) for g, t in zip(parameters, ctx.dtypes, strict=True))
        return dx, dy, *gradients, None, None


def branch_saved(ctx, y: Tensor, gamma: Tensor | None, branch_bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """y, gamma, branch_bias as the backward needs them; arguments 1 to 3 of the autograd function."""
    _, _, scaled, shifted, *_ = ctx.needs_input_grad
    return y if scaled else None, gamma, branch_bias if scaled or shifted else None


def branch_gradients(sums: Tensor, y: Tensor | None, branch_bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of gamma and branch_bias, the last of a backward's sums; None for what was not summed."""
    last = list(sums)
    dbias = None if branch_bias is None else last.pop()
    return None if y is None else last.pop(), dbias


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
    """LayerNorm over the last dimension, [..., C]; ValueError if shapes, types or devices do not fit.

    Args:
        x: [..., C], fp32, bf16 or fp16 (others take the plain reference), any strides, C up to 4096 on a GPU.
        weight, bias: [C], or None; no bias without a weight.
        out_dtype: of the result, e.g. that of the matrix product that reads it; x's by default.
    """
    guard_layer_norm("layer_norm", x, weight=weight, bias=bias)
    if not use_triton(x, weight, bias):
        return layer_norm_reference(x, weight, bias, eps, out_dtype)
    return _LayerNorm.apply(x, None, None, None, weight, bias, eps, out_dtype or x.dtype)


def residual_layer_norm(
    x: Tensor, y: Tensor, gamma: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    out_dtype: torch.dtype | None = None, branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x', LN(x')) of x' = x + gamma * (y + branch_bias) in one pass, in x's dtype and `out_dtype`, both [..., C].

    x is the residual stream, y a branch's output, [..., C], each fp32, bf16 or fp16. LayerScale's gamma [C] may be None
    for 1, branch_bias [C], of the linear layer whose product y is, for 0. The rest and errors: see `layer_norm`.
    """
    parameters = {"gamma": gamma, "branch_bias": branch_bias, "weight": weight, "bias": bias}
    guard_layer_norm("residual_layer_norm", x, y, **parameters)
    if not use_triton(x, y, *parameters.values()):
        return residual_layer_norm_reference(x, y, gamma, weight, bias, eps, out_dtype, branch_bias)
    return _LayerNorm.apply(x, y, *parameters.values(), eps, out_dtype or x.dtype)


AOT = VIT_SHAPES


def examples(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Example]:
    """Training with a float32 and a `dtype` stream, frozen teachers (all `dtype`); branches [B, N, C] of `dtype`."""
    fp32, rows = torch.float32, shape[0] * shape[1]
    y, mean, rstd = draw(shape, dtype, device), draw((rows,), fp32, device), torch.rand(rows, device=device) + 0.5
    for stream, kept in ((fp32, fp32), (dtype, fp32), (dtype, dtype)):  # of x and of the parameters
        x, p = draw(shape, stream, device), draw(shape[2:], kept, device)
        kind, shift = f"{str(stream)[6:]} x, {str(kept)[6:]} parameters", p if kept == fp32 else None
        yield Example(f"layer_norm, {kind}", layer_norm_op, (x, p, p, 1e-6, dtype))
        for name, gamma in (("", p), (" without gamma", None)):
            args = (x, y, gamma, shift, p, p, 1e-6, dtype)
            yield Example(f"residual_layer_norm{name}, {kind}", residual_layer_norm_op, args)
        if kept == fp32:
            args = (y, None, x, None, None, None, p, mean, rstd, None)
            yield Example(f"layer_norm_backward, {kind}", layer_norm_backward_op, args)
            for name, saved in (("", (y, p)), (" without gamma", (None, None))):
                args = (y, x, x, *saved, p, p, mean, rstd, dtype)
                yield Example(f"residual_layer_norm_backward{name}, {kind}", layer_norm_backward_op, args)
        else:
            none = (None,) * 4
            yield Example("layer_norm without parameters", layer_norm_op, (x, None, None, 1e-6, dtype))
            yield Example("residual_layer_norm without parameters", residual_layer_norm_op, (x, y, *none, 1e-6, fp32))
            args = (y, None, x, *none, mean, rstd, None)
            yield Example("layer_norm_backward without parameters", layer_norm_backward_op, args)
