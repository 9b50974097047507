"""Images become the same input here, in torchvision, timm and transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.nn.preprocessing import Preprocessing
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig

SIZES = [(100, 80), (60, 131), (56, 56), (30, 40)]


def photo(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(width).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


def torchvision_transform(size: int, crop_pct: float = 1.0):
    from torchvision.transforms import v2

    return v2.Compose([
        v2.Resize(int(size / crop_pct), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.CenterCrop(size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_a_pil_image_becomes_what_torchvision_makes_of_it(size, crop_pct):
    ours, theirs = Preprocessing(56, crop_pct=crop_pct), torchvision_transform(56, crop_pct)
    torch.testing.assert_close(ours(photo(*size)), theirs(photo(*size)))
    torch.testing.assert_close(ours(np.array(photo(*size))), theirs(photo(*size)))


@pytest.mark.parametrize("size", SIZES)
def test_tensors_become_what_torchvision_makes_of_them(size):
    image = torch.from_numpy(np.array(photo(*size))).permute(2, 0, 1)
    ours, theirs = Preprocessing(56)(image), torchvision_transform(56)(image)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 / 255 / 0.22)  # two levels: uint8 is rounded on the way
    assert torch.equal(Preprocessing(56)(torch.stack([image] * 2))[1], ours)
    torch.testing.assert_close(Preprocessing(56)(image / 255), ours, rtol=0, atol=3 / 255 / 0.22)


def test_other_modes_and_orientation():
    image = photo(100, 80)
    assert Preprocessing(56)(image.convert("L")).shape == (3, 56, 56)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = image.copy()
    turned.info["exif"] = exif.tobytes()
    torch.testing.assert_close(Preprocessing(56)(turned), Preprocessing(56)(image.rotate(-90, expand=True)))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("photo.jpg", "not a str"), (np.zeros((4, 4)), r"float64 \[4, 4\]"), (torch.zeros(4, 4), r"got \[4, 4\]"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "got torch.int64"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_explained(image, words):
    with pytest.raises(ValueError, match=words):
        Preprocessing(56)(image)


def test_an_encoder_brings_its_own():
    encoder = VisionTransformer(ViTConfig(image_size=56, embed_dim=48, depth=1, num_heads=3))
    assert encoder.transform == Preprocessing(56)
    assert encoder(encoder.transform(photo(90, 70))[None])["x_norm_patchtokens"].shape == (1, 16, 48)
    assert replace(encoder.transform, image_size=84)(photo(90, 70)).shape == (3, 84, 84)
    rope = VisionTransformer(
        ViTConfig(image_size=16, patch_size=16, embed_dim=64, depth=1, num_heads=1, num_registers=0, cls_token=False,
                  pos_embed="rope2d")
    )  # fmt: skip
    assert rope.transform.image_size == 512
