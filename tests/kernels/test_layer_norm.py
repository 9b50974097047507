"""LayerNorm, alone and with residual and LayerScale: values, gradients, layouts, determinism, tracing, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dune_fast.kernels.layer_norm import (
    layer_norm,
    layer_norm_backward_op,
    layer_norm_reference,
    residual_layer_norm,
    residual_layer_norm_op,
    residual_layer_norm_reference,
)

pytestmark = pytest.mark.usefixtures("poisoned")
EPS = 1e-6
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TYPES = [(FP32, FP32), (FP32, BF16), (BF16, BF16), (FP16, FP16)]  # of the stream and of the branch
SHAPES = [(2, 3, 192), (1, 300), (7, 1), (0, 16), (19, 40), (3, 1030)]


def values(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape)
    if kind == "constant":
        x = torch.full(shape, 1.5)
    elif kind == "zero":
        x = torch.zeros(shape)
    elif kind == "large":
        x *= 1e3 if dtype == FP16 else 1e17
    elif kind == "offset":
        x += 1000
    return x.to(dtype)


def arguments(shape, types=(FP32, FP32), kind="random", device="cpu", scaled=True, affine=True, shifted=False):
    """(x, y, gamma, weight, bias) and, if `shifted`, the branch's bias: leaves that require gradients."""
    torch.manual_seed(0)
    made = [values(kind, shape, types[0]), values(kind, shape, types[1])]
    made += [torch.randn(shape[-1]) if wanted else None for wanted in (scaled, affine, affine)]
    made += [torch.randn(shape[-1])] if shifted else []
    return [None if t is None else t.to(device).requires_grad_() for t in made]


def eager_residual(x, y, gamma, weight, bias, eps, out_dtype, branch_bias=None):
    """What a model without these kernels does: torch's operations in the given types."""
    y = y if branch_bias is None else (y + branch_bias).to(y.dtype)
    out = (x + (y if gamma is None else y * gamma)).to(x.dtype)
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    return out, F.layer_norm(out, x.shape[-1:], weight, bias, eps).to(out_dtype)


def outputs_and_gradients(function, inputs, upstream, *args) -> list[Tensor]:
    extra = {"branch_bias": inputs[5]} if len(inputs) > 5 else {}
    outputs = function(*inputs[:5], EPS, *args, **extra)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [u.to(o.dtype) for u, o in zip(upstream[-len(outputs) :], outputs, strict=True)]
    leaves = [t for t in inputs if t is not None]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def in_float64(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().double().requires_grad_() for t in inputs]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("types", TYPES)
def test_residual(shape, types, device, fused, no_worse):
    inputs = arguments(shape, types, device=device)
    upstream = [torch.randn(shape, device=device).to(t) for t in types]
    eager = outputs_and_gradients(eager_residual, inputs, upstream, types[1])
    exact = outputs_and_gradients(residual_layer_norm_reference, in_float64(inputs), upstream)
    with fused():
        ours = outputs_and_gradients(residual_layer_norm, inputs, upstream, types[1])
    assert [t.dtype for t in ours] == [*types, *(t.dtype for t in inputs)]
    for found, other, truth in zip(ours, eager, exact, strict=True):
        no_worse(found, other, truth)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("types", TYPES)
def test_the_branchs_bias_is_added_and_gets_its_gradient(scaled, types, device, fused, no_worse):
    """A linear layer's bias, here and not in its product: values and all gradients against autograd in float64."""
    shape = (3, 5, 72)
    inputs = arguments(shape, types, device=device, scaled=scaled, shifted=True)
    upstream = [torch.randn(shape, device=device).to(t) for t in types]
    eager = outputs_and_gradients(eager_residual, inputs, upstream, types[1])
    exact = outputs_and_gradients(residual_layer_norm_reference, in_float64(inputs), upstream)
    with fused():
        ours = outputs_and_gradients(residual_layer_norm, inputs, upstream, types[1])
    assert [t.dtype for t in ours] == [*types, *(t.dtype for t in inputs if t is not None)]
    for found, other, truth in zip(ours, eager, exact, strict=True):
        no_worse(found, other, truth)


@pytest.mark.parametrize("trained", ["gamma", "branch_bias"])
def test_gamma_or_the_branchs_bias_may_be_frozen(trained, device, fused):
    inputs = arguments((6, 40), (FP32, FP32), device=device, shifted=True)
    frozen = 5 if trained == "gamma" else 2
    inputs[frozen].requires_grad_(False)
    exact = in_float64(inputs)
    with fused():
        out, h = residual_layer_norm(*inputs[:5], EPS, branch_bias=inputs[5])
        (out * h).sum().backward()
    torch.stack(residual_layer_norm_reference(*exact[:5], EPS, branch_bias=exact[5])).prod(0).sum().backward()
    assert inputs[frozen].grad is None
    learned = 2 if trained == "gamma" else 5
    torch.testing.assert_close(inputs[learned].grad.double(), exact[learned].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["constant", "zero", "large", "offset"])
