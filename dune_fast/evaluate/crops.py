"""What a training image of segmentation or depth goes through: scaled, cut, flipped, its colours changed, normalised.

Each function of an image takes a `numpy.random.Generator`, so a step's images are a function of seed and step alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dune_fast.heads.linear.segmentation import IGNORED
from dune_fast.teachers.config import IMAGENET_MEAN, IMAGENET_STD

_TRIES = 10  # for a crop in which no class has more than _MAX_SHARE
_MAX_SHARE = 0.75
_LONG_OVER_SHORT = 4  # of the frame (2048, 512) that images are scaled into
_WHITE_BORDER = (slice(45, 472), slice(43, 608))
"""Rows and columns inside the white border of a 480x640 image of NYUd."""


@dataclass(frozen=True)
class DepthCrop:
    """What a depth crop is."""

    height: int = 416
    width: int = 544
    border: bool = False
    """Whether images of 480x640 lose NYUd's white border first."""
    degrees: float = 2.5
    """Of the rotation, both ways, with probability 0.5."""


def normalized(image: Tensor) -> Tensor:
    """uint8 or float [3, H, W] in [0, 255] -> float32, with ImageNet's mean and standard deviation."""
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (image.float() - mean) / std


def scaled(image: Tensor, short: float, target: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Image and labels so large that the short side is `short` px and the long one at most 4 times that.

    The image bilinearly without antialias, as OpenCV does it; labels take the nearest pixel.

    Args:
        image: uint8 [3, H, W].
        target: int64 [H, W].
    """
    height, width = image.shape[-2:]
    factor = min(_LONG_OVER_SHORT * short / max(height, width), short / min(height, width))
    size = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
    if size == (height, width):
        return image, target
    image = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]
    image = image.round().clamp(0, 255).to(torch.uint8)
    if target is not None:
        target = F.interpolate(target[None, None].double(), size, mode="nearest")[0, 0].long()
    return image, target


def segmentation_crop(image: Tensor, labels: Tensor, size: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A training crop.

    Args:
        image: uint8 [3, H, W].
        labels: int64 [H, W].
        size: side of the crop, and of the short side before the random factor in [0.5, 2].

    Returns:
        float32 [3, size, size], zero where the image ends, and int64 [size, size], 255 there.
    """
    image, labels = scaled(image, size * random.uniform(0.5, 2.0), labels)
    height, width = labels.shape
    for _ in range(_TRIES):
        top = int(random.integers(max(height - size, 0) + 1))
        left = int(random.integers(max(width - size, 0) + 1))
        window = slice(top, top + size), slice(left, left + size)
        counts = labels[window].flatten().bincount(minlength=IGNORED + 1)
        counts[IGNORED] = 0
        if (counts > 0).sum() > 1 and counts.max() < _MAX_SHARE * counts.sum():
            break
    image, labels = image[(slice(None), *window)], labels[window]
    if random.random() < 0.5:
        image, labels = image.flip(-1), labels.flip(-1)
    image = normalized(photometric(image, random))
    pad = (0, size - image.shape[-1], 0, size - image.shape[-2])
    return F.pad(image, pad), F.pad(labels, pad, value=IGNORED)


def photometric(image: Tensor, random: np.random.Generator) -> Tensor:
    """Brightness +-32, contrast and saturation 0.5 to 1.5, hue +-18 degrees of 180, each with probability 0.5.

    Contrast comes before or after saturation and hue. uint8 [3, H, W] -> float32 [3, H, W] in [0, 255].
    """

    def contrast(x: Tensor) -> Tensor:
        return (x * random.uniform(0.5, 1.5)).clamp(0, 255) if random.random() < 0.5 else x

    x = image.float()
    if random.random() < 0.5:
        x = (x + random.uniform(-32, 32)).clamp(0, 255)
    first = random.random() < 0.5
    x = contrast(x) if first else x
    saturate, turn = random.random() < 0.5, random.random() < 0.5
    factor, degrees = random.uniform(0.5, 1.5), random.uniform(-18, 18)
    if saturate or turn:
        pixels = x.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        hsv = np.array(Image.fromarray(pixels).convert("HSV")).astype(np.float32)
        if saturate:
            hsv[..., 1] = (hsv[..., 1] * factor).clip(0, 255)
        if turn:
            hsv[..., 0] = (hsv[..., 0] + degrees * 256 / 180) % 256  # Pillow counts a turn as 256
        turned = Image.frombytes("HSV", (x.shape[2], x.shape[1]), hsv.astype(np.uint8).tobytes())
        pixels = np.array(turned.convert("RGB"))
        x = torch.from_numpy(pixels).permute(2, 0, 1).float()
    return x if first else contrast(x)


def depth_crop(image: Tensor, depth: Tensor, crop: DepthCrop, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A training crop.

    Args:
        image: uint8 [3, H, W].
        depth: float32 [H, W], metres, 0 where it is not known.
        crop: its size; an image that is smaller is enlarged first, without a change of its depths.

    Returns:
        float32 [3, h, w], normalised, and float32 [h, w].
    """
    if crop.border and depth.shape == (480, 640):
        image, depth = image[(slice(None), *_WHITE_BORDER)], depth[_WHITE_BORDER]
    x = image.float()
    factor = max(crop.height / x.shape[1], crop.width / x.shape[2])
    if factor > 1:
        size = math.ceil(x.shape[1] * factor - 1e-9), math.ceil(x.shape[2] * factor - 1e-9)
        x = F.interpolate(x[None], size, mode="bilinear", align_corners=False)[0]
        depth = F.interpolate(depth[None, None], size, mode="nearest")[0, 0]
    if random.random() < 0.5:
        x, depth = _rotated(x, depth, random.uniform(-crop.degrees, crop.degrees))
    if random.random() < 0.5:
        x, depth = x.flip(-1), depth.flip(-1)
    top, left = (int(random.integers(a - b + 1)) for a, b in zip(depth.shape, (crop.height, crop.width), strict=True))
    window = slice(top, top + crop.height), slice(left, left + crop.width)
    x, depth = x[(slice(None), *window)], depth[window]
    if random.random() < 0.5:
        x = 255 * (x / 255).clamp(0, 1) ** random.uniform(0.9, 1.1) * random.uniform(0.75, 1.25)
        x = (x * torch.tensor(random.uniform(0.9, 1.1, 3), dtype=torch.float32).view(3, 1, 1)).clamp(0, 255)
    return normalized(x), depth


def square_target(target: Tensor, size: int) -> Tensor:
    """Labels or depths of the square that the extraction cuts out of an image's middle: by the nearest pixel.

    [H, W] -> [size, size], of the same type.
    """
    height, width = target.shape
    short = min(height, width)
    scaled_to = int(size * height / short), int(size * width / short)
    out = F.interpolate(target[None, None].double(), scaled_to, mode="nearest")[0, 0].to(target.dtype)
    top, left = round((scaled_to[0] - size) / 2), round((scaled_to[1] - size) / 2)
    return out[top : top + size, left : left + size]


def _rotated(image: Tensor, depth: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """About the middle: the image bilinearly, depths by the nearest pixel; what comes from outside is 0."""
    height, width = depth.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    theta = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]])
    grid = F.affine_grid(theta[None], [1, 1, height, width], align_corners=False)
    image = F.grid_sample(image[None], grid, mode="bilinear", align_corners=False)[0]
    return image, F.grid_sample(depth[None, None], grid, mode="nearest", align_corners=False)[0, 0]
