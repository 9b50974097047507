"""What `python -m bench.kernels` measures: for every operation its inputs, ours, what stands in for it, and bytes.

Bytes are the minimum that each file of `kernels/` states: every input read once, every output written once, small
vectors left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import relative_error
from dune_fast.dali_pipelines.augmentation import colour_params, draw_words
from dune_fast.dali_pipelines.datasets import DataConfig
from dune_fast.kernels.augment import ColourParams, augment_colour, augment_colour_reference
from dune_fast.kernels.distill_loss import distill_loss, distill_loss_reference
from dune_fast.kernels.fp8 import (
    FP8Rows,
    bias_gelu_fp8,
    layer_norm_fp8,
    quantize_rows,
    quantize_rows_reference,
    residual_layer_norm_fp8,
)
from dune_fast.kernels.gelu import bias_gelu
from dune_fast.kernels.layer_norm import (
    layer_norm,
    layer_norm_reference,
    residual_layer_norm,
    residual_layer_norm_reference,
)
from dune_fast.kernels.moments import moments, moments_reference
from dune_fast.kernels.resize import resize_normalize, resize_normalize_reference
from dune_fast.kernels.rope2d import grid_positions, rope2d, rope2d_, rope2d_angles, rope2d_reference
from dune_fast.kernels.teacher_drop import teacher_drop, teacher_drop_reference

Inputs = tuple[Any, ...]
Call = Callable[..., Any]
Shape = tuple[int, int, int]
Make = Callable[[Shape, torch.dtype, torch.device], Inputs]
SHAPES: tuple[Shape, ...] = (
    (128, 577, 768), (128, 577, 1024), (128, 1025, 768), (128, 1025, 1024), (8, 257, 384), (128, 1, 1024),
)  # fmt: skip
"""(images, tokens, channels): ViT-B and L at 336 and 448 pixels, a small batch of ViT-S, cls tokens."""
IMAGE_SHAPES: tuple[Shape, ...] = ((128, 3, 336), (128, 3, 448), (8, 3, 112))
"""(images, channels, side in pixels) of operations on images."""
EPS = 1e-6


@dataclass(frozen=True)
class Operation:
    """One operation and how to call it."""

    name: str
    file: str
    """Of `kernels/`."""
    make: Make
    """Random inputs of features [B, N, C]; those that are trained require a gradient."""
    ours: Call
    eager: Call
    bytes: tuple[float, float]
    """A value of the features, forward and backward, in units of the dtype's size; backward 0: there is none."""
    gold: Call | None = None
    """What inputs in float64 should give, where that is not `eager` of them."""
    fixed_bytes: tuple[float, float] = (0.0, 0.0)
    """More bytes a value, forward and backward, whatever the dtype."""
    on_images: bool = False
    """Whether it takes images [B, 3, side, side], of IMAGE_SHAPES, and not features."""
    goal: int = 85
    """Percent of a copy's bandwidth that it is to reach at ViT-L and 336 px; 0: it has no such target."""

    def implementations(self, skip: Sequence[str] = ()) -> dict[str, Call]:
        """ "ours", "eager" and "compile" (of eager), without those in `skip`."""
        calls = {"ours": self.ours, "eager": self.eager}
        if "compile" not in skip:
            torch.compiler.reset()  # shapes are compiled one by one, each for itself
            calls["compile"] = torch.compile(self.eager, fullgraph=True, dynamic=False)
        return {name: call for name, call in calls.items() if name not in skip}


def moved_bytes(operation: Operation, shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """Minimal bytes of a forward pass, or of a forward and a backward pass."""
    units = zip(operation.bytes[: 1 + backward], operation.fixed_bytes, strict=False)
    values = torch.Size(shape).numel() * (shape[2] if operation.on_images else 1)
    return round(sum(typed * dtype.itemsize + fixed for typed, fixed in units) * values)


def outputs(result: Any) -> list[Tensor]:
    """The tensors of a result; quantized rows as the numbers they stand for."""
    if isinstance(result, FP8Rows):
        return [result.values.double() * result.scale.double()]
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in outputs(part)]


def draw_upstream(operation: Operation, inputs: Inputs) -> list[Tensor]:
    """Random gradients for the outputs of a call that carry one; empty where there is no backward pass."""
    if not operation.bytes[1]:
        return []
    return [torch.randn_like(out) for out in outputs(operation.eager(*inputs)) if out.requires_grad]


