"""Row-wise float8: error bounds against float64, what is exact, degenerate rows, and the linear layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.kernels.fp8 import (
    E4M3,
    FP8Linear,
    FP8Rows,
    bias_gelu_fp8,
    layer_norm_fp8,
    quantize_rows,
    quantize_rows_reference,
    residual_layer_norm_fp8,
)
from dune_fast.kernels.gelu import bias_gelu_reference
from dune_fast.kernels.layer_norm import layer_norm_reference, residual_layer_norm_reference
from dune_fast.kernels.library import INTERPRETER

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def float8_runs() -> bool:
    return INTERPRETER or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9))


pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not float8_runs(), reason="this GPU has no float8"),
]


def check_quantized(found: FP8Rows, exact: Tensor) -> None:
    """Scales are amax / 448; values are within half a step of e4m3: 2^-4 of themselves or 2^-10 of the scale."""
    values, scale, exact = found.values.double().cpu(), found.scale.double().cpu(), exact.double().cpu()
    assert values.shape == exact.shape and scale.shape == (*exact.shape[:-1], 1) and found.values.dtype == E4M3
    amax = exact.abs().amax(-1, keepdim=True) if exact.numel() else exact.new_zeros(scale.shape)
    # float32's own error; GELU's where it comes near 0 is one of its argument, a few units
    torch.testing.assert_close(scale, amax.clamp_min(1e-12) / 448, rtol=1e-5, atol=2**-21 / 448)
    before = 1e-5 * amax + 2**-21
    allowed = torch.maximum(exact.abs() * 2**-4, scale * 2**-10) + before
    assert ((values * scale - exact).abs() <= allowed).all()


@pytest.mark.parametrize("shape", [(2, 3, 192), (1, 300), (7, 1), (0, 16), (5,), (9, 40)])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_every_form(shape, dtype, device, fused):
    x, y = (torch.randn(shape).to(device, dtype) for _ in range(2))
    gamma, weight, bias = (torch.randn(shape[-1], device=device) for _ in range(3))
    with fused():
        check_quantized(quantize_rows(x), x)
        check_quantized(layer_norm_fp8(x, weight, bias, 1e-6), layer_norm_reference(x.double(), weight, bias, 1e-6))
        out, h = residual_layer_norm_fp8(x, y, gamma, weight, bias, 1e-6)
        check_quantized(bias_gelu_fp8(x, bias), bias_gelu_reference(x.double(), bias))
    expected = residual_layer_norm_reference(x, y, gamma, weight, bias, 1e-6)[0]
    torch.testing.assert_close(out, expected)
    check_quantized(h, layer_norm_reference(out.double(), weight, bias, 1e-6))


def test_without_parameters(device, fused):
    x, y = torch.randn(3, 24, device=device), torch.randn(3, 24, device=device)
    with fused():
        out, h = residual_layer_norm_fp8(x, y, None, None, None, 1e-6)
        plain = layer_norm_fp8(x, None, None, 1e-6)
    assert torch.equal(out, x + y)
    check_quantized(h, layer_norm_reference(out.double(), None, None, 1e-6))
    check_quantized(plain, layer_norm_reference(x.double(), None, None, 1e-6))


@pytest.mark.parametrize("triton", [False, True])
def test_rows_that_could_divide_by_zero_or_overflow(triton, device, fused):
    x = torch.zeros(6, 8, device=device)
    x[1], x[2], x[3], x[4, 0] = 3.0, 1e-30, 3e38, float("nan")
    x[5, 0] = float("inf")
    if triton:
        with fused(), np.errstate(invalid="ignore"):  # inf * 0 in the interpreter's numpy
            values, scale = quantize_rows(x)
    else:
        values, scale = quantize_rows(x)
    back = values.float() * scale
    assert torch.equal(back[0], x[0]) and torch.equal(back[2], x[0])  # zeros, and what is as good as zero
    torch.testing.assert_close(back[[1, 3]], x[[1, 3]], rtol=1e-6, atol=0)  # the largest of a row is exact
    assert back[4, 0].isnan() and back[5, 0].isnan()


def test_all_e4m3_numbers_survive(device, fused):
    """Rounding happens once: what is a number of e4m3 already comes back bit for bit, subnormals and signs included."""
    x = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    x = x[x.isfinite()].to(device)  # 448 is among them, so the scale is 1
    with fused():
        found = quantize_rows(x)
    assert found.scale.item() == 1.0 and torch.equal(found.values.float(), x)


def test_needs_no_gradient():
    x = torch.randn(2, 16, requires_grad=True)
    for call in (
        lambda: quantize_rows(x),
        lambda: layer_norm_fp8(x, None, None, 1e-6),
        lambda: residual_layer_norm_fp8(x.detach(), x, None, None, None, 1e-6),
        lambda: bias_gelu_fp8(x.detach(), x[0]),
    ):
        with pytest.raises(ValueError, match="has no gradient: call it under torch.no_grad"):
            call()
        with torch.no_grad():
            call()


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias, device):
    torch.manual_seed(0)
    linear = nn.Linear(256, 96, bias=bias).double()
    x = torch.randn(4, 33, 256, dtype=torch.float64)
    quantized = FP8Linear(linear.float()).to(device)
    found = quantized(x.float().to(device)).cpu()
    assert found.shape == (4, 33, 96) and found.dtype == BF16
    assert 0.02 < relative(found, linear(x.float())) < 0.045  # 3.7 % for normal numbers
    # exact, but for the sum's own rounding, on what the quantized factors stand for
    values, scale = quantize_rows_reference(x.float())
    weight = quantized.weight.double().cpu() * quantized.weight_scale.double().cpu().t()
    exact = F.linear(values.double() * scale.double(), weight, linear.bias.double() if bias else None)
    assert relative(found, exact) < 4e-3  # bf16
    already = quantized(FP8Rows(values.to(device), scale.to(device)))
    torch.testing.assert_close(already.cpu(), found)


def test_linear_follows_the_row_scales(device):
    """Rows and outputs of very different sizes keep their relative accuracy, which one scale a tensor would lose."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-3, 3, 32)[:, None])
    x = torch.randn(16, 64) * torch.logspace(-4, 4, 16)[:, None]
    found, exact = FP8Linear(linear).to(device)(x.to(device)).cpu(), linear(x).detach()
    normalized = [t.double() / (x.norm(dim=1)[:, None] * linear.weight.norm(dim=1)) for t in (found, exact)]
    assert relative(*normalized) < 0.05


def test_linear_keeps_its_types_and_leaves_out_the_bias(device):
    linear = FP8Linear(nn.Linear(32, 16)).to(device).to(FP16).to(torch.float64)
    assert linear.weight.dtype == E4M3 and linear.weight_scale.dtype == FP32 and linear.bias.dtype == BF16
    x = torch.randn(3, 32, device=device)
    torch.testing.assert_close(linear(x, add_bias=False) + linear.bias, linear(x), rtol=1e-2, atol=1e-2)
    assert linear(x[:0]).shape == (0, 16) and linear(x[0]).shape == (16,)
    loaded = FP8Linear(nn.Linear(32, 16)).to(device)
    loaded.load_state_dict(linear.state_dict())
    assert torch.equal(loaded(x), linear(x))


def test_linear_refuses():
    with pytest.raises(ValueError, match="multiples of 16, got 40 -> 32"):
        FP8Linear(nn.Linear(40, 32))
    with pytest.raises(ValueError, match="bfloat16 or float16, not torch.float32"):
        FP8Linear(nn.Linear(32, 32), FP32)
    with pytest.raises(ValueError, match=r"takes \[\.\.\., 32\].*\[2, 48\]"):
        FP8Linear(nn.Linear(32, 32))(torch.zeros(2, 48))
