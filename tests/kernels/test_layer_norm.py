"""LayerNorm, alone and with residual and LayerScale: values, gradients, what is frozen, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dune_fast.kernels.layer_norm import (
    layer_norm,
    layer_norm_reference,
    residual_layer_norm,
    residual_layer_norm_reference,
)

pytestmark = pytest.mark.usefixtures("poisoned")
EPS = 1e-6
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TYPES = [(FP32, FP32), (FP32, BF16), (BF16, BF16), (FP16, FP16)]  # of the stream and of the branch
SHAPES = [(2, 3, 192), (1, 300), (7, 1), (0, 16), (19, 40), (3, 1030)]


KINDS = {
    "random": lambda x, dtype: x,
    "constant": lambda x, dtype: torch.full_like(x, 1.5),
    "zero": lambda x, dtype: torch.zeros_like(x),
    "large": lambda x, dtype: x * (1e3 if dtype == FP16 else 1e17),
    "offset": lambda x, dtype: x + 1000,
}


def arguments(shape, types=(FP32, FP32), kind="random", device="cpu", scaled=True, affine=True, shifted=False):
    """(x, y, gamma, weight, bias) and, if `shifted`, the branch's bias: leaves that require gradients."""
    torch.manual_seed(0)
    made = [KINDS[kind](torch.randn(shape), dtype).to(dtype) for dtype in types]
    made += [torch.randn(shape[-1]) if wanted else None for wanted in (scaled, affine, affine)]
    made += [torch.randn(shape[-1])] if shifted else []
    return [None if t is None else t.to(device).requires_grad_() for t in made]


def eager_residual(x, y, gamma, weight, bias, eps, out_dtype, branch_bias=None):
    """What a model without these kernels does: torch's operations in the given types."""
    y = y if branch_bias is None else (y + branch_bias).to(y.dtype)
    out = (x + (y if gamma is None else y * gamma)).to(x.dtype)
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    return out, F.layer_norm(out, x.shape[-1:], weight, bias, eps).to(out_dtype)


def check_residual(agrees, inputs, types) -> None:
    """x' and LN(x') of `types`, and all gradients, against torch in these types and autograd in float64."""
    shape, device = inputs[0].shape, inputs[0].device
    upstream = [torch.randn(shape, device=device).to(t) for t in types]
    found = agrees(
        lambda x, y, g, w, b, s=None: residual_layer_norm(x, y, g, w, b, EPS, types[1], s),
        lambda x, y, g, w, b, s=None: eager_residual(x, y, g, w, b, EPS, types[1], s),
        lambda x, y, g, w, b, s=None: residual_layer_norm_reference(x, y, g, w, b, EPS, None, s),
        inputs, upstream,
    )  # fmt: skip
    assert [t.dtype for t in found] == [*types, *(t.dtype for t in inputs if t is not None and t.requires_grad)]


CASES = [(shape, types, {}) for shape in SHAPES for types in TYPES]
CASES += [((3, 5, 72), types, {"scaled": scaled, "shifted": True}) for types in TYPES for scaled in (True, False)]
CASES += [((4, 40), TYPES[1], {"scaled": s, "affine": a}) for s, a in ((False, True), (True, False), (False, False))]


@pytest.mark.parametrize(("shape", "types", "given"), CASES)
def test_residual(shape, types, given, device, agrees):
    """With all parameters or some; the branch's bias is a linear layer's, added here and not in its product."""
    check_residual(agrees, arguments(shape, types, device=device, **given), types)


@pytest.mark.parametrize("frozen", [(2,), (5,), (2, 3, 4)], ids=["gamma", "branch_bias", "gamma, weight, bias"])
def test_frozen_parameters_get_no_gradient(frozen, device, agrees):
    inputs = arguments((6, 40), device=device, shifted=True)
    for i in frozen:
        inputs[i].requires_grad_(False)
    check_residual(agrees, inputs, (FP32, FP32))


@pytest.mark.parametrize("kind", ["constant", "zero", "large", "offset"])
@pytest.mark.parametrize("types", [TYPES[0], TYPES[2], TYPES[3]])
def test_degenerate_and_extreme_rows(kind, types, device, fused, no_worse):
    # x' as stored is the norm's input: in half precision, compare the norm of that
    inputs = arguments((3, 24), types, kind, device)
    with fused():
        out, h = residual_layer_norm(*inputs, EPS)
    x, y, gamma, weight, bias = (t.detach().double() for t in inputs)
    no_worse(out, eager_residual(*inputs, EPS, types[0])[0], x + gamma * y)
    eager = F.layer_norm(out, (24,), weight.to(types[0]), bias.to(types[0]), EPS)
    no_worse(h, eager, layer_norm_reference(out.double(), weight, bias, EPS))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_plain(affine, dtype, device, agrees):
    x, _, _, weight, bias = arguments((5, 3, 72), (dtype, dtype), device=device, affine=affine)
    agrees(
        lambda *t: layer_norm(*t, EPS),
        lambda x, w, b: eager_residual(x, torch.zeros_like(x), None, w, b, EPS, dtype)[1],
        lambda *t: layer_norm_reference(*t, EPS),
        [x, weight, bias], [torch.randn(5, 3, 72, device=device)],
    )  # fmt: skip


def test_one_gradient_serves_x_and_y(device, fused):
    """Without gamma and of one type, dx and dy are one tensor: autograd must still accumulate each on its own."""
    x, y, *_ = arguments((4, 40), device=device)
    with fused():
        out, h = residual_layer_norm(x, y, None, None, None, EPS)
        ((out + h).sum() + (x * x).sum()).backward()
    torch.testing.assert_close(x.grad - y.grad, 2 * x.detach())


def test_reference_is_torch_bit_for_bit():
    x, y, gamma, weight, bias = arguments((3, 5, 48))
    out, h = residual_layer_norm(x, y, gamma, weight, bias, EPS)  # on a CPU, outside `interpreted`
    assert torch.equal(out, x + y * gamma) and torch.equal(h, F.layer_norm(x + y * gamma, (48,), weight, bias, EPS))
    half = layer_norm(x, weight, bias, EPS, BF16)
    assert half.dtype == BF16 and torch.equal(half, F.layer_norm(x, (48,), weight, bias, EPS).bfloat16())


def test_gradcheck_of_the_reference():
    inputs = [t.detach().double().requires_grad_() for t in arguments((3, 6))]
    assert torch.autograd.gradcheck(lambda *t: residual_layer_norm(*t, EPS), inputs)


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