def run_both(call: Call, inputs: Inputs, upstream: Sequence[Tensor]) -> list[Tensor]:
    """Forward and backward: the gradients of all inputs that require one."""
    carrying = [out for out in outputs(call(*inputs)) if out.requires_grad]
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return list(torch.autograd.grad(carrying, wanted, list(upstream)))


def widen(inputs: Sequence[Any]) -> Inputs:
    """The same inputs in float64, detached."""
    return tuple(
        x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    )


def check(
    operation: Operation, call: Call, inputs: Inputs, upstream: Sequence[Tensor]
) -> Iterator[tuple[float, float]]:
    """(error, error allowed) of every output and gradient: twice that of eager torch plus 1e-6, against float64."""
    passes: list[Callable[[Call, Inputs, Sequence[Tensor]], list[Tensor]]] = [lambda f, x, _: outputs(f(*x))]
    if upstream:
        passes.append(run_both)
    for one_pass in passes:
        gold = one_pass(operation.gold or operation.eager, widen(inputs), [up.double() for up in upstream])
        eager = one_pass(operation.eager, inputs, upstream)
        ours = one_pass(call, inputs, upstream)  # last: an operation in place changes its inputs
        for value, plain, exact in zip(ours, eager, gold, strict=True):
            error, allowed = (relative_error(x.detach(), exact.detach()) for x in (value, plain))
            yield error, 2 * allowed + 1e-6


def _features(shape: Shape, dtype: torch.dtype, device: torch.device, spare: int = 0) -> Tensor:
    """Features with a mean and a spread of their own in every channel, [B, N, C]; cut behind `spare` other tokens."""
    images, tokens, channels = shape
    spread = torch.rand(channels, device=device) + 0.5
    x = torch.randn(images, tokens + spare, channels, device=device) * spread + torch.randn(channels, device=device)
    return x.to(dtype)[:, spare:]


def _vector(channels: int, device: torch.device, around: float = 0.0) -> Tensor:
    return (around + 0.2 * torch.randn(channels, device=device)).requires_grad_()


def _var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = (x if x.dtype == torch.float64 else x.float()).flatten(0, -2)
    var, mean = torch.var_mean(rows, 0, correction=0)
    return mean, var * len(rows)


