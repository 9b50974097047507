"""The Triton kernels of `distill_loss`, which see its formula for what they compute and save.

    token kernel      s, t [tokens, C] -> sums [tokens, 4] = s.y, |s|^2, |y|^2, smooth-L1
    image kernel      sums -> total, cosine, smooth_l1 [B] and saved [tokens, 2] = cos / |s|^2, 1 / (|s| |y|)
    gradient kernel   s, t, saved, upstream [B] -> ds [tokens, C]

The first and the last move all the bytes. Their programs hold whole tokens in registers and take every num_programs-th
tile of them, while the next ones are copied to shared memory; mean and inv_std they load once. Roots and quotients are
left to the image kernel, once a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dune_fast.kernels.launching import Launch, choose, launch, processors
from dune_fast.kernels.library import as_rows, contiguous, jit, load_rows, tl

EPS = 1e-8
SMALLEST_BETA = 2.0**-60
"""Smaller ones, and 0, count as this one: L1 but for 2^-61 a value; float32 has the inverse and the products."""
MAX_CHANNELS = 4096
"""Of one token in registers."""


@jit
def _standardizer(mean, inv_std, channel, CHANNELS: tl.constexpr, STANDARDIZE: tl.constexpr, BLOCK_C: tl.constexpr):
    """mean and inv_std, float32 [C], loaded once a program; 0 and 1 where features come standardized."""
    if STANDARDIZE:
        inside = channel < CHANNELS
        shift = tl.load(mean + channel, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(inv_std + channel, mask=inside, other=0.0).to(tl.float32)
    else:
        shift = tl.zeros([BLOCK_C], tl.float32)
        scale = tl.full([BLOCK_C], 1.0, tl.float32)
    return shift, scale


@jit(do_not_specialize=["tokens"])
def _token_kernel(
    student, teacher, mean, inv_std, sums, tokens, s_outer, s_inner, t_outer, t_inner, beta,
    S_PERIOD: tl.constexpr, T_PERIOD: tl.constexpr, STANDARDIZE: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sums [tokens, 4] = s.y, |s|^2, |y|^2, smooth-L1; a program takes every num_programs-th tile of tokens."""
    channel = tl.arange(0, BLOCK_C)
    shift, scale = _standardizer(mean, inv_std, channel, CHANNELS, STANDARDIZE, BLOCK_C)
    for first in tl.range(tl.program_id(0) * BLOCK_R, tokens, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        token = first + tl.arange(0, BLOCK_R)
        valid = (token < tokens)[:, None] & (channel < CHANNELS)[None, :]
        s = load_rows(student, token, channel, valid, S_PERIOD, s_outer, s_inner)
        t = load_rows(teacher, token, channel, valid, T_PERIOD, t_outer, t_inner)
        y = (t - shift[None, :]) * scale[None, :]
        size = tl.abs(s - y)
        bounded = tl.minimum(size, beta, propagate_nan=tl.PropagateNan.ALL)
        l1 = bounded * (size - 0.5 * bounded)  # beta times smooth-L1: the square below beta, linear above
        # joined, the four sums cost the barriers of one
        four = tl.sum(tl.join(tl.join(s * y, y * y), tl.join(s * s, l1)), 1)  # [R, 2, 2]
        at = sums + token[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(at, tl.reshape(four, [BLOCK_R, 4]), mask=(token < tokens)[:, None])


@jit
def _image_kernel(
    sums, saved, total, cosine, smooth_l1, cosine_weight, smooth_l1_weight, inverse_beta,
    EPS: tl.constexpr, PATCHES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Means over the patches of one image a program, and what the backward needs of each."""
    image = tl.program_id(0)
    cosines = tl.zeros([BLOCK_P], tl.float32)
    l1s = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, PATCHES, BLOCK_P):
        patch = first + tl.arange(0, BLOCK_P)
        inside = patch < PATCHES
        token = image * PATCHES + patch
        dot = tl.load(sums + token * 4, mask=inside, other=0.0)
        s_square = tl.load(sums + token * 4 + 1, mask=inside, other=0.0)
        y_square = tl.load(sums + token * 4 + 2, mask=inside, other=0.0)
        l1s += tl.load(sums + token * 4 + 3, mask=inside, other=0.0) / CHANNELS
        # rounded, not approximated: where s and y agree, 1 - cos is the small difference of two large numbers
        length = tl.sqrt_rn(s_square)
        s_norm = tl.maximum(length, EPS)
        y_norm = tl.maximum(tl.sqrt_rn(y_square), EPS)
        overflow = (s_square == float("inf")) | (y_square == float("inf"))  # then cos is 0: s or y over infinity
        cos = tl.div_rn(tl.div_rn(tl.where(overflow, 0.0, dot), s_norm), y_norm)
        cosines += tl.where(inside, 1.0 - cos, 0.0)
        # |s|^2 as torch differentiates it: the bounded norm times the true one, and nothing for an all-zero token
        of_s = tl.div_rn(tl.div_rn(cos, s_norm), tl.where(length == 0, 1.0, length))
        tl.store(saved + token * 2, of_s, mask=inside)
        tl.store(saved + token * 2 + 1, tl.div_rn(tl.div_rn(1.0, s_norm), y_norm), mask=inside)
    cos = tl.sum(cosines, 0) / PATCHES
    l1 = tl.sum(l1s, 0) * inverse_beta / PATCHES
    tl.store(total + image, cosine_weight * cos + smooth_l1_weight * l1)
    tl.store(cosine + image, cos)
    tl.store(smooth_l1 + image, l1)


@jit(do_not_specialize=["tokens"])
def _gradient_kernel(
    student, teacher, mean, inv_std, saved, upstream, gradient, tokens, s_outer, s_inner, t_outer, t_inner,
    cosine_weight, smooth_l1_weight, inverse_beta,
    S_PERIOD: tl.constexpr, T_PERIOD: tl.constexpr, STANDARDIZE: tl.constexpr,
    PATCHES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """gradient [tokens, C] of the student; a program takes every num_programs-th tile of tokens."""
    channel = tl.arange(0, BLOCK_C)
    shift, scale = _standardizer(mean, inv_std, channel, CHANNELS, STANDARDIZE, BLOCK_C)
    for first in tl.range(tl.program_id(0) * BLOCK_R, tokens, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        token = first + tl.arange(0, BLOCK_R)
        inside = token < tokens
        valid = inside[:, None] & (channel < CHANNELS)[None, :]
        s = load_rows(student, token, channel, valid, S_PERIOD, s_outer, s_inner)
        t = load_rows(teacher, token, channel, valid, T_PERIOD, t_outer, t_inner)

        g = tl.load(upstream + token // PATCHES, mask=inside, other=0.0).to(tl.float32) / PATCHES
        of_s = cosine_weight * g * tl.load(saved + token * 2, mask=inside, other=0.0)
        of_y = cosine_weight * g * tl.load(saved + token * 2 + 1, mask=inside, other=0.0)
        of_l1 = smooth_l1_weight * g / CHANNELS

        y = (t - shift[None, :]) * scale[None, :]
        slope = tl.clamp((s - y) * inverse_beta, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        out = of_s[:, None] * s - of_y[:, None] * y + of_l1[:, None] * slope
        at = token.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        tl.store(gradient + at, out.to(gradient.dtype.element_ty), mask=valid)


_TABLE = {
    "default": [
        Launch(64, {"BLOCK_R": 16, "BLOCK_C": 64, "PROGRAMS": 12, "STAGES": 3, "num_warps": 1}),
        Launch(256, {"BLOCK_R": 4, "BLOCK_C": 256, "PROGRAMS": 12, "STAGES": 3, "num_warps": 1}),
        Launch(512, {"BLOCK_R": 2, "BLOCK_C": 512, "PROGRAMS": 12, "STAGES": 3, "num_warps": 1}),
        Launch(1024, {"BLOCK_R": 1, "BLOCK_C": 1024, "PROGRAMS": 12, "STAGES": 3, "num_warps": 1}),
        Launch(2048, {"BLOCK_R": 1, "BLOCK_C": 2048, "PROGRAMS": 6, "STAGES": 3, "num_warps": 4}),
        Launch(MAX_CHANNELS, {"BLOCK_R": 1, "BLOCK_C": 4096, "PROGRAMS": 3, "STAGES": 3, "num_warps": 8}),
    ]
}
"""By channels; PROGRAMS a multiprocessor where both operands have two bytes, else fewer in the same shared memory. All
must be resident at once: a second wave would take as long as the first. Not yet measured: reasoned for sm_90 from 32
values of each operand a thread, so that up to 1024 channels one warp sums a token without a barrier (16 instructions a
value; 25 with four warps a token). 12 warps a multiprocessor keep 48 to 96 KiB in flight where 40 would do, and stay
resident with up to 168 registers (at most 128 are used)."""


def _prepare(
    student: Tensor, teacher: Tensor, mean: Tensor | None, inv_std: Tensor | None
) -> tuple[tuple[Tensor | None, ...], int, int, dict[str, Any]]:
    """What both passes share: the operands with adjacent channels, tokens, programs, strides and constants."""
    s, t, channels = as_rows(student), as_rows(teacher), student.shape[-1]
    options = choose(_TABLE, student.device, channels)
    resident = options.pop("PROGRAMS") * 4 // (student.element_size() + teacher.element_size())
    programs = min(-(-s.count // options["BLOCK_R"]), resident * processors(student.device))
    options |= {
        "s_outer": s.outer_stride, "s_inner": s.inner_stride, "S_PERIOD": s.period,
        "t_outer": t.outer_stride, "t_inner": t.inner_stride, "T_PERIOD": t.period,
        "STANDARDIZE": mean is not None, "CHANNELS": channels,
    }  # fmt: skip
    return (s.x, t.x, *contiguous(mean, inv_std)), s.count, programs, options


def forward_triton(
    student: Tensor, teacher: Tensor, mean: Tensor | None, inv_std: Tensor | None, *terms: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """total, cosine and smooth_l1 [B], and saved [tokens, 2], float32; terms are those of `distill_loss`."""
    operands, tokens, programs, options = _prepare(student, teacher, mean, inv_std)
    total, cosine, smooth_l1 = (student.new_empty(len(student), dtype=torch.float32) for _ in range(3))
    sums, saved = (student.new_empty(tokens, n, dtype=torch.float32) for n in (4, 2))
    *weights, beta = terms
    beta = max(beta, SMALLEST_BETA)
    launch(_token_kernel, (programs,), *operands, sums, tokens, beta=beta, **options)
    patches = tokens // len(student)
    block = min(1024, 1 << (patches - 1).bit_length())
    launch(
        _image_kernel, (len(student),), sums, saved, total, cosine, smooth_l1, *weights, 1.0 / beta,
        EPS=EPS, PATCHES=patches, CHANNELS=student.shape[-1], BLOCK_P=block, num_warps=4,
    )  # fmt: skip
    return total, cosine, smooth_l1, saved


def backward_triton(
    student: Tensor, teacher: Tensor, mean: Tensor | None, inv_std: Tensor | None, saved: Tensor, upstream: Tensor,
    cosine_weight: float, smooth_l1_weight: float, beta: float,
) -> Tensor:  # fmt: skip
    """Gradient of the student, of its shape and dtype, contiguous; upstream [B] is that of total."""
    operands, tokens, programs, options = _prepare(student, teacher, mean, inv_std)
    gradient = student.new_empty(student.shape)
    launch(
        _gradient_kernel, (programs,), *operands, saved, upstream.contiguous(), gradient, tokens,
        cosine_weight=cosine_weight, smooth_l1_weight=smooth_l1_weight, inverse_beta=1.0 / max(beta, SMALLEST_BETA),
        PATCHES=tokens // len(student), **options,
    )  # fmt: skip
    return gradient
