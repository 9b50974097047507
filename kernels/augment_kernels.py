"""Triton kernels of `augment_colour`; formula, parameters and reference are in kernels/augment.py.

    1. `_gray_sum_kernel`  reads images whose contrast changes, applies what comes before it and adds the gray up, in
                           partial sums [B, SPLITS] that the second adds in the order of their index: no atomics
    2. `_colour_kernel`    jitter and grayscale, then the output; or an intermediate for images that will be blurred
    3. `_blur_kernel`      only images that are blurred: from the intermediate to the output

Bytes a pixel, uint8 to fp32 (bf16 in brackets), at the paper's probabilities: the first reads 3 for 80 % of the images,
the second reads 3 and writes 12 [6], the third reads and writes 12 [6] for 20 %: 22.2 [13.8]. The minimum is 15 [9], if
the mean were known before the image is read and neighbours cost nothing.

The intermediate is float32, or float16 where the output is bf16, whose own rounding is 8 times coarser. It is as large
as the output, because the host does not know how many images are blurred; only their part is touched.

Branches on an image's parameters are free: a program works on one image. Literals below are the constants of
kernels/colour_params.py and kernels/imagenet.py; a kernel sees no globals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dune_fast.kernels.launching import Launch, choose, launch
from dune_fast.kernels.library import jit, tl, triton

SPLITS = 64
"""Partial sums of an image at most; a power of two."""


@jit
def _gray(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@jit
def _unit(x):
    """Clamp to [0, 1]; in this order it is one instruction, a saturation."""
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@jit
def _turn(r, g, b, sixths):
    """Adds to the hue of HSV, in sixths of a turn, within [-3, 3].

    There and back through HSV, without saturation: value times saturation is the span of the channels.
    """
    high = tl.maximum(tl.maximum(r, g), b)
    span = high - tl.minimum(tl.minimum(r, g), b)
    difference = tl.where(high == r, g - b, tl.where(high == g, b - r, r - g))
    zero = tl.where(high == r, 0.0, tl.where(high == g, 2.0, 4.0))
    hue = zero + difference / tl.maximum(span, 1e-30) + sixths  # [-4, 8]; a gray pixel has hue 0
    hue = tl.where(hue > 3.0, hue - 6.0, hue)
    hue = tl.where(hue < -3.0, hue + 6.0, hue)
    red = high - span * _unit(tl.abs(hue) - 1.0)
    green = high - span * _unit(2.0 - tl.abs(hue + 1.0))
    blue = high - span * _unit(2.0 - tl.abs(hue - 1.0))
    return red, green, blue


@jit
def _jitter(r, g, b, order, brightness, contrast, saturation, hue, mean, places):
    """The first `places` operations of one image's order; `mean` is its gray mean where contrast comes."""
    for place in range(places):
        kind = tl.load(order + place)
        if kind == 3:
            if hue != 0.0:
                r, g, b = _turn(r, g, b, 6.0 * hue)
        else:
            factor = tl.where(kind == 0, brightness, tl.where(kind == 1, contrast, saturation))
            base = (1.0 - factor) * tl.where(kind == 2, _gray(r, g, b), tl.where(kind == 1, mean, 0.0))
            r = _unit(factor * r + base)
            g = _unit(factor * g + base)
            b = _unit(factor * b + base)
    return r, g, b


