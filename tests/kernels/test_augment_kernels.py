"""The Triton kernels of the colour augmentation against the float64 reference; that reference: test_augment.py."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from dune_fast.kernels import augment, augment_kernels
from dune_fast.kernels.augment import ColourParams, augment_colour

pytestmark = pytest.mark.usefixtures("poisoned")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ORDERS = torch.tensor(list(itertools.permutations(range(4))))


def random_images(batch, height, width, dtype=torch.uint8, device="cpu"):
    """uint8 [B, H, W, 3] or float [B, 3, H, W], with some gray, black, white and saturated pixels in the first."""
    images = torch.randint(0, 256, (batch, height, width, 3), generator=torch.Generator().manual_seed(batch))
    if batch:
        colours = [[128, 128, 128], [0, 0, 0], [255, 255, 255], [255, 0, 255], [7, 7, 8]]
        images[0, 0, :5] = torch.tensor(colours)
    if dtype == torch.uint8:
        return images.to(device, dtype)
    return (images.permute(0, 3, 1, 2) / 255).contiguous().to(device, dtype)


def random_params(batch, device="cpu", blur=None):
    """Of every kind; the first image is left alone, `blur` says who is blurred."""
    g = torch.Generator().manual_seed(batch)

    def u(low, high):
        return torch.empty(batch).uniform_(low, high, generator=g)

    params = ColourParams(
        order=ORDERS[torch.arange(batch) % 24],
        brightness=u(0.6, 1.4),
        contrast=u(0.6, 1.4),
        saturation=u(0.0, 2.0),
        hue=u(-0.5, 0.5),
        grayscale=u(0, 1) < 0.2,
        blur=(u(0, 1) < 0.5) if blur is None else torch.tensor(blur),
        sigma=u(0.1, 5.0),
        solarize=u(0, 1) < 0.5,
    )
    packed = params.pack()
    packed[:1] = ColourParams.identity(1).pack()
    return ColourParams.unpack(packed).to(torch.device(device))


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


@pytest.mark.parametrize("layout", ["crop", "every other", "channels first", "expanded", "transposed", "flipped rows"])
def test_strided_images(layout, device, fused):
    base = random_images(2, 12, 14, device=device)
    images = {
        "crop": base[:, 3:9, 2:9],
        "every other": base[:, ::2, ::2],
        "channels first": base.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "expanded": base[:1, :, :7].expand(2, 12, 7, 3),
        "transposed": base[:, :6].transpose(1, 2),
        "flipped rows": base[:, :, :7].flip(1),
    }[layout]
    params = random_params(2, device, [False, False])
    with fused():
        found, expected = augment_colour(images, params), augment_colour(images.contiguous(), params)
        columns = replace(params, brightness=torch.stack([params.brightness] * 3, 1)[:, 1])
        assert torch.equal(augment_colour(images, columns), expected)
    assert torch.equal(found, expected)


def test_channels_last_float_images(device, fused):
    images, params = random_images(2, 6, 7, FP32, device), random_params(2, device, [False, False])
    with fused():
        expected = augment_colour(images, params)
        assert torch.equal(augment_colour(images.contiguous(memory_format=torch.channels_last), params), expected)


def test_images_do_not_depend_on_each_other(device, fused):
    images, params = random_images(3, 6, 7, device=device), random_params(3, device, [False, True, False])
    with fused():
        together = augment_colour(images, params)
        alone = augment_colour(images[1:], ColourParams.unpack(params.pack()[1:]))
    assert torch.equal(together[1:], alone)


def test_empty_batch(device, fused):
    with fused():
        for images in (random_images(0, 6, 7, device=device), random_images(0, 6, 7, FP32, device)):
            assert augment_colour(images, ColourParams.identity(0, device)).shape == (0, 3, 6, 7)
            assert augment_colour(images, None).shape == (0, 3, 6, 7)
    assert augment_colour(random_images(0, 6, 7), ColourParams.identity(0)).shape == (0, 3, 6, 7)


def test_a_gradient_takes_the_reference(device, fused):
    images = random_images(1, 5, 5, FP32, device).requires_grad_()
    with fused():
        augment_colour(images, None).sum().backward()
    assert images.grad.abs().sum() > 0


def test_compiles_without_a_break(device, fused):
    images, params = random_images(2, 5, 6, device=device), random_params(2, device, [False, False])
    compiled = torch.compile(augment_colour, fullgraph=True, backend="aot_eager")
    with fused():
        assert torch.equal(compiled(images, params, BF16), augment_colour(images, params, BF16))


@pytest.mark.parametrize(
    "change, dtype, message",
    [
        ({"order": torch.zeros(2, 3, dtype=torch.int64)}, FP32, r"order \[B, 4\].*order int64 \[2, 3\]"),
        ({"sigma": torch.ones(3)}, FP32, r"parameters \[B\].*sigma float32 \[3\]"),
        ({"hue": torch.zeros(2, device="meta")}, FP32, "one device.*hue float32 .* on meta"),
        ({}, torch.uint8, "not torch.uint8.*images uint8"),
    ],
)
def test_bad_input(change, dtype, message):
    with pytest.raises(ValueError, match=message):
        augment_colour(random_images(2, 5, 5), replace(ColourParams.identity(2), **change), dtype)


def test_no_pixels():
    with pytest.raises(ValueError, match=r"1 to 2\^30 - 1 pixels.*images uint8 \[2, 0, 5, 3\]"):
        augment_colour(torch.zeros(2, 0, 5, 3, dtype=torch.uint8), None)


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
