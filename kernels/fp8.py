"""Row-wise scaled float8 (e4m3) for frozen models: quantization, fused with what precedes it, and the linear layer.

    amax[r] = max(max_c |x[r, c]|, 1e-12),   scale[r] = amax[r] / 448,   q[r, c] = e4m3(x[r, c] * (448 / amax[r]))
    linear[r, n] = (q_x q_w^T)[r, n] * scale_x[r] * scale_w[n] + bias[n]        on `torch._scaled_mm` of a GPU

448 is the largest e4m3 number; a row of zeros gets a tiny scale and stays zero. A value is off by at most 2^-4 of
itself (2^-10 of the scale, if it is near zero): 2.6 % of the norm of normal numbers, 3.7 % of that of the product of
two such matrices.

Minimal bytes moved for each element of a bf16 model: 2 + 1, with the residual x 2 + y 2 + x' 2 + 1; not fused with
LayerNorm or GELU 4 more, for h. Scales are 4 bytes a row.

No gradient passes through: this is for teachers. On a GPU it needs NVIDIA's compute capability 8.9 or newer; the CPU's
products serve tests.

Shapes: x [..., C] -> values float8_e4m3fn [..., C], scale float32 [..., 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dune_fast.kernels.fp8_kernels import QUANTIZE, layer_norm_kernel, quantize_kernel
from dune_fast.kernels.gelu import bias_gelu_reference, guard_bias_gelu
from dune_fast.kernels.launching import VIT_SHAPES, Example, architecture, choose, draw, launch
from dune_fast.kernels.layer_norm import guard_layer_norm, layer_norm_reference, residual_reference
from dune_fast.kernels.layer_norm_kernels import forward_options
from dune_fast.kernels.library import contiguous, flat_rows, followed, guard, guard_device, register, triton, use_triton

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_AMAX = 1e-12


class FP8Rows(NamedTuple):
    """A quantized tensor, values * scale."""

    values: Tensor
    """float8_e4m3fn [..., C]."""
    scale: Tensor
    """float32 [..., 1]."""


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values, scale) of `quantize_rows` in plain torch."""
    x = x.float().contiguous()
    amax = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX)
    return (x * (LARGEST / amax)).clamp(-LARGEST, LARGEST).to(E4M3), amax / LARGEST


def _layer_norm_reference(x, y, gamma, weight, bias, eps):
    out = x.new_empty(0)
    if y is not None:
        x = out = residual_reference(x, y, gamma).contiguous()
    return out, *quantize_rows_reference(layer_norm_reference(x, weight, bias, eps, torch.float32))


def _bias_gelu_reference(x, bias):
    return quantize_rows_reference(bias_gelu_reference(x.float(), bias))


def _product_reference(values, weight, scale, weight_scale, bias, out_dtype):
    """`torch._scaled_mm` for a CPU, where torch 2.11 has none with a scale for each row."""
    out = (values.float() @ weight.float().t()) * scale * weight_scale
    return (out if bias is None else out + bias).to(out_dtype)


def _require_float8(x: Tensor) -> None:
    """ValueError if x lies on a GPU without float8."""
    if x.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(x.device) < (8, 9)):
        name = architecture(x.device)
        raise ValueError(f"float8 needs an NVIDIA GPU of compute capability 8.9 or newer, {x.device} is {name}")


def _layer_norm_fused(x, y, gamma, weight, bias, eps):
    out, values, scale = _layer_norm_fake(x, y, gamma, weight, bias, eps)
    x, y = flat_rows(x), None if y is None else flat_rows(y)
    _require_float8(x)
    parameters = contiguous(gamma, weight, bias)
    options = forward_options(x)
    if y is None and options["num_warps"] > 1:  # 3 bytes an element: the reductions' instructions would take longer
        options["num_warps"] //= 2
    launch(
        layer_norm_kernel, (triton.cdiv(len(x), options["ROWS"]),), x, y, *parameters, out, values, scale,
        x.shape[0], x.stride(0), 0 if y is None else y.stride(0), eps, **options,
    )  # fmt: skip
    return out, values, scale


def _bias_gelu_fused(x, bias):
    values, scale = _quantize_fake(x)
    x = flat_rows(x)
    _require_float8(x)
    rows, channels = x.shape
    options = choose(QUANTIZE, x.device, channels)
    block = 1 << (channels.bit_length() - 1)  # 3072 as 2048 + 1024: every width of a ViT without padding
    rest = triton.next_power_of_2(channels - block) if channels > block else 0
    launch(
        quantize_kernel, (triton.cdiv(rows, options["ROWS"]),), x, *contiguous(bias), values, scale,
        rows, x.stride(0), C=channels, BLOCK_C=block, REST=rest, **options,
    )  # fmt: skip
    return values, scale


def _quantize_fake(x, bias=None):
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def _layer_norm_fake(x, y, gamma, weight, bias, eps):
    return x.new_empty(0 if y is None else x.shape), *_quantize_fake(x)


quantize_rows_op = register(
    "quantize_rows(Tensor x) -> (Tensor, Tensor)",
    lambda x: _bias_gelu_fused(x, None), quantize_rows_reference, _quantize_fake,
)  # fmt: skip
layer_norm_fp8_op = register(
    "layer_norm_fp8(Tensor x, Tensor? y, Tensor? gamma, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    _layer_norm_fused, _layer_norm_reference, _layer_norm_fake,
)  # fmt: skip
bias_gelu_fp8_op = register(
    "bias_gelu_fp8(Tensor x, Tensor bias) -> (Tensor, Tensor)", _bias_gelu_fused, _bias_gelu_reference, _quantize_fake
)


def _guard_frozen(operation: str, *tensors: Tensor | None) -> None:
    rule = f"{operation} has no gradient: call it under torch.no_grad(), on a frozen model"
    guard(not followed(*tensors), rule, x=tensors[0])


