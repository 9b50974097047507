"""Bias and exact GELU: values and gradients against float64, tails, limits, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dune_fast.kernels import gelu as module
from dune_fast.kernels.gelu import bias_gelu, bias_gelu_reference, linear_gelu
from dune_fast.kernels.library import INTERPRETER, jit, tl

pytestmark = pytest.mark.usefixtures("poisoned")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def arguments(shape, dtype=FP32, device="cpu", size=1.0, bias_dtype=FP32):
    torch.manual_seed(0)
    x, bias = (size * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(bias_dtype)
    return [x.to(device).requires_grad_(), bias.to(device).requires_grad_()]


def eager(x, bias):
    return F.gelu(x + bias.to(x.dtype))


@pytest.mark.parametrize("shape", [(2, 3, 192), (1, 300), (7, 1), (0, 16), (5,), (37, 260)])
@pytest.mark.parametrize("types", [(FP32, FP32), (BF16, FP32), (FP16, FP32), (BF16, BF16)])  # of x and of the bias
def test_values_and_gradients(shape, types, device, agrees):
    inputs = arguments(shape, types[0], device, bias_dtype=types[1])
    upstream = torch.randn(shape, device=device).to(types[0])
    found = agrees(bias_gelu, eager, bias_gelu_reference, inputs, [upstream])
    assert [t.dtype for t in found] == [types[0], *types]


@pytest.mark.parametrize("size", [0.0, 1e-30, 30.0, 1e4, 1e18])
def test_tails(size, device, agrees):
    """Far from 0 the function is 0 or x and its slope 0 or 1: exp(-u^2 / 2) must underflow, not make NaN of inf * 0."""
    inputs = arguments((4, 64), device=device, size=size)
    inputs[1] = torch.zeros(64, device=device, requires_grad=True)
    agrees(bias_gelu, eager, bias_gelu_reference, inputs, [torch.randn(4, 64, device=device)])


_gelu, _gelu_slope = module.gelu, module._gelu_slope


@jit
def _unrounded(u, h, slope, BLOCK: tl.constexpr):
    """The form for half precision, in float32."""
    at = tl.arange(0, BLOCK)
    value = tl.load(u + at)
    tl.store(h + at, _gelu(value, tl.bfloat16))
    tl.store(slope + at, _gelu_slope(value, tl.bfloat16))


@pytest.mark.skipif(not (INTERPRETER or torch.cuda.is_available()), reason="no triton here")
def test_errors_of_the_polynomial(device):
    """What the header of `kernels.gelu` states: absolute, relative to the value, and far out in the tail."""
    u = torch.linspace(-15, 15, 2**16, device=device)
    h, slope = torch.empty_like(u), torch.empty_like(u)
    _unrounded[(1,)](u, h, slope, BLOCK=2**16)
    u = u.double().cpu()
    tail = torch.special.log_ndtr(u).exp()  # Phi, to all digits where it is tiny
    exact, error = u * tail, (h.double().cpu() - u * tail).abs()
    assert error.max() < 5e-7
    for least, relative in ((-1, 3e-6), (-3, 1e-5), (-12.6, 2**-9)):  # below, Q is a subnormal float32
        assert (error <= relative * exact.abs())[u >= least].all(), least
    assert not h.cpu()[u <= -14.5].any()  # where the argument stops, Q has underflowed
    density = torch.exp(-u * u / 2) / math.sqrt(2 * math.pi)
    assert (slope.double().cpu() - (tail + u * density)).abs().max() < 1.2e-6


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_limits_and_nan(dtype, device, fused):
    """inf * 0 is nowhere: -inf and the largest numbers give the limits, NaN stays NaN and in its place."""
    inf, largest, tiny = float("inf"), torch.finfo(dtype).max, torch.finfo(dtype).tiny
    x = torch.tensor([inf, largest, 20, tiny, 0, -0.0, -tiny, -20, -largest, -inf, torch.nan], dtype=dtype)
    inputs = [x[None].to(device).requires_grad_(), torch.zeros(len(x), device=device, requires_grad=True)]
    with fused(), np.errstate(over="ignore"):  # the interpreter's numpy squares what it then leaves out
        found = [out := bias_gelu(*inputs), *torch.autograd.grad(out.sum(), inputs)]
    h = torch.tensor([inf, largest, 20, tiny / 2, 0, 0, -tiny / 2, 0, 0, 0, torch.nan], dtype=torch.float64)
    slope = torch.tensor([1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0, 0, 0, torch.nan], dtype=torch.float64)
    for ours, expected in zip(found, (h, slope, slope), strict=True):
        ours = ours.detach().double().cpu().view(-1)
        torch.testing.assert_close(ours, expected, rtol=2e-4, atol=1e-10, equal_nan=True)


def test_reference_is_torch_bit_for_bit():
    x, bias = arguments((3, 5, 48))
    assert torch.equal(bias_gelu(x, bias), F.gelu(x + bias))  # on a CPU, outside `interpreted`


def test_gradcheck_of_the_reference():
    x, bias = arguments((3, 6), torch.float64, bias_dtype=torch.float64)
    assert torch.autograd.gradcheck(bias_gelu, (x, bias))


@pytest.mark.parametrize(
    "x, bias, message",
    [
        (torch.zeros(2, 8), torch.zeros(9), r"x \[\.\.\., F\] and bias \[F\]"),
        (torch.zeros(2, 8), torch.zeros(1, 8), r"x \[\.\.\., F\] and bias \[F\]"),
        (torch.zeros(()), torch.zeros(1), r"x \[\.\.\., F\] and bias \[F\]"),
        (torch.zeros(2, 8), torch.zeros(8, device="meta"), "one device.*bias float32 .* on meta"),
    ],
)
def test_bad_input(x, bias, message):
    with pytest.raises(ValueError, match=message):
        bias_gelu(x, bias)


@pytest.mark.parametrize("shape", [(3, 5, 16), (1, 16), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_in_the_epilogue_of_a_product(shape, dtype, device):
    """Within the rounding of the product and the tanh form's 5e-4, also for strided rows."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*shape, 2, device=device).to(dtype)[..., 0], torch.randn(24, 16), torch.randn(24)
    weight, bias = (weight * 0.2).to(device, dtype), bias.to(device, dtype)
    found = linear_gelu(x, weight, bias)
    assert found.shape == (*shape[:-1], 24) and found.dtype == dtype and not found.requires_grad
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-3)


def test_an_epilogue_wants_one_type(device):
    x, weight = torch.zeros(2, 16, device=device), torch.zeros(24, 16, device=device, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="of one type; got x float32"):
        linear_gelu(x, weight, torch.zeros(24, device=device, dtype=torch.bfloat16))
