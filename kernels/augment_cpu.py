"""`augment_colour` on a CPU: image by image and in place, so that an image and its scratch stay in the cache.

Formula, parameters and reference are in kernels/augment.py. The reference computes everything for every image, so that
nothing is read from the device. A CPU can read the parameters, so here only what an image needs is done to it.

There are no masks: torch's comparisons and `where` are many times slower on a CPU than min, max and sign. There is one
thread: dozens of short operations an image, each with a barrier, lose more to the decoding threads beside them than a
second core gains (336 pixels, two busy cores: 5 ms an image with one thread, 30 to 400 with two).

Minimal bytes moved: those of the reference, here within the cache. At the paper's probabilities an image of 112 / 224 /
336 pixels takes 0.6 / 2.3 / 5 ms on one core of a Xeon with AVX-512; the reference 2.5 / 13 / 40.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dune_fast.kernels.colour_params import BLUR_TAPS, BRIGHTNESS, CONTRAST, GRAY_WEIGHTS, HUE, ColourParams
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD

_HALF = BLUR_TAPS // 2


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, torch's operations in this thread run on one core (the setting belongs to each thread)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
@_one_thread()
def augment_colour_cpu(images: Tensor, params: ColourParams | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """`augment_colour` of what it has checked, in float32, without gradients; arguments are described there."""
    channels_first = images.permute(0, 3, 1, 2) if images.dtype == torch.uint8 else images
    batch, _, height, width = channels_first.shape
    out = torch.empty((batch, 3, height, width), dtype=dtype)
    x = torch.empty((3, height, width))  # [3, H, W]
    scratch = list(torch.empty((5, height, width)))
    table = ColourParams.identity(batch).pack() if params is None else params.pack()
    for image, result, row in zip(channels_first, out, table.tolist(), strict=True):
        if images.dtype == torch.uint8:
            x.copy_(image.contiguous()).div_(255)  # rearranged as bytes, which is faster than as floats
        else:
            x.copy_(image)
        order, factors = [int(kind) for kind in row[:4]], row[4:8]
        grayscale, blur, sigma, solarize = row[8:]
        for kind in order:
            if kind == HUE:
                if factors[HUE] != 0:
                    _turn(x, factors[HUE], scratch)
            elif factors[kind] != 1:
                _blend(x, kind, factors[kind], scratch[0])
        if grayscale:
            x.copy_(_gray(x, scratch[0]))
        if blur:
            _blur(x, sigma)
        if solarize:  # x below one half, 1 - x from there on
            for channel in x:
                torch.minimum(channel, torch.sub(1, channel, out=scratch[0]), out=channel)
        for channel, mean, std in zip(x, IMAGENET_MEAN, IMAGENET_STD, strict=True):
            channel.sub_(mean).div_(std)
        result.copy_(x)
    return out


def _gray(x: Tensor, out: Tensor) -> Tensor:
    """Luma of x [3, H, W], written to out [H, W]."""
    red, green, blue = GRAY_WEIGHTS
    return torch.mul(x[0], red, out=out).add_(x[1], alpha=green).add_(x[2], alpha=blue)


def _blend(x: Tensor, kind: int, factor: float, scratch: Tensor) -> None:
    """x <- clamp(f x + (1 - f) base), in place; base as in the reference."""
    if kind == BRIGHTNESS:
        x.mul_(factor)
    elif kind == CONTRAST:
        mean = float(_gray(x, scratch).mean())
        x.mul_(factor).add_((1 - factor) * mean)
    else:
        luma = _gray(x, scratch).mul_(1 - factor)
        x.mul_(factor).add_(luma)
    x.clamp_(0, 1)


def _turn(x: Tensor, turns: float, scratch: list[Tensor]) -> None:
    """Adds to the hue of x [3, H, W], in place.

    With the channels sorted, low <= mid <= high, the hue in sixths of a turn is |k + (mid - other) / (high - low)|,
    where k says which channels changed places; the way back is high or low and a part of the span (Smith, SIGGRAPH
    1978), as in the Triton kernel.
    """
    red, green, blue = x
    a, b, c, d, e = scratch
    larger, smaller = torch.maximum(green, blue, out=a), torch.minimum(green, blue, out=b)
    k = torch.sub(green, blue, out=c).sign_().clamp_max_(0)  # -1 where blue is above green
    swapped = torch.sub(red, larger, out=d).sign_().clamp_max_(0)  # -1 where red is not the largest
    # -6 where blue is above green, then -2 - k where red gives up its place
    other_k = torch.mul(k, 12, out=e).add_(2).mul_(swapped)
    k.mul_(6).add_(other_k)
    mid, high = torch.minimum(red, larger, out=d), torch.maximum(red, larger, out=a)
    difference = torch.sub(mid, smaller, out=e)
    low = torch.minimum(mid, smaller, out=b)
    span = torch.sub(high, low, out=d)
    difference.div_(span.clamp_min_(1e-30))  # a gray pixel has hue 0, and its span does not matter
    hue = k.add_(difference).abs_().add_(6 * turns)
    hue.add_(torch.mul(hue, 1 / 6, out=e).round_(), alpha=-6)  # [-3, 3]
    torch.addcmul(high, span, torch.abs(hue, out=e).sub_(1).clamp_(0, 1), value=-1, out=red)
    torch.addcmul(low, span, torch.add(hue, 1, out=e).abs_().sub_(1).clamp_(0, 1), out=green)
    torch.addcmul(low, span, hue.sub_(1).abs_().sub_(1).clamp_(0, 1), out=blue)


def _blur(x: Tensor, sigma: float) -> None:
    """The separable blur of x [3, H, W], in place, a channel at a time.

    Rows are padded and then filtered as one long row: what runs over from row to row falls into the padding.
    """
    _, height, width = x.shape
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(_HALF + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    weights = [weight / total for weight in weights]
    rows = x.new_empty((height + 2 * _HALF, width + 2 * _HALF))
    for channel in x:
        padded = F.pad(channel[None], (_HALF, _HALF, 0, 0), mode="reflect").flatten()
        across = rows[_HALF : _HALF + height].view(-1)[: -2 * _HALF]
        _filter(padded, weights, across)
        for i in range(1, _HALF + 1):  # reflected rows
            rows[_HALF - i] = rows[_HALF + i]
            rows[_HALF + height - 1 + i] = rows[_HALF + height - 1 - i]
        down = padded.view(height, -1)  # no longer needed
        _filter(rows, weights, down)
        channel.copy_(down[:, :width])


def _filter(x: Tensor, weights: list[float], out: Tensor) -> None:
    """out[i] = sum over j of weights[|j|] x[i + 4 + j], j = -4 ... 4, along the first dimension."""
    count = len(out)
    torch.mul(x[_HALF : _HALF + count], weights[0], out=out)
    for j in range(1, _HALF + 1):
        out.add_(x[_HALF - j : _HALF - j + count], alpha=weights[j])
        out.add_(x[_HALF + j : _HALF + j + count], alpha=weights[j])
