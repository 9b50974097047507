"""The Triton kernels of the colour augmentation against the float64 reference; that reference: test_augment.py."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from photographs import random_images, random_params

from dune_fast.kernels import augment, augment_kernels
from dune_fast.kernels.augment import ColourParams, augment_colour

pytestmark = pytest.mark.usefixtures("poisoned")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def exact_result(images, params):
    wide = images.permute(0, 3, 1, 2).double() / 255 if images.dtype == torch.uint8 else images.double()
    return augment_colour(wide, params, torch.float64)


def check(images, params, dtype, fused, no_worse):
    with fused():
        ours = augment_colour(images, params, dtype)
    eager = augment._reference(images, [] if params is None else params.tensors(), dtype)
    assert ours.shape == eager.shape and ours.dtype == dtype and ours.is_contiguous()
    exact = exact_result(images, params)
    for i in range(len(images)):  # each image, so that a large one hides no other
        no_worse(ours[i], eager[i], exact[i])


def test_all_orders(device, fused, no_worse):
    blur = [i % 12 == 5 for i in range(25)]
    check(random_images(25, 6, 7, device=device), random_params(25, device, blur), FP32, fused, no_worse)


@pytest.mark.parametrize("given", [torch.uint8, FP32, BF16, FP16])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_types(given, dtype, device, fused, no_worse):
    images, params = random_images(3, 5, 5, given, device), random_params(3, device, [False, False, True])
    check(images, params, dtype, fused, no_worse)


@pytest.mark.parametrize("given", [torch.uint8, FP32, BF16])
@pytest.mark.parametrize("width", [1, 5, 9])
def test_normalisation_alone(given, width, device, fused, no_worse):
    images = random_images(2, 4, 9, given, device)
    images = images[:, :1, :width] if given == torch.uint8 else images[..., :1, :width]
    for dtype in (FP32, FP16):
        check(images, None, dtype, fused, no_worse)


@pytest.mark.parametrize("height, width", [(40, 6), (6, 140), (39, 57)])
def test_more_than_one_tile(height, width, device, fused, no_worse, monkeypatch):
    """Of the sums, with more tiles than partial sums; of the colours; and of the blur, whose tiles share rows."""
    monkeypatch.setattr(augment_kernels, "SPLITS", 2)
    params = replace(random_params(2, device, [False, True]), solarize=torch.tensor([True, False], device=device))
    check(random_images(2, height, width, device=device), params, FP32, fused, no_worse)


@pytest.mark.parametrize("name, value", [("brightness", 0.0), ("contrast", 0.0), ("saturation", 3.0), ("hue", -0.5)])
@pytest.mark.parametrize("level", [0, 90, 255])
def test_extremes(name, value, level, device, fused, no_worse):
    """Constant images, with strong parameters; the blur at its narrowest and widest keeps them constant."""
    images = torch.full((2, 5, 6, 3), level, dtype=torch.uint8, device=device)
    images[..., 1] //= 2
    params = replace(
        ColourParams.identity(2, device),
        **{name: torch.full((2,), value, device=device)},
        blur=torch.ones(2, dtype=torch.bool, device=device),
        sigma=torch.tensor([0.01, 50.0], device=device),
    )
    check(images, params, FP32, fused, no_worse)


LAYOUTS = {
    "crop": lambda x: x[:, 3:9, 2:9],
    "every other": lambda x: x[:, ::2, ::2],
    "channels first": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "transposed": lambda x: x[:, :6].transpose(1, 2),
    "channels last": lambda x: (x.permute(0, 3, 1, 2) / 255).contiguous(memory_format=torch.channels_last),
}
"""Of pixels and channels; those of images are the contract test's."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_images(layout, device, fused):
    images = LAYOUTS[layout](random_images(2, 12, 14, device=device))
    params = random_params(2, device, [False, False])
    with fused():
        found, expected = augment_colour(images, params), augment_colour(images.contiguous(), params)
        columns = replace(params, brightness=torch.stack([params.brightness] * 3, 1)[:, 1])
        assert torch.equal(augment_colour(images, columns), expected)
    assert torch.equal(found, expected)


def test_empty_batch(device, fused):
    with fused():
        for images in (random_images(0, 6, 7, device=device), random_images(0, 6, 7, FP32, device)):
            assert augment_colour(images, ColourParams.identity(0, device)).shape == (0, 3, 6, 7)
            assert augment_colour(images, None).shape == (0, 3, 6, 7)
    assert augment_colour(random_images(0, 6, 7), ColourParams.identity(0)).shape == (0, 3, 6, 7)


@pytest.mark.parametrize("triton", [False, True])
def test_a_gradient_takes_the_reference(triton, device, fused):
    images = random_images(2, 9, 9, FP32, device).requires_grad_()
    with fused() if triton else contextlib.nullcontext():
        augment_colour(images, random_params(2, device)).sum().backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "images, change, dtype, message",
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {}, FP32, r"uint8 \[B, H, W, 3\]"),
        (torch.zeros(2, 8, 8, 3), {}, FP32, r"\[B, 3, H, W\]"),
        (torch.zeros(3, 3, 8, 8), {}, FP32, "parameters of 2 images for 3"),
        (torch.zeros(2, 3, 4, 8), {}, FP32, "too small"),
        (torch.zeros(2, 0, 5, 3, dtype=torch.uint8), {}, FP32, r"1 to 2\^30 - 1 pixels.*images uint8 \[2, 0, 5, 3\]"),
        (random_images(2, 5, 5), {"order": torch.zeros(2, 3)}, FP32, r"order \[B, 4\].*order float32 \[2, 3\]"),
        (random_images(2, 5, 5), {"sigma": torch.ones(3)}, FP32, r"parameters \[B\].*sigma float32 \[3\]"),
        (random_images(2, 5, 5), {"hue": torch.zeros(2, device="meta")}, FP32, "one device.*hue float32 .* on meta"),
        (random_images(2, 5, 5), {}, torch.uint8, "not torch.uint8.*images uint8"),
    ],
)
def test_bad_input(images, change, dtype, message):
    with pytest.raises(ValueError, match=message):
        augment_colour(images, replace(ColourParams.identity(2), **change), dtype)


@pytest.mark.gpu
def test_parameters_reach_the_gpu_without_waiting():
    images, host = random_images(8, 64, 150, device="cuda"), random_params(8)
    augment_colour(images, host.to(torch.device("cuda")))  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment_colour(images, host.to(torch.device("cuda")))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_values_at_full_size(dtype, fused, no_worse):
    check(random_images(24, 336, 336, device="cuda"), random_params(24, "cuda"), dtype, fused, no_worse)
