"""Bicubic resize with aligned corners, and the affine that re-normalises the result for a teacher, in one pass.

    out[y, x] = shift_c + scale_c * sum_{i, j = -1..2} w_i(v) w_j(u) in[Y + i, X + j]
    Y + v = y (H - 1) / (h - 1),   X + u = x (W - 1) / (w - 1)      Y, X integer, v, u in [0, 1), borders repeated

with Keys' cubic at a = -0.75, without antialias: `torch.nn.functional.interpolate(mode="bicubic", align_corners=True)`.
The kernel divides integers, so Y and X are exact and v and u good to 1e-7; torch's are off by 1e-5 at 448 pixels.

Minimal bytes moved, fp32: 4 for each pixel and channel of the input and of the output, 7.1 an output at 336 -> 384. The
kernel moves these; programs one above the other read 3 rows in common, a tenth of the input, mostly from the L2 cache.
Shapes: images [B, 3, H, W], scale and shift [3] -> [B, 3, h, w].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dune_fast.kernels.launching import Example, Launch, choose, draw, launch
from dune_fast.kernels.library import (
    DTYPES,
    contiguous,
    followed,
    guard,
    guard_device,
    jit,
    register,
    tl,
    triton,
    use_triton,
    widen,
)

MAX_SIDE = 32768
"""Pixels a side of images and of the result, so that y (H - 1) stays within 32 bits."""


def resize_normalize_reference(
    images: Tensor, size: tuple[int, int], scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`resize_normalize` in plain torch; float32 inside (float64 for float64)."""
    x = widen(images)
    if tuple(x.shape[-2:]) != tuple(size):
        x = F.interpolate(x, size=size, mode="bicubic", align_corners=True)
    if scale is not None:
        x = torch.addcmul(shift.to(x.dtype).view(3, 1, 1), x, scale.to(x.dtype).view(3, 1, 1))
    return x.to(dtype)


@jit
def _cubic(t):
    """Weights of the pixels at -1, 0, 1, 2 for a point t in [0, 1) past pixel 0; Keys' polynomials in factored form."""
    s = 1.0 - t
    return -0.75 * t * s * s, 1.0 - t * t * (2.25 - 1.25 * t), 1.0 - s * s * (2.25 - 1.25 * s), -0.75 * s * t * t


@jit
def _load_row(plane, row, height, stride_h, x0, x1, x2, x3):
    """The four pixels under each output column in one input row, float32; rows past the border repeat it."""
    at = plane + tl.minimum(tl.maximum(row, 0), height - 1).to(tl.int64) * stride_h
    p0 = tl.load(at + x0).to(tl.float32)
    p1 = tl.load(at + x1).to(tl.float32)
    p2 = tl.load(at + x2).to(tl.float32)
    p3 = tl.load(at + x3).to(tl.float32)
    return p0, p1, p2, p3


