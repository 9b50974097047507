"""Colour augmentation of a batch with explicit parameters for every image, ending in ImageNet normalisation.

With x in [0, 1], gray(x) = 0.2989 r + 0.587 g + 0.114 b and m the image's mean gray, in this order:

    1. the four jitter operations, in the image's own order
           brightness b:  clamp(b x)                      contrast c:  clamp(c x + (1 - c) m)
           saturation s:  clamp(s x + (1 - s) gray(x))    hue h:       h turns added to the hue of HSV
    2. grayscale: x = gray(x) in all channels
    3. Gaussian blur, 9 taps, weights proportional to exp(-i^2 / (2 sigma^2)), reflected borders
    4. solarize: x >= 0.5 becomes 1 - x
    5. (x - mean) / std

which is torchvision v2's on float images. Parameters, not random numbers: whoever draws them decides where the
randomness comes from.

Minimal bytes moved: 3 a pixel in from uint8 and 12 out in float32 (6 in bf16); the image is read twice where contrast
needs the mean of the whole of it. Shapes: images uint8 [B, H, W, 3] or float [B, 3, H, W] -> [B, 3, H, W]. The Triton
kernels, and the bytes that they move, are in kernels/augment_kernels.py; a CPU takes kernels/augment_cpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from dune_fast.kernels.augment_cpu import augment_colour_cpu
from dune_fast.kernels.augment_kernels import augment_colour_triton
from dune_fast.kernels.colour_params import (
    BLUR_TAPS,
    CONTRAST,
    GRAY_WEIGHTS,
    HUE,
    SATURATION,
    SOLARIZE_THRESHOLD,
    ColourParams,
)
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.launching import Example
from dune_fast.kernels.library import DTYPES, followed, guard, guard_device, register, use_triton, widen


def augment_colour(images: Tensor, params: ColourParams | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Colour jitter, grayscale, blur, solarize and ImageNet normalisation of a batch; no host synchronisation.

    Args:
        images: uint8 [B, H, W, 3] (decoders' layout), or float [B, 3, H, W] in [0, 1]; any strides. H and W at least 5
            (the blur reflects four pixels), and less than 2^30 pixels.
        params: one entry an image, on the images' device; None normalises alone.
        dtype: of the result; computed in float32 (float64 for float64 images).

    Returns:
        [B, 3, H, W], contiguous. A gradient flows if float images ask for one, through the plain reference.

    Raises:
        ValueError: types, shapes or devices do not fit, or images are too small to blur.
    """
    decoded = images.dtype == torch.uint8
    if images.ndim != 4 or images.shape[3 if decoded else 1] != 3 or not (decoded or images.is_floating_point()):
        raise ValueError(
            "augment_colour takes uint8 [B, H, W, 3] or floating-point [B, 3, H, W] images, "
            f"got {images.dtype} {list(images.shape)}"
        )
    guard(dtype.is_floating_point, f"augment_colour gives a floating-point type, not {dtype}", images=images)
    batch = images.shape[0]
    height, width = images.shape[1:3] if decoded else images.shape[2:]
    guard(0 < height * width < 2**30, "augment_colour takes images of 1 to 2^30 - 1 pixels", images=images)
    if params is not None:
        given = {f.name: getattr(params, f.name) for f in fields(params)}
        guard_device("augment_colour", images=images, **given)
        if len(params) != batch:
            raise ValueError(f"augment_colour got parameters of {len(params)} images for {batch} images")
        fits = all(x.shape == ((batch, 4) if name == "order" else (batch,)) for name, x in given.items())
        guard(fits, "augment_colour takes parameters [B], order [B, 4]", images=images, **given)
        if min(height, width) <= BLUR_TAPS // 2:
            raise ValueError(f"images of {height} x {width} pixels are too small to blur, at least 5 x 5 is needed")
    tensors = [] if params is None else params.tensors()
    trained = followed(images)
    if dtype in DTYPES and not trained and use_triton(images, *tensors):
        return _augment_colour(images, tensors, dtype)
    if images.device.type == "cpu" and images.dtype != torch.float64 and not trained:
        return augment_colour_cpu(images, params, dtype)
    return _reference(images, tensors, dtype)


