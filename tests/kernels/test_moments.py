"""Moments against float64 and torch.var_mean: values, layouts, splits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dune_fast.kernels import moments as module
from dune_fast.kernels.moments import moments, moments_reference

pytestmark = pytest.mark.usefixtures("poisoned")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KINDS = {
    "random": lambda x: x,
    "constant": lambda x: torch.full_like(x, 1.7),
    "zero": torch.zeros_like,
    "large": lambda x: x * 1e15,
    "offset": lambda x: x + 1e3,
    "outliers first": lambda x: torch.cat([torch.full_like(x[:1], 1e6), x[1:]]),  # spoil no shift
    "channels apart": lambda x: x * torch.logspace(-6, 6, x.shape[-1]),
}


def eager(x: Tensor) -> tuple[Tensor, Tensor]:
    """What torch has for it; it takes half precision in float32 too."""
    var, mean = torch.var_mean(x.float().flatten(0, -2), 0, correction=0)
    return mean, var * (x.numel() // x.shape[-1])


def assert_right(x: Tensor, fused, no_worse) -> None:
    with fused():
        found = moments(x)
    for ours, other, exact in zip(found, eager(x), moments_reference(x.double()), strict=True):
        assert ours.dtype == FP32 and ours.shape == x.shape[-1:]
        no_worse(ours, other, exact)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("shape", [(3, 7), (1, 5), (2, 33, 192), (300, 1), (70, 70), (4, 1, 9)])
def test_shapes(shape, dtype, device, fused, no_worse):
    torch.manual_seed(0)
    assert_right(torch.randn(shape, device=device).to(dtype), fused, no_worse)


@pytest.mark.parametrize("seed", range(30, 40))
def test_a_mean_about_zero_is_exact(seed, device, fused, no_worse):
    """Sums of 300 numbers that cancel to 0.007 (seed 34) lost too much when float32 added them up."""
    torch.manual_seed(seed)
    assert_right(torch.randn(300, 1, device=device), fused, no_worse)


@pytest.mark.parametrize("kind", KINDS)
def test_values(kind, device, fused, no_worse):
    torch.manual_seed(0)
    assert_right(KINDS[kind](torch.randn(150, 12)).to(device), fused, no_worse)


def test_channel_far_from_zero_keeps_its_variance(device, fused):
    """E[x^2] - E[x]^2, or squares about zero, would lose it all."""
    torch.manual_seed(0)
    x = torch.randn(500, 8, device=device) + 1e5
    with fused():
        mean, m2 = moments(x)
    exact_mean, exact_m2 = moments_reference(x.double())
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(m2.double(), exact_m2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_slices_of_tokens_are_read_where_they_lie(dtype, device, fused, no_worse, monkeypatch):
    torch.manual_seed(0)
    tokens = torch.randn(5, 9, 40, device=device).to(dtype)
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("copied"))
    for x in (tokens[:, 1:], tokens[:, 0], tokens[..., 8:24], tokens[:1].expand(4, 9, 40)):
        assert_right(x, fused, no_worse)
    monkeypatch.undo()
    assert_right(torch.randn(3, 4, 5, 6, device=device)[:, :2, 1:], fused, no_worse)


def test_many_splits_and_a_ragged_last_one(device, fused, no_worse, monkeypatch):
    """More splits than the merge holds at a time, the last of them with few rows."""
    monkeypatch.setattr(module, "processors", lambda device: 36)
    torch.manual_seed(0)
    assert_right(torch.randn(32 * 140 + 3, 3, device=device) + 7, fused, no_worse)


def test_nan_stays_in_its_channel(device, fused):
    x = torch.randn(100, 6, device=device)
    x[57, 2] = torch.nan
    with fused():
        mean, m2 = moments(x)
    assert mean.isnan().nonzero().tolist() == m2.isnan().nonzero().tolist() == [[2]]


def test_reference_is_exact_in_float64():
    torch.manual_seed(0)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moments_reference, x)
    torch.testing.assert_close(moments_reference(x)[1], x.var(0) * 5)


@pytest.mark.parametrize("shape", [(5,), (0, 3), (3, 0)])
def test_rejects_what_has_no_moments(shape, fused):
    with fused(), pytest.raises(ValueError, match=r"at least one row; got x float32 \["):
        moments(torch.zeros(shape))