def _distill_loss(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    student, teacher = (_features(shape, dtype, device, spare=1) for _ in range(2))
    mean, m2 = moments_reference(teacher)
    inv_std = (m2 / max(1, teacher[..., 0].numel() - 1)).sqrt().clamp_min(1e-3).reciprocal()
    return student.detach().requires_grad_(), teacher, mean, inv_std


def _teacher_drop(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    images = torch.arange(shape[0], device=device)
    return torch.rand(3, shape[0], device=device), images, None, None, 1000, 0, 0.5


def _layer_norm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    x = _features(shape, dtype, device).requires_grad_()
    return x, _vector(shape[2], device, 1.0), _vector(shape[2], device)


def _residual(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    x, weight, bias = _layer_norm(shape, dtype, device)
    return x, _features(shape, dtype, device).requires_grad_(), _vector(shape[2], device), weight, bias


def _stream(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """A float32 residual stream and a branch in the type of the matrix products, as in the student."""
    x, *others = _residual(shape, dtype, device)
    return x.detach().float().requires_grad_(), *others


def _frozen(make: Make) -> Make:
    """The same inputs, none of them trained."""
    return lambda *case: tuple(x.detach() for x in make(*case))


def _gelu(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    wide = (*shape[:2], 4 * shape[2])
    return _features(wide, dtype, device).requires_grad_(), _vector(wide[2], device)


def _rope(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    images, tokens, channels = shape
    cos, sin = rope2d_angles(grid_positions(1, tokens, device), 64)
    qkv = _features((images, tokens, 3 * channels), dtype, device).view(images, tokens, 3, -1, 64)
    return qkv.requires_grad_(), cos, sin


def _residual_fp8_reference(x: Tensor, y: Tensor, *parameters: Tensor) -> tuple[Tensor, FP8Rows]:
    x, h = residual_layer_norm_reference(x, y, *parameters, EPS)
    return x, FP8Rows(*quantize_rows_reference(h))


def _drop_ours(losses: Tensor, positions: Tensor, own: None, groups: None, step: int, seed: int, p: float) -> Tensor:
    return teacher_drop(losses, positions, step, seed, p)


def _photographs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """uint8 [B, S, S, 3] and parameters as training draws them."""
    count, _, side = shape
    images = torch.randint(256, (count, side, side, 3), dtype=torch.uint8, device=device)
    return images, colour_params(draw_words(0, np.arange(count)), DataConfig()).to(device), dtype


def _augment_gold(images: Tensor, params: ColourParams, dtype: torch.dtype) -> Tensor:
    return augment_colour_reference(images.permute(0, 3, 1, 2).double() / 255, params, torch.float64)


def _resized(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Images for MASt3R: 16 / 14 of the side, its own normalisation."""
    count, channels, side = shape
    scale, shift = torch.rand(2, 3, device=device) + 0.5
    images = torch.randn(count, channels, side, side, device=device).to(dtype)
    return images, (side // 14 * 16, side // 14 * 16), scale, shift, dtype


def _resize_gold(images: Tensor, size: tuple[int, int], scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    return resize_normalize_reference(images, size, scale, shift, torch.float64)


OPERATIONS = (
    Operation("moments", "moments", lambda *case: (_features(*case, spare=1),), moments, _var_mean, bytes=(1, 0)),
    Operation("distill_loss", "distill_loss", _distill_loss, distill_loss, distill_loss_reference, bytes=(2, 3)),
    Operation("teacher_drop", "teacher_drop", _teacher_drop, _drop_ours, teacher_drop_reference, (0, 0), goal=0),
    Operation(
        "layer_norm", "layer_norm", _layer_norm,
        lambda *x: layer_norm(*x, EPS), lambda *x: layer_norm_reference(*x, EPS), bytes=(2, 3),
    ),
    Operation(
        "residual_layer_norm", "layer_norm", _residual,
        lambda *x: residual_layer_norm(*x, EPS), lambda *x: residual_layer_norm_reference(*x, EPS), bytes=(4, 6),
    ),
    Operation(
        "residual_layer_norm_stream", "layer_norm", _stream,
        lambda x, y, *p: residual_layer_norm(x, y, *p, EPS, y.dtype),
        lambda x, y, *p: residual_layer_norm_reference(x, y, *p, EPS, y.dtype), bytes=(2, 3), fixed_bytes=(8, 12),
    ),
    Operation("bias_gelu", "gelu", _gelu, bias_gelu, lambda x, bias: F.gelu(x + bias.to(x.dtype)), bytes=(8, 12)),
    Operation("rope2d", "rope2d", _rope, rope2d, rope2d_reference, bytes=(6, 6)),
    Operation("rope2d_", "rope2d", _frozen(_rope), rope2d_, rope2d_reference, bytes=(4, 0)),
    Operation(
        "quantize_rows", "fp8", lambda *case: _frozen(_layer_norm)(*case)[:1],
        quantize_rows, lambda x: FP8Rows(*quantize_rows_reference(x)), bytes=(1, 0), fixed_bytes=(1, 0),
        gold=lambda x: x,
    ),
    Operation(
        "layer_norm_fp8", "fp8", _frozen(_layer_norm),
        lambda *x: layer_norm_fp8(*x, EPS), lambda *x: FP8Rows(*quantize_rows_reference(layer_norm_reference(*x, EPS))),
        bytes=(1, 0), fixed_bytes=(1, 0), gold=lambda *x: layer_norm_reference(*x, EPS),
    ),
    Operation(
        "residual_layer_norm_fp8", "fp8", _frozen(_residual),
        lambda *x: residual_layer_norm_fp8(*x, EPS), _residual_fp8_reference,
        bytes=(3, 0), fixed_bytes=(1, 0), gold=lambda *x: residual_layer_norm_reference(*x, EPS),
    ),
    Operation(
        "bias_gelu_fp8", "fp8", _frozen(_gelu),
        bias_gelu_fp8, lambda x, bias: FP8Rows(*quantize_rows_reference(F.gelu(x + bias.to(x.dtype)))),
        bytes=(4, 0), fixed_bytes=(4, 0), gold=lambda x, bias: F.gelu(x + bias),
    ),
    Operation(
        "augment_colour", "augment", _photographs, augment_colour, augment_colour_reference,
        bytes=(1, 0), fixed_bytes=(1, 0), gold=_augment_gold, on_images=True, goal=80,
    ),
    Operation(
        "resize_normalize", "resize", _resized, resize_normalize, resize_normalize_reference,
        bytes=(1 + (16 / 14) ** 2, 0), gold=_resize_gold, on_images=True, goal=0,
    ),
)  # fmt: skip


def select(only: str | None) -> list[Operation]:
    """The operations of one name or file; all if `only` is None; ValueError if there is none."""
    chosen = [operation for operation in OPERATIONS if only in (None, operation.name, operation.file)]
    if not chosen:
        raise ValueError(f"no operation named {only!r}; choose one of {', '.join(op.name for op in OPERATIONS)}")
    return chosen
