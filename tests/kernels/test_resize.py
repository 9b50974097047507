"""Bicubic resize with the affine fused: values against float64, layouts, bad input."""

from __future__ import annotations

import pytest
import torch

from dune_fast.kernels.resize import resize_normalize, resize_normalize_reference

pytestmark = pytest.mark.usefixtures("poisoned")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def arguments(shape, dtype=FP32, device="cpu", affine=True):
    torch.manual_seed(0)
    images = torch.randn(shape).to(dtype).to(device)
    return images, *([torch.rand(3).add(0.5).to(device), torch.randn(3).to(device)] if affine else [None, None])


def check(images, size, scale, shift, dtype, fused, no_worse):
    with fused():
        ours = resize_normalize(images, size, scale, shift, dtype)
    assert ours.shape == (len(images), 3, *size) and ours.dtype == dtype and ours.is_contiguous()
    eager = resize_normalize_reference(images, size, scale, shift, dtype)
    exact = resize_normalize_reference(images.double(), size, scale, shift, torch.float64)
    no_worse(ours, eager, exact)


@pytest.mark.parametrize(
    "before, after",
    [
        ((14, 14), (16, 16)),  # 16 / 14, as 336 -> 384 and 448 -> 512
        ((14, 21), (8, 12)),  # 8 / 14
        ((7, 9), (40, 131)),  # more than a tile either way
        ((40, 5), (3, 4)),  # rows that no output reads
        ((3, 2), (5, 7)),  # fewer pixels than taps
        ((1, 5), (3, 1)),
        ((6, 1), (1, 3)),
    ],
)
def test_values(before, after, device, fused, no_worse):
    images, scale, shift = arguments((2, 3, *before), device=device)
    check(images, after, scale, shift, FP32, fused, no_worse)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("given", [FP32, BF16, FP16])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_types(given, dtype, affine, device, fused, no_worse):
    images, scale, shift = arguments((1, 3, 7, 7), given, device, affine)
    check(images, (8, 8), scale, shift, dtype, fused, no_worse)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7e4])
def test_constant_images_stay_constant(value, device, fused):
    """Weights sum to one."""
    with fused():
        found = resize_normalize(torch.full((1, 3, 7, 7), value, device=device), (8, 9))
    torch.testing.assert_close(found, torch.full_like(found, value), rtol=3e-7, atol=0)


def test_corners_are_aligned_exactly(device, fused):
    """Integer positions: every output on an input pixel is that pixel to the bit."""
    images, _, _ = arguments((1, 3, 5, 4), device=device)
    with fused():
        found = resize_normalize(images, (9, 7))
    assert torch.equal(found[..., ::2, ::2], images)


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "crop": lambda x: x[..., 2:9, 5:12],
    "every other": lambda x: x[..., ::2, ::2],
    "transposed": lambda x: x.transpose(2, 3),
}
"""Of rows and columns; those of images and channels are the contract test's."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_images(layout, device, fused):
    base, scale, shift = arguments((2, 3, 14, 16), device=device)
    images = LAYOUTS[layout](base)
    with fused():
        found = resize_normalize(images, (9, 8), scale[:1].expand(3), shift)
        expected = resize_normalize(images.contiguous(), (9, 8), scale[:1].repeat(3), shift)
    assert torch.equal(found, expected)


def test_empty_batch(device, fused):
    with fused():
        assert resize_normalize(torch.empty(0, 3, 7, 7, device=device), (8, 8)).shape == (0, 3, 8, 8)
    assert resize_normalize(torch.empty(0, 3, 7, 7), (8, 8)).shape == (0, 3, 8, 8)


def test_same_size_is_the_affine_alone(device, fused):
    images, scale, shift = arguments((2, 3, 6, 5), device=device)
    with fused():
        assert resize_normalize(images, (6, 5)) is images
        found = resize_normalize(images, (6, 5), scale, shift)
    assert torch.equal(found, torch.addcmul(shift.view(3, 1, 1), images, scale.view(3, 1, 1)))


def test_a_gradient_takes_the_reference(device, fused):
    images = arguments((1, 3, 7, 7), device=device)[0].requires_grad_()
    with fused():
        resize_normalize(images, (8, 8)).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "images, size, scale, shift, message",
    [
        (torch.zeros(3, 7, 7), (8, 8), None, None, r"\[B, 3, H, W\].*images float32 \[3, 7, 7\]"),
        (torch.zeros(1, 4, 7, 7), (8, 8), None, None, r"\[B, 3, H, W\].*images float32 \[1, 4, 7, 7\]"),
        (torch.zeros(1, 3, 7, 7, dtype=torch.uint8), (8, 8), None, None, "floating-point images.*images uint8"),
        (torch.zeros(1, 3, 7, 7), (8, 0), None, None, r"1 to 32768.*not \(8, 0\)"),
        (torch.zeros(1, 3, 7, 7), (8,), None, None, r"not \(8,\)"),
        (torch.zeros(1, 3, 0, 7), (8, 8), None, None, r"1 to 32768.*images float32 \[1, 3, 0, 7\]"),
        (torch.zeros(1, 3, 7, 7), (8, 8), torch.ones(3), None, "both or neither.*scale float32"),
        (torch.zeros(1, 3, 7, 7), (8, 8), torch.ones(1), torch.ones(3), r"\[3\], both.*scale float32 \[1\]"),
        (torch.zeros(1, 3, 7, 7), (8, 8), torch.ones(3, device="meta"), torch.ones(3), "one device.*scale .* on meta"),
    ],
)
def test_bad_input(images, size, scale, shift, message):
    with pytest.raises(ValueError, match=message):
        resize_normalize(images, size, scale, shift)


@pytest.mark.gpu
@pytest.mark.parametrize("side, size", [(336, 384), (448, 512), (336, 192)])
def test_values_at_full_size(side, size, no_worse):
    images, scale, shift = arguments((2, 3, side, side), device="cuda")
    found = resize_normalize(images, (size, size), scale, shift)
    eager = resize_normalize_reference(images, (size, size), scale, shift, FP32)
    no_worse(found, eager, resize_normalize_reference(images.double(), (size, size), scale, shift, torch.float64))