@jit(do_not_specialize=["height", "width", "out_height", "out_width"])
def _resize_kernel(
    images, scale, shift, out, height, width, out_height, out_width, stride_b, stride_c, stride_h, stride_w,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS x BLOCK outputs of one channel.

    The program walks down the input rows and keeps the last four, filtered along x, in registers; an output row leaves
    when its fourth is there. So an output costs about 4 loads instead of 16, and the filter along y none.
    """
    across, down = tl.cdiv(out_width, BLOCK), tl.cdiv(out_height, ROWS)
    index = tl.program_id(0) // across
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    y = index % down * ROWS
    index = index // down  # image * 3 + channel
    end = tl.minimum(y + ROWS, out_height)

    per_x = tl.maximum(out_width - 1, 1)  # a single column lies on the first pixel
    source = tl.minimum(column, out_width - 1) * (width - 1)  # past the edge as on it: loads need no mask
    w0, w1, w2, w3 = _cubic((source % per_x).to(tl.float32) / per_x)
    left = (source // per_x).to(tl.int64)  # 64 bits: strides may be anything
    x0 = tl.maximum(left - 1, 0) * stride_w
    x1 = left * stride_w
    x2 = tl.minimum(left + 1, width - 1) * stride_w
    x3 = tl.minimum(left + 2, width - 1) * stride_w

    plane = images + (index // 3).to(tl.int64) * stride_b + (index % 3).to(tl.int64) * stride_c
    target = out + index.to(tl.int64) * out_height * out_width + column
    if scale is not None:
        factor = tl.load(scale + index % 3).to(tl.float32)
        offset = tl.load(shift + index % 3).to(tl.float32)

    # Y and v of the output row y: v = rest / per_y; from one to the next they advance by constants
    per_y = tl.maximum(out_height - 1, 1)
    whole, part = (height - 1) // per_y, (height - 1) % per_y
    lowest = y * (height - 1) // per_y + 2  # the last input row that y needs
    rest = y * (height - 1) % per_y
    per_row = 1.0 / per_y.to(tl.float32)

    first = lowest - 3
    last = (end - 1) * (height - 1) // per_y + 2
    p0, p1, p2, p3 = _load_row(plane, first, height, stride_h, x0, x1, x2, x3)
    # one call of zeros each: the compiler takes names of one value for names that the loop does not change
    r0, r1 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    r2, r3 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for row in range(first, last + 1):
        r0, r1, r2 = r1, r2, r3
        r3 = w0 * p0 + w1 * p1 + w2 * p2 + w3 * p3
        # the next row is under way while this one is used
        p0, p1, p2, p3 = _load_row(plane, row + 1, height, stride_h, x0, x1, x2, x3)
        while (y < end) & (lowest == row):
            v0, v1, v2, v3 = _cubic(rest.to(tl.float32) * per_row)
            value = v0 * r0 + v1 * r1 + v2 * r2 + v3 * r3
            if scale is not None:
                value = offset + factor * value
            tl.store(target + y.to(tl.int64) * out_width, value.to(out.dtype.element_ty), mask=column < out_width)
            y += 1
            carry = (rest + part >= per_y).to(tl.int32)
            rest += part - carry * per_y
            lowest += whole + carry


TABLE = {"default": [Launch(MAX_SIDE, {"ROWS": 64, "BLOCK": 128, "num_warps": 2})]}
"""By columns of the result. Not yet measured: two columns a thread; predicted 167 us for 128 bf16 images from 336 to
384 on an H100, 189 with four columns and 32 rows. 56 registers let 36 warps share a multiprocessor, and fewer rows are
read twice. Waiting for a row's loads binds, then instructions. 128 columns divide 384 and 512."""


def _fused(images, height, width, scale, shift, dtype):
    out = _fake(images, height, width, scale, shift, dtype)
    options = choose(TABLE, images.device, width)
    programs = len(images) * 3 * triton.cdiv(height, options["ROWS"]) * triton.cdiv(width, options["BLOCK"])
    launch(
        _resize_kernel, (programs,), images, *contiguous(scale, shift), out,
        *images.shape[2:], height, width, *images.stride(), **options,
    )  # fmt: skip
    return out


def _reference(images, height, width, scale, shift, dtype):
    out = resize_normalize_reference(images, (height, width), scale, shift, dtype).contiguous()
    return out.clone() if out.data_ptr() == images.data_ptr() else out  # an operator's output is no view of its input


def _fake(images, height, width, scale, shift, dtype):
    return images.new_empty((images.shape[0], 3, height, width), dtype=dtype)


resize_op = register(
    "resize_normalize(Tensor images, SymInt height, SymInt width, Tensor? scale, Tensor? shift, ScalarType dtype) "
    "-> Tensor",
    _fused, _reference, _fake,
)  # fmt: skip


def resize_normalize(
    images: Tensor, size: tuple[int, int], scale: Tensor | None = None, shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Images at another size, then `shift + scale * image` in every channel.

    Args:
        images: [B, 3, H, W], fp32, bf16 or fp16 (others take the plain reference), any strides.
        size: (h, w) of the result, in pixels. Where it is the images' size there is nothing to fuse: one `addcmul`.
        scale, shift: [3] each, or neither.
        dtype: of the result; None keeps that of the images.

    Returns:
        [B, 3, h, w]; `images` themselves where nothing is to be done. A gradient flows through the plain reference.

    Raises:
        ValueError: shapes, types or devices do not fit, only one of scale and shift, or a side above 32768 pixels.
    """
    given = {"images": images, "scale": scale, "shift": shift}
    guard_device("resize_normalize", **given)
    dtype = dtype or images.dtype
    guard(
        images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point() and dtype.is_floating_point,
        f"resize_normalize takes floating-point images [B, 3, H, W], to a floating type, not {dtype}", **given,
    )  # fmt: skip
    affine = [x for x in (scale, shift) if x is not None]
    guard(
        len(affine) != 1 and all(x.shape == (3,) and x.is_floating_point() for x in affine),
        "resize_normalize takes floating-point scale and shift [3], both or neither", **given,
    )  # fmt: skip
    sides = (*images.shape[2:], *size)
    guard(
        len(sides) == 4 and all(0 < side <= MAX_SIDE for side in sides),
        f"resize_normalize takes images with sides of 1 to {MAX_SIDE} pixels to such a size (h, w), not {tuple(size)}",
        **given,
    )
    resized = tuple(images.shape[2:]) != tuple(size)
    if resized and not followed(images, *affine) and dtype in DTYPES and use_triton(images, *affine):
        return resize_op(images, *size, scale, shift, dtype)
    return resize_normalize_reference(images, size, scale, shift, dtype)


AOT = tuple(((128, 3, side), dtype) for dtype in (torch.float32, torch.bfloat16) for side in (336, 448, 37))


def examples(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Example]:
    """Images [B, 3, S, S] of `dtype` to MASt3R's 16 / 14 and DUNE's 8 / 14 of the side, with and without the affine."""
    count, _, side = shape
    scale, shift = torch.rand(2, 3, device=device) + 0.5
    images = draw((count, 3, side, side), dtype, device)
    for after in (-(-side * 8 // 7), -(-side * 4 // 7)):
        yield Example(f"to {after}, affine", resize_op, (images, after, after, scale, shift, dtype))
        yield Example(f"to {after}", resize_op, (images, after, after, None, None, dtype))
    last = draw((count, side, side, 3), dtype, device).permute(0, 3, 1, 2)
    yield Example(f"to {after}, channels last", resize_op, (last, after, after, scale, shift, torch.bfloat16))