def augment_colour_reference(images: Tensor, params: ColourParams | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """`augment_colour` in plain torch, differentiated by autograd; float64 images are computed in float64."""
    return _reference(images, params.tensors() if params is not None else [], dtype)


def _reference(images: Tensor, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """`augment_colour` in plain torch, of what it has checked; `tensors` are the parameters' fields, or none."""
    if not len(images):  # a grouped convolution wants a group
        return _fake(images, tensors, dtype)
    decoded = images.dtype == torch.uint8
    x = images.permute(0, 3, 1, 2).contiguous().float() / 255 if decoded else widen(images)
    if tensors:
        params = ColourParams(*tensors)
        x = jitter(x, params)
        x = torch.where(_per_image(params.grayscale), gray(x), x)
        x = torch.where(_per_image(params.blur), gaussian_blur(x, params.sigma), x)
        x = torch.where(_per_image(params.solarize) & (x >= SOLARIZE_THRESHOLD), 1 - x, x)
    mean, std = (_channels(values, x) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((x - mean) / std).to(dtype, memory_format=torch.contiguous_format)


def _fake(images: Tensor, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    batch, height, width, channels = images.shape
    if images.dtype != torch.uint8:
        channels, height, width = images.shape[1:]
    return images.new_empty((batch, channels, height, width), dtype=dtype)


_augment_colour = register(
    "augment_colour(Tensor images, Tensor[] params, ScalarType dtype) -> Tensor",
    augment_colour_triton, _reference, _fake,
)  # fmt: skip


def jitter(x: Tensor, params: ColourParams) -> Tensor:
    """The four jitter operations in each image's own order; x float [B, 3, H, W] in [0, 1].

    The three blends run in the image's order, once before and once after the one hue rotation, with factor 1 (the exact
    identity) in the half that an image does not need: six blends and one HSV conversion instead of sixteen operations.
    """
    place = torch.arange(4, device=x.device)
    hue_place = torch.where(params.order == HUE, place, 0).sum(1, keepdim=True)  # [B, 1]
    # the three blends in order, and the place each had among the four
    slot = place[:3] + (place[:3] >= hue_place)  # [B, 3]
    kinds = params.order.gather(1, slot)  # [B, 3]
    factors = torch.stack([params.brightness, params.contrast, params.saturation], dim=1).gather(1, kinds).to(x.dtype)
    before = slot < hue_place
    for i in range(3):
        x = _blend(x, kinds[:, i], torch.where(before[:, i], factors[:, i], 1))
    hue, saturation, value = rgb_to_hsv(x)
    turned = hsv_to_rgb((hue + params.hue[:, None, None].to(x.dtype)).remainder(1), saturation, value)
    x = torch.where(_per_image(params.hue) != 0, turned, x)
    for i in range(3):
        x = _blend(x, kinds[:, i], torch.where(before[:, i], 1, factors[:, i]))
    return x


def gray(x: Tensor) -> Tensor:
    """Luma of x [B, 3, H, W] -> [B, 1, H, W]."""
    r, g, b = x.split(1, dim=1)
    red, green, blue = GRAY_WEIGHTS
    return (r * red).add_(g, alpha=green).add_(b, alpha=blue)


def _blend(x: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """clamp(f x + (1 - f) base): base is 0 (brightness), the mean gray (contrast) or the gray image (saturation)."""
    luma = gray(x)
    kind, factor = _per_image(kind), _per_image(factor)
    constant = torch.where(kind == CONTRAST, luma.mean((-2, -1), keepdim=True), 0)  # [B, 1, 1, 1]
    base = torch.where(kind == SATURATION, luma, constant).mul_(1 - factor)
    return torch.addcmul(base, x, factor).clamp_(0, 1)


def rgb_to_hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in turns [0, 1), saturation and value in [0, 1], each [B, H, W]; a gray pixel has hue 0."""
    r, g, b = x.unbind(1)
    low, high = torch.minimum(torch.minimum(r, g), b), torch.maximum(torch.maximum(r, g), b)
    span = high - low
    divisor = torch.where(span == 0, 1, span)
    sixths = torch.where(
        high == r, (g - b) / divisor, torch.where(high == g, (b - r) / divisor + 2, (r - g) / divisor + 4)
    )
    saturation = span / torch.where(high == 0, 1, high)
    return (sixths / 6).remainder(1), saturation, high


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The inverse of `rgb_to_hsv`: [B, 3, H, W], without branches.

    f(n) = v - v s max(0, min(k, 4 - k, 1)), k = (n + 6 h) mod 6, for n = 5, 3, 1 (red, green, blue).
    """
    offsets = torch.stack([torch.full_like(hue[:1, :1, :1], n) for n in (5.0, 3.0, 1.0)], dim=1)  # [1, 3, 1, 1]
    k = (offsets + 6 * hue.unsqueeze(1)).remainder(6)
    k = torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.addcmul(value.unsqueeze(1), (value * saturation).unsqueeze(1), k, value=-1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Separable blur of 9 taps with a width for every image; x float [B, 3, H, W], sigma [B]."""
    batch, channels, height, width = x.shape
    half = BLUR_TAPS // 2
    # softmax(-(t / sigma)^2) with t = i / sqrt(2) is the Gaussian exp(-i^2 / (2 sigma^2)), normalised
    t = torch.arange(-half, half + 1, device=x.device, dtype=x.dtype) / 2**0.5
    weights = torch.softmax(-((t / sigma.to(x.dtype)[:, None]) ** 2), dim=1)  # [B, 9]
    weights = weights.repeat_interleave(channels, dim=0)  # one filter a channel of an image
    y = F.pad(x, (half,) * 4, mode="reflect").reshape(1, batch * channels, height + 2 * half, width + 2 * half)
    y = F.conv2d(y, weights[:, None, None, :], groups=batch * channels)
    y = F.conv2d(y, weights[:, None, :, None], groups=batch * channels)
    return y.reshape(x.shape)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _channels(values: tuple[float, float, float], like: Tensor) -> Tensor:
    """[1, 3, 1, 1] of constants made on the device: torch.tensor would copy from the host, which waits."""
    return torch.cat([like.new_full((1,), value) for value in values])[None, :, None, None]


AOT = tuple(((128, 3, side), dtype) for side in (448, 336, 37) for dtype in (torch.float32, torch.bfloat16))


def examples(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Example]:
    """Decoded images [B, S, S, 3], a strided crop of them, and float [B, 3, S, S], to `dtype`; normalisation alone."""
    count, _, side = shape
    decoded = torch.randint(256, (count, side + 12, side + 12, 3), dtype=torch.uint8, device=device)
    flags = torch.rand(count, device=device) < 0.5
    factors, order = torch.rand(count, device=device), torch.rand(count, 4, device=device).argsort(1)
    params = [order, *[factors] * 3, factors - 0.5, flags, flags, factors + 0.5, flags]
    images = {
        "uint8": torch.randint(256, (count, side, side, 3), dtype=torch.uint8, device=device),
        "uint8 crop": decoded[:, 7:-5, 5:-7],
        "float32": torch.rand(count, 3, side, side, device=device),
        "bfloat16": torch.rand(count, 3, side, side, device=device).bfloat16(),
    }
    for name, x in images.items():
        yield Example(f"{name}", _augment_colour, (x, params, dtype))
        yield Example(f"{name}, normalisation", _augment_colour, (x, [], dtype))
