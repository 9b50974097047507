"""The residual addition without a norm: values, gradients, what passes through, determinism, tracing, bad input."""

from __future__ import annotations

import pytest
import torch

from dune_fast.kernels.layer_norm import residual_reference
from dune_fast.kernels.residual import residual, residual_backward_op

pytestmark = pytest.mark.usefixtures("poisoned")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TYPES = [(FP32, FP32, FP32), (FP32, BF16, FP32), (FP32, BF16, BF16), (BF16, BF16, BF16), (FP16, FP16, FP16)]


def arguments(shape, types=(FP32, FP32), device="cpu", scaled=True, shifted=True):
    """(x, y, gamma, branch_bias), leaves that require gradients."""
    torch.manual_seed(0)
    made = [torch.randn(shape).to(types[0]), torch.randn(shape).to(types[1])]
    made += [torch.randn(shape[-1]) if wanted else None for wanted in (scaled, shifted)]
    return [None if t is None else t.to(device).requires_grad_() for t in made]


def eager(x, y, gamma, branch_bias, out_dtype):
    """What a model without this kernel does: torch's operations in the given types."""
    y = y if branch_bias is None else (y + branch_bias).to(y.dtype)
    return (x + (y if gamma is None else y * gamma)).to(x.dtype).to(out_dtype)


def output_and_gradients(function, inputs, upstream, *args):
    out = function(*inputs, *args)
    leaves = [t for t in inputs if t is not None]
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def in_float64(inputs):
    return [None if t is None else t.detach().double().requires_grad_() for t in inputs]


@pytest.mark.parametrize("shape", [(2, 3, 192), (1, 300), (7, 1), (0, 16)])
@pytest.mark.parametrize("types", TYPES)
def test_values_and_gradients(shape, types, device, fused, no_worse):
    inputs, upstream = arguments(shape, types, device), torch.randn(shape, device=device).to(types[2])
    exact = output_and_gradients(residual_reference, in_float64(inputs), upstream)
    other = output_and_gradients(eager, inputs, upstream, types[2])
    with fused():
        ours = output_and_gradients(residual, inputs, upstream, types[2])
    assert [t.dtype for t in ours] == [types[2], *(t.dtype for t in inputs)]
    for found, theirs, truth in zip(ours, other, exact, strict=True):
        no_worse(found, theirs, truth)


@pytest.mark.parametrize("scaled, shifted", [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("types", [TYPES[0], TYPES[2]])
def test_parameters_left_out(scaled, shifted, types, device, fused, no_worse):
    inputs = arguments((5, 40), types, device, scaled, shifted)
    upstream = torch.randn(5, 40, device=device).to(types[2])
    exact = output_and_gradients(residual_reference, in_float64(inputs), upstream)
    other = output_and_gradients(eager, inputs, upstream, types[2])
    with fused():
        ours = output_and_gradients(residual, inputs, upstream, types[2])
    for found, theirs, truth in zip(ours, other, exact, strict=True):
        no_worse(found, theirs, truth)


def test_one_gradient_serves_x_and_y(device, fused):
    """Without gamma dx and dy are dout itself: autograd must still accumulate each on its own."""
    x, y, *_ = arguments((4, 40), device=device)
    with fused():
        (residual(x, y).sum() + (x * x).sum()).backward()
    torch.testing.assert_close(x.grad - y.grad, 2 * x.detach())


def test_reference_is_torch_bit_for_bit():
    x, y, gamma, shift = arguments((3, 5, 48))
    assert torch.equal(residual(x, y, gamma), x + y * gamma)  # on a CPU, outside `interpreted`
    assert torch.equal(residual(x, y, gamma, shift, BF16), (x + (y + shift) * gamma).bfloat16())


def test_gradcheck_of_the_reference():
    assert torch.autograd.gradcheck(residual, in_float64(arguments((3, 6))))


def test_plain_backward_is_that_of_autograd():
    """The CPU implementation of the registered backward, which `opcheck` and tracing use."""
    inputs = arguments((2, 5, 24))
    x, y, gamma, shift = (t.detach() for t in inputs)
    dout = torch.randn_like(x)
    dx, dy, sums = residual_backward_op(dout, y, gamma, shift, FP32, FP32)
    exact = output_and_gradients(residual_reference, in_float64(inputs), dout)
    for found, truth in zip((dx, dy, *sums), exact[1:], strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"y": torch.zeros(2, 9)}, r"residual takes x and y of one shape.*y float32 \[2, 9\]"),
        ({"gamma": torch.zeros(9)}, r"gamma \[C\]"),
        ({"branch_bias": torch.zeros(1, 8)}, r"branch_bias \[C\]"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, "floating-point x"),
    ],
)
def test_bad_input(change, message):
    good = {"x": torch.zeros(2, 8), "y": torch.zeros(2, 8), "gamma": torch.zeros(8), "branch_bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=message):
        residual(**good | change)