@jit
def _load_pixels(images, image, pixel, inside, stride_b, stride_c, stride_h, stride_w, WIDTH: tl.constexpr):
    """r, g, b of an image, float32 in [0, 1]; WIDTH is 0 where one stride leads from pixel to pixel across rows."""
    at = images + image.to(tl.int64) * stride_b
    if WIDTH == 0:
        at += pixel.to(tl.int64) * stride_w
    else:
        at += (pixel // WIDTH).to(tl.int64) * stride_h + (pixel % WIDTH).to(tl.int64) * stride_w
    r = tl.load(at, mask=inside, other=0).to(tl.float32)
    g = tl.load(at + stride_c, mask=inside, other=0).to(tl.float32)
    b = tl.load(at + stride_c + stride_c, mask=inside, other=0).to(tl.float32)
    if images.dtype.element_ty == tl.uint8:
        r, g, b = r * 0.00392156862745098, g * 0.00392156862745098, b * 0.00392156862745098
    return r, g, b


@jit
def _gray_sum_kernel(
    images, order, brightness, contrast, saturation, hue, partial, pixels, splits,
    stride_b, stride_c, stride_h, stride_w, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the gray that the contrast of an image meets, over every splits-th tile of BLOCK pixels."""
    image, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    if tl.load(contrast + image) != 1.0:
        place = tl.arange(0, 4)
        stop = tl.sum(tl.where(tl.load(order + image * 4 + place) == 1, place, 0), 0)
        b_factor, s_factor = tl.load(brightness + image), tl.load(saturation + image)
        turns = tl.load(hue + image)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(split * BLOCK, pixels, splits * BLOCK):
            pixel = first + tl.arange(0, BLOCK)
            inside = pixel < pixels
            r, g, b = _load_pixels(images, image, pixel, inside, stride_b, stride_c, stride_h, stride_w, WIDTH)
            # outside is black, which all but the contrast leave black: it adds nothing
            r, g, b = _jitter(r, g, b, order + image * 4, b_factor, 1.0, s_factor, turns, 0.0, stop)
            total += _gray(r, g, b)
        tl.store(partial + image * SPLITS + split, tl.sum(total, 0))


@jit
def _store_normalized(out, r, g, b, pixels, inside):
    """ImageNet's normalisation; out points to the pixels of the red channel."""
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out, ((r - 0.485) * (1 / 0.229)).to(dtype), mask=inside)
    tl.store(out + pixels, ((g - 0.456) * (1 / 0.224)).to(dtype), mask=inside)
    tl.store(out + pixels + pixels, ((b - 0.406) * (1 / 0.225)).to(dtype), mask=inside)


@jit
def _colour_kernel(
    images, order, brightness, contrast, saturation, hue, grayscale, blur, solarize, partial, work, out,
    pixels, blocks, splits, stride_b, stride_c, stride_h, stride_w,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels of one image; order is None where there is only the normalisation."""
    image = tl.program_id(0) // blocks
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    r, g, b = _load_pixels(images, image, pixel, inside, stride_b, stride_c, stride_h, stride_w, WIDTH)
    to = image.to(tl.int64) * 3 * pixels + pixel
    if order is None:
        _store_normalized(out + to, r, g, b, pixels, inside)
    else:
        c_factor = tl.load(contrast + image)
        split = tl.arange(0, SPLITS)
        mean = tl.sum(tl.load(partial + image * SPLITS + split, mask=split < splits, other=0.0), 0) / pixels
        mean = tl.where(c_factor != 1.0, mean, 0.0)  # where contrast stays, nobody wrote the sums
        b_factor, s_factor = tl.load(brightness + image), tl.load(saturation + image)
        turns = tl.load(hue + image)
        r, g, b = _jitter(r, g, b, order + image * 4, b_factor, c_factor, s_factor, turns, mean, 4)
        if tl.load(grayscale + image):
            r = _gray(r, g, b)
            g, b = r, r
        if tl.load(blur + image):
            dtype: tl.constexpr = work.dtype.element_ty
            tl.store(work + to, r.to(dtype), mask=inside)
            tl.store(work + to + pixels, g.to(dtype), mask=inside)
            tl.store(work + to + pixels + pixels, b.to(dtype), mask=inside)
        else:
            if tl.load(solarize + image):
                r, g, b = tl.minimum(r, 1.0 - r), tl.minimum(g, 1.0 - g), tl.minimum(b, 1.0 - b)
            _store_normalized(out + to, r, g, b, pixels, inside)


@jit
def _reflect(i, size):
    """Index past the border -> the same distance inside: -1 -> 1, size -> size - 2."""
    return size - 1 - tl.abs(size - 1 - tl.abs(i))


@jit
def _pair(at, left, right):
    """The sum of two pixels as far left as right of each column."""
    return tl.load(at + left).to(tl.float32) + tl.load(at + right).to(tl.float32)


@jit(do_not_specialize=["height", "width"])
def _blur_kernel(work, blur, sigma, solarize, out, height, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS x BLOCK pixels of one channel: down the rows, the last nine, filtered along x, in registers."""
    across, down = tl.cdiv(width, BLOCK), tl.cdiv(height, ROWS)
    plane = tl.program_id(0) // (across * down)
    image, channel = plane // 3, plane % 3
    if tl.load(blur + image):
        tile = tl.program_id(0) % (across * down)
        column = tile % across * BLOCK + tl.arange(0, BLOCK)
        middle = tl.minimum(column, width - 1)  # past the edge as on it: loads need no mask
        left1, right1 = _reflect(middle - 1, width), _reflect(middle + 1, width)
        left2, right2 = _reflect(middle - 2, width), _reflect(middle + 2, width)
        left3, right3 = _reflect(middle - 3, width), _reflect(middle + 3, width)
        left4, right4 = _reflect(middle - 4, width), _reflect(middle + 4, width)
        top = tile // across * ROWS
        start = plane.to(tl.int64) * height * width
        solarized = tl.load(solarize + image)
        mean = tl.where(channel == 0, 0.485, tl.where(channel == 1, 0.456, 0.406))
        inv_std = tl.where(channel == 0, 1 / 0.229, tl.where(channel == 1, 1 / 0.224, 1 / 0.225))

        s = tl.load(sigma + image)
        slope = -0.5 / (s * s)
        w1, w2, w3, w4 = tl.exp(slope), tl.exp(4.0 * slope), tl.exp(9.0 * slope), tl.exp(16.0 * slope)
        w0 = 1.0 / (1.0 + 2.0 * (w1 + w2 + w3 + w4))
        w1, w2, w3, w4 = w0 * w1, w0 * w2, w0 * w3, w0 * w4

        # one call of zeros each: the compiler takes names of one value for names that the loop does not change
        r0, r1, r2 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        r3, r4, r5 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        r6, r7, r8 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for row in range(top - 4, tl.minimum(top + ROWS, height) + 4):
            r0, r1, r2, r3, r4, r5, r6, r7 = r1, r2, r3, r4, r5, r6, r7, r8
            at = work + start + _reflect(row, height) * width
            r8 = w0 * tl.load(at + middle).to(tl.float32)
            r8 += w1 * _pair(at, left1, right1) + w2 * _pair(at, left2, right2)
            r8 += w3 * _pair(at, left3, right3) + w4 * _pair(at, left4, right4)
            if row >= top + 4:
                x = w0 * r4 + w1 * (r3 + r5) + w2 * (r2 + r6) + w3 * (r1 + r7) + w4 * (r0 + r8)
                if solarized:
                    x = tl.minimum(x, 1.0 - x)
                x = (x - mean) * inv_std
                tl.store(out + start + (row - 4) * width + column, x.to(out.dtype.element_ty), mask=column < width)


SUM = {"default": [Launch(1 << 30, {"BLOCK": 1024, "num_warps": 8})]}
"""By pixels of an image, as the next two. Not yet measured: four pixels a thread, 12 loads of a byte under way. About
45 registers let 5 programs of 8 warps share a multiprocessor. 55 of 64 partial sums at 336 pixels, two tiles each."""
COLOUR = {"default": [Launch(1 << 30, {"BLOCK": 1024, "num_warps": 8})]}
"""Not yet measured: four pixels a thread, so 16-byte stores in fp32. 40 registers let 6 programs of 8 warps share a
multiprocessor."""
BLUR = {"default": [Launch(1 << 30, {"ROWS": 32, "BLOCK": 128, "num_warps": 4})]}
"""Not yet measured: one column a thread, 48 registers. 40 warps share a multiprocessor: predicted 0.63 of the time of
two columns a thread with 28 warps, because every row waits for its loads. 8 of 40 rows are read twice, once from the L2
cache."""


def augment_colour_triton(images: Tensor, params: list[Tensor], dtype: torch.dtype) -> Tensor:
    """`augment_colour` of what it has checked; `params` are the fields of ColourParams in their order, or none."""
    channels_first = images if images.dtype != torch.uint8 else images.permute(0, 3, 1, 2)
    batch, _, height, width = channels_first.shape
    pixels = height * width
    out = images.new_empty(batch, 3, height, width, dtype=dtype)
    strides = channels_first.stride()
    layout = {"WIDTH": 0 if strides[2] == width * strides[3] or height == 1 else width}
    colour = choose(COLOUR, images.device, pixels)
    blocks = triton.cdiv(pixels, colour["BLOCK"])
    if not params:
        launch(
            _colour_kernel, (batch * blocks,), channels_first, *[None] * 10, out, pixels, blocks, 0, *strides,
            SPLITS=SPLITS, **layout, **colour,
        )  # fmt: skip
        return out

    order, brightness, contrast, saturation, hue, grayscale, blur, sigma, solarize = (p.contiguous() for p in params)
    sums, smooth = choose(SUM, images.device, pixels), choose(BLUR, images.device, pixels)
    tiles = triton.cdiv(pixels, sums["BLOCK"])
    splits = triton.cdiv(tiles, triton.cdiv(tiles, SPLITS))  # as many tiles each, but for the last
    partial = images.new_empty(batch, SPLITS, dtype=torch.float32)
    work = torch.empty_like(out, dtype=torch.float16 if dtype == torch.bfloat16 else torch.float32)
    jitter = (order, brightness, contrast, saturation, hue)
    launch(
        _gray_sum_kernel, (batch * splits,), channels_first, *jitter, partial, pixels, splits, *strides,
        SPLITS=SPLITS, **layout, **sums,
    )  # fmt: skip
    launch(
        _colour_kernel, (batch * blocks,), channels_first, *jitter, grayscale, blur, solarize, partial, work, out,
        pixels, blocks, splits, *strides, SPLITS=SPLITS, **layout, **colour,
    )  # fmt: skip
    tiles = triton.cdiv(height, smooth["ROWS"]) * triton.cdiv(width, smooth["BLOCK"])
    launch(_blur_kernel, (batch * 3 * tiles,), work, blur, sigma, solarize, out, height, width, **smooth)
    return out
