"""The residual addition without a norm: values, gradients, what passes through, bad input."""

from __future__ import annotations

import pytest
import torch

from dune_fast.kernels.layer_norm import residual_reference
from dune_fast.kernels.residual import residual

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


CASES = [(shape, types, True, True) for shape in [(2, 3, 192), (1, 300), (7, 1), (0, 16)] for types in TYPES]
LEFT_OUT = [(False, True), (True, False), (False, False)]
CASES += [((5, 40), types, *given) for types in (TYPES[0], TYPES[2]) for given in LEFT_OUT]


@pytest.mark.parametrize(("shape", "types", "scaled", "shifted"), CASES)
def test_values_and_gradients(shape, types, scaled, shifted, device, agrees):
    inputs = arguments(shape, types, device, scaled, shifted)
    upstream = torch.randn(shape, device=device).to(types[2])
    found = agrees(
        lambda *t: residual(*t, types[2]), lambda *t: eager(*t, types[2]), residual_reference, inputs, [upstream]
    )
    assert [t.dtype for t in found] == [types[2], *(t.dtype for t in inputs if t is not None)]


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
    assert torch.autograd.gradcheck(residual, [t.detach().double().requires_grad_() for t in arguments((3, 6))])


@pytest.mark.parametrize("wrong", ["y", "gamma", "branch_bias"])
def test_bad_input(wrong):
    """By the checks of `layer_norm`, whose test has them all."""
    good = {"x": torch.zeros(2, 8), "y": torch.zeros(2, 8), "gamma": torch.zeros(8), "branch_bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=rf"residual takes .*{wrong} float32 \[2, 9\]"):
        residual(**good | {wrong: torch.zeros(2, 9)})
