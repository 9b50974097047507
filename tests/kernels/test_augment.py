"""Colour augmentation against torchvision v2's functional operations, image by image."""

import pytest
import torch
from photographs import random_images, random_params

from dune_fast.kernels import augment
from dune_fast.kernels.augment import ColourParams, augment_colour, augment_colour_reference

TF = pytest.importorskip("torchvision.transforms.v2.functional")


def torchvision_augment(image: torch.Tensor, params: ColourParams, i: int) -> torch.Tensor:
    x = image  # float [3, H, W]
    operations = [
        lambda x: TF.adjust_brightness(x, float(params.brightness[i])),
        lambda x: TF.adjust_contrast(x, float(params.contrast[i])),
        lambda x: TF.adjust_saturation(x, float(params.saturation[i])),
        lambda x: TF.adjust_hue(x, float(params.hue[i])),
    ]
    for k in params.order[i].tolist():
        x = operations[k](x)
    if params.grayscale[i]:
        x = TF.rgb_to_grayscale(x, num_output_channels=3)
    if params.blur[i]:
        x = TF.gaussian_blur(x, kernel_size=9, sigma=float(params.sigma[i]))
    if params.solarize[i]:
        x = TF.solarize(x, threshold=0.5)
    return TF.normalize(x, augment.IMAGENET_MEAN, augment.IMAGENET_STD)


def as_float(images: torch.Tensor) -> torch.Tensor:
    return TF.to_dtype(images.permute(0, 3, 1, 2), torch.float32, scale=True)


@pytest.mark.parametrize("size", [(33, 47), (12, 12)])
def test_equals_torchvision_in_all_24_orders(size):
    images, params = random_images(48, *size), random_params(48)
    ours = augment_colour(images, params)
    theirs = torch.stack([torchvision_augment(x, params, i) for i, x in enumerate(as_float(images))])
    assert ours.shape == theirs.shape and ours.dtype == torch.float32 and ours.is_contiguous()
    # one part in 1e6 of [0, 1], times 1 / std = 4.4
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_identity_leaves_images_bit_equal():
    """A round trip through HSV would move them by 1e-7."""
    images = random_images(4, 16, 16)
    identity = augment_colour(images, ColourParams.identity(4))
    assert torch.equal(identity, augment_colour(images, None))
    torch.testing.assert_close(identity, TF.normalize(as_float(images), augment.IMAGENET_MEAN, augment.IMAGENET_STD))


def test_hsv_round_trip_and_colorsys():
    import colorsys

    colours = torch.rand(200, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h, s, v = augment.rgb_to_hsv(colours[:, :, None, None])
    for colour, ours in zip(colours.tolist(), torch.stack([h, s, v], 1)[:, :, 0, 0].tolist(), strict=True):
        assert ours == pytest.approx(colorsys.rgb_to_hsv(*colour), abs=1e-12)
    torch.testing.assert_close(augment.hsv_to_rgb(h, s, v)[:, :, 0, 0], colours, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [(5, 5), (5, 64), (40, 7), (200, 190)])
@pytest.mark.parametrize("kind", ["decoded", "crop", "float32", "bfloat16", "empty"])
def test_cpu_path_equals_the_reference(size, kind):
    """Image by image in place, with its own hue and blur; the last size is above torch's limit for using threads."""
    batch = 0 if kind == "empty" else 26
    decoded = random_images(max(batch, 1), size[0] + 2, size[1] + 3)[:batch, 1:-1, 2:-1]  # strided
    images = {"decoded": decoded.contiguous(), "crop": decoded, "empty": decoded}.get(kind)
    if images is None:
        images = as_float(decoded).to(getattr(torch, kind))
    params = random_params(batch)
    if batch:
        params.hue[:3], params.saturation[3:6], params.contrast[6:8], params.brightness[8:10] = 0.5, 0, 0, 0
        params.sigma[10:12], params.blur[10:12] = 1e-3, True
    before, threads = images.clone(), torch.get_num_threads()
    for given in (params, None):
        for dtype in (torch.float32, torch.bfloat16):
            ours, expected = augment_colour(images, given, dtype), augment_colour_reference(images, given, dtype)
            assert ours.shape == expected.shape and ours.dtype == dtype and ours.is_contiguous()
            # a bf16 result may round to the neighbour: 2^-8 of at most 2.7
            torch.testing.assert_close(ours, expected, atol=1e-5 if dtype == torch.float32 else 0.016, rtol=0)
    assert torch.equal(images, before) and torch.get_num_threads() == threads


def test_solarize_at_exactly_one_half_and_without_it():
    x = torch.tensor([0.25, 0.5, 0.75]).repeat(1, 3, 5, 3)
    params = ColourParams(**{**vars(ColourParams.identity(1)), "solarize": torch.tensor([True])})
    mean, std = (torch.tensor(c)[None, :, None, None] for c in (augment.IMAGENET_MEAN, augment.IMAGENET_STD))
    ours = augment_colour(x, params) * std + mean
    torch.testing.assert_close(ours, torch.tensor([0.25, 0.5, 0.25]).repeat(1, 3, 5, 3), atol=1e-6, rtol=0)


def test_pack_is_exact():
    params = random_params(7)
    back = ColourParams.unpack(params.pack())
    for name, value in vars(params).items():
        assert torch.equal(getattr(back, name), value) and getattr(back, name).dtype == value.dtype