@pytest.mark.parametrize("types", [TYPES[0], TYPES[2], TYPES[3]])
def test_degenerate_and_extreme_rows(kind, types, device, fused, no_worse):
    # x' as stored is the norm's input: in half precision, compare the norm of that
    inputs = arguments((3, 24), types, kind, device)
    with fused():
        out, h = residual_layer_norm(*inputs, EPS)
    x, y, gamma, weight, bias = in_float64(inputs)
    no_worse(out, eager_residual(*inputs, EPS, types[0])[0], x + gamma * y)
    eager = F.layer_norm(out, (24,), weight.to(types[0]), bias.to(types[0]), EPS)
    no_worse(h, eager, layer_norm_reference(out.double(), weight, bias, EPS))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_plain(affine, dtype, device, fused, no_worse):
    x, _, _, weight, bias = inputs = arguments((5, 3, 72), (dtype, dtype), device=device, affine=affine)
    inputs, upstream = [x, weight, bias], [torch.randn(5, 3, 72, device=device).to(dtype)]

    def eager(x, weight, bias, eps):
        return eager_residual(x, torch.zeros_like(x), None, weight, bias, eps, dtype)[1]

    with fused():
        ours = outputs_and_gradients(layer_norm, inputs, upstream)
    other = outputs_and_gradients(eager, inputs, upstream)
    exact = outputs_and_gradients(layer_norm_reference, in_float64(inputs), upstream)
    for found, theirs, truth in zip(ours, other, exact, strict=True):
        no_worse(found, theirs, truth)


@pytest.mark.parametrize("scaled, affine", [(False, True), (True, False), (False, False)])
def test_parameters_left_out(scaled, affine, device, fused, no_worse):
    inputs = arguments((4, 40), (FP32, BF16), device=device, scaled=scaled, affine=affine)
    upstream = [torch.randn(4, 40, device=device), torch.randn(4, 40, device=device).bfloat16()]
    with fused():
        ours = outputs_and_gradients(residual_layer_norm, inputs, upstream, BF16)
    eager = outputs_and_gradients(eager_residual, inputs, upstream, BF16)
    exact = outputs_and_gradients(residual_layer_norm_reference, in_float64(inputs), upstream)
    for found, other, truth in zip(ours, eager, exact, strict=True):
        no_worse(found, other, truth)


def test_one_gradient_serves_x_and_y(device, fused):
    """Without gamma and of one type, dx and dy are one tensor: autograd must still accumulate each on its own."""
    x, y, *_ = arguments((4, 40), device=device)
    with fused():
        out, h = residual_layer_norm(x, y, None, None, None, EPS)
        ((out + h).sum() + (x * x).sum()).backward()
    torch.testing.assert_close(x.grad - y.grad, 2 * x.detach())


def test_frozen_parameters_get_no_gradient(device, fused):
    x, y, gamma, weight, bias = arguments((4, 40), device=device)
    for p in (gamma, weight, bias):
        p.requires_grad_(False)
    with fused():
        out, h = residual_layer_norm(x, y, gamma, weight, bias, EPS)
        (out * h).sum().backward()
    exact = in_float64([x, y, gamma, weight, bias])
    torch.stack(residual_layer_norm_reference(*exact, EPS)).prod(0).sum().backward()
    assert gamma.grad is weight.grad is bias.grad is None
    torch.testing.assert_close(y.grad.double(), exact[1].grad, rtol=1e-5, atol=1e-5)


def test_reference_is_torch_bit_for_bit():
    x, y, gamma, weight, bias = arguments((3, 5, 48))
    out, h = residual_layer_norm(x, y, gamma, weight, bias, EPS)  # on a CPU, outside `interpreted`
    assert torch.equal(out, x + y * gamma) and torch.equal(h, F.layer_norm(x + y * gamma, (48,), weight, bias, EPS))
    half = layer_norm(x, weight, bias, EPS, BF16)
    assert half.dtype == BF16 and torch.equal(half, F.layer_norm(x, (48,), weight, bias, EPS).bfloat16())


def test_gradcheck_of_the_reference():
    inputs = in_float64(arguments((3, 6)))
    assert torch.autograd.gradcheck(lambda *t: residual_layer_norm(*t, EPS), inputs)


def test_plain_backward_is_that_of_autograd():
    """The CPU implementation of the registered backward, which `opcheck` and tracing use."""
    inputs = arguments((2, 5, 24), shifted=True)
    x, y, gamma, weight, bias, shift = (t.detach() for t in inputs)
    out, h, mean, rstd = residual_layer_norm_op(x, y, gamma, shift, weight, bias, EPS, FP32)
    dout, dh = torch.randn_like(out), torch.randn_like(h)
    dx, dy, sums = layer_norm_backward_op(dh, dout, out, y, gamma, shift, weight, mean, rstd, FP32)
    exact = outputs_and_gradients(residual_layer_norm_reference, in_float64(inputs), [dout, dh])
    for found, truth in zip((dx, dy, sums[2], sums[0], sums[1], sums[3]), exact[2:], strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"y": torch.zeros(2, 9)}, r"x and y of one shape.*y float32 \[2, 9\]"),
        ({"gamma": torch.zeros(9)}, r"gamma \[C\]"),
        ({"weight": torch.zeros(1, 8)}, r"weight \[C\]"),
        ({"weight": None}, "bias only beside a weight"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, "floating-point x"),
        ({"y": torch.zeros(2, 8, device="meta")}, "one device"),
    ],
)
def test_bad_input(change, message):
    good = {"x": torch.zeros(2, 8), "y": torch.zeros(2, 8)}
    good |= {name: torch.zeros(8) for name in ("gamma", "weight", "bias")}
    with pytest.raises(ValueError, match=message):
        residual_layer_norm(**good | change, eps=EPS)


def test_too_many_channels_for_a_program(device, fused):
    with fused(), pytest.raises(ValueError, match="up to 4096 channels, got 4097"):
        layer_norm(torch.zeros(1, 4097, device=device), None, None, EPS)