def quantize_rows(x: Tensor) -> FP8Rows:
    """Quantizes every row of x [..., C] (any floating type and strides) to e4m3 with a scale of its own.

    NaN stays NaN and an infinity makes its row NaN (values * scale): neither turns into a number.

    Raises:
        ValueError: x is not floating-point, has no channels, or needs a gradient.
    """
    rule = "quantize_rows takes floating-point x [..., C]"
    guard(x.ndim >= 1 and x.shape[-1] > 0 and x.is_floating_point(), rule, x=x)
    _guard_frozen("quantize_rows", x)
    return FP8Rows(*(quantize_rows_op(x) if use_triton(x) else quantize_rows_reference(x)))


def layer_norm_fp8(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> FP8Rows:
    """`quantize_rows(layer_norm(x, weight, bias, eps))` in one pass. Arguments and errors: see there."""
    guard_layer_norm("layer_norm_fp8", x, weight=weight, bias=bias)
    _guard_frozen("layer_norm_fp8", x, weight, bias)
    fused = layer_norm_fp8_op if use_triton(x, weight, bias) else _layer_norm_reference
    return FP8Rows(*fused(x, None, None, weight, bias, eps)[1:])


def residual_layer_norm_fp8(
    x: Tensor, y: Tensor, gamma: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, FP8Rows]:
    """(x', quantize_rows(h)) of x', h = residual_layer_norm(...), in one pass. Arguments and errors: see there."""
    guard_layer_norm("residual_layer_norm_fp8", x, y, gamma=gamma, weight=weight, bias=bias)
    _guard_frozen("residual_layer_norm_fp8", x, y, gamma, weight, bias)
    fused = layer_norm_fp8_op if use_triton(x, y, gamma, weight, bias) else _layer_norm_reference
    out, *h = fused(x, y, gamma, weight, bias, eps)
    return out, FP8Rows(*h)


def bias_gelu_fp8(x: Tensor, bias: Tensor) -> FP8Rows:
    """`quantize_rows(bias_gelu(x, bias))` in one pass, F up to 16384. Arguments and errors: see there."""
    guard_bias_gelu("bias_gelu_fp8", x, bias)
    _guard_frozen("bias_gelu_fp8", x, bias)
    return FP8Rows(*(bias_gelu_fp8_op(x, bias) if use_triton(x, bias) else _bias_gelu_reference(x, bias)))


class FP8Linear(nn.Module):
    """A frozen linear layer with e4m3 weights, one scale for each of its outputs; `linear` itself is not kept.

    `out_dtype` is the result's, bf16 or fp16. ValueError: another one, or features that are no multiple of 16, which
    the matrix product needs.
    """

    def __init__(self, linear: nn.Linear, out_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.in_features, self.out_features, self.out_dtype = linear.in_features, linear.out_features, out_dtype
        if self.in_features % 16 or self.out_features % 16:
            sizes = f"{self.in_features} -> {self.out_features}"
            raise ValueError(f"FP8Linear takes features that are multiples of 16, got {sizes}")
        if out_dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"FP8Linear returns bfloat16 or float16, not {out_dtype}")
        weight, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)  # [N, C]
        self.register_buffer("weight_scale", scale.t().contiguous())  # [1, N]
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(out_dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP8Linear:
        """Moves between devices but keeps the types: a model's `.to(torch.bfloat16)` must not undo the quantization."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def forward(self, x: Tensor | FP8Rows, add_bias: bool = True) -> Tensor:
        """x [..., C], quantized here unless it is, -> [..., N]; `add_bias=False` leaves the bias to `bias_gelu_fp8`."""
        values, scale = x if isinstance(x, FP8Rows) else quantize_rows(x)
        guard(values.shape[-1] == self.in_features, f"this FP8Linear takes [..., {self.in_features}]", x=values)
        guard_device("FP8Linear", x=values, weight=self.weight)
        if values.numel() == 0:  # which not every version of the product takes
            return values.new_empty(*values.shape[:-1], self.out_features, dtype=self.out_dtype)
        rows, scale, bias = values.reshape(-1, self.in_features), scale.reshape(-1, 1), self.bias if add_bias else None
        if rows.device.type == "cpu" and not isinstance(rows, FakeTensor):  # fake ones are counted as a GPU's
            out = _product_reference(rows, self.weight, scale, self.weight_scale, bias, self.out_dtype)
        else:
            out = torch._scaled_mm(
                rows, self.weight.t(), scale, self.weight_scale,
                bias=bias, out_dtype=self.out_dtype, use_fast_accum=True,
            )  # fmt: skip
        return out.view(*values.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


AOT = VIT_SHAPES


def examples(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Example]:
    """Frozen teachers, [B, N, C] and [B, N, 4 * C] of `dtype`; nothing for sm_80, which has no float8."""
    if architecture(device) == "sm_80":
        return
    x, y, wide = (draw((*shape[:2], n * shape[2]), dtype, device) for n in (1, 1, 4))
    p = draw(shape[2:], dtype, device)
    yield Example("quantize_rows", quantize_rows_op, (x,))
    yield Example("layer_norm_fp8", layer_norm_fp8_op, (x, None, None, p, p, 1e-6))
    yield Example("residual_layer_norm_fp8", layer_norm_fp8_op, (x, y, p, p, p, 1e-6))
    yield Example("residual_layer_norm_fp8 without affine", layer_norm_fp8_op, (x, y, p, None, None, 1e-6))
    yield Example("layer_norm_fp8 without parameters", layer_norm_fp8_op, (x, None, None, None, None, 1e-6))
    yield Example("bias_gelu_fp8", bias_gelu_fp8_op, (wide, draw(wide.shape[2:], dtype, device)))
