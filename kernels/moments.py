"""Per-channel mean and sum of squared deviations of a teacher's features.

    mean_c = sum_r x[r, c] / R,   m2_c = sum_r (x[r, c] - mean_c)^2

x is read once. The first kernel takes the moments of splits of the rows, the second merges them.

Each split subtracts the mean of its first tile from its rows before it squares them, so that a channel whose mean is
far from zero keeps its variance; where that mean lies within the spread of its tile, nothing, so that nothing is
rounded. Outliers in the first tile do little harm: r rows that are off by e add r e^2 to m2 themselves, so what cancels
in sum d^2 - (sum d)^2 / n is at most n / r times m2.

Sums within a split are float32. Their totals and the merge (Chan, Golub and LeVeque, 1979) are float64, because a mean
near zero is the small rest of large sums. Splits are merged in the order of their index, without atomics, so every run
gives the same bits.

Minimal bytes moved: read x once, R * C elements. Shapes: x [..., C] -> mean, m2 float32 [C].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dune_fast.kernels.launching import VIT_CHANNELS, Example, Launch, choose, draw, launch, processors
from dune_fast.kernels.library import as_rows, guard, jit, load_rows, register, tl, use_triton, widen


def moments_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """`moments` in plain torch, in two passes; float64 stays float64."""
    rows = widen(x.reshape(-1, x.shape[-1]))
    mean = rows.mean(0)
    return mean, (rows - mean).square_().sum(0)


@jit(do_not_specialize=["count"])
def _split_kernel(
    x, partial, count, split_rows, outer_stride, inner_stride,
    PERIOD: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial float64 [splits, 2, C]: mean and m2 of each split."""
    split = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = split * split_rows
    end = tl.minimum(first + split_rows, count)
    rows = first + tl.arange(0, BLOCK_R)

    valid = (rows < end)[:, None] & (columns < CHANNELS)[None, :]
    value = load_rows(x, rows, columns, valid, PERIOD, outer_stride, inner_stride)
    tile = tl.minimum(end - first, BLOCK_R).to(tl.float32)
    shift = tl.sum(value, 0) * (1.0 / tile)
    # within the spread: squares about zero lose one bit, but a shift would round every x - shift
    shift = tl.where(tl.sum(value * value, 0) > 2 * tile * shift * shift, 0.0, shift)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    # reads the first tile once more, from a cache; tiles ahead are on their way to shared memory, not to registers
    for offset in tl.range(0, split_rows, BLOCK_R, num_stages=STAGES):
        valid = (rows + offset < end)[:, None] & (columns < CHANNELS)[None, :]
        value = load_rows(x, rows + offset, columns, valid, PERIOD, outer_stride, inner_stride)
        d = tl.where(valid, value - shift[None, :], 0.0)
        total += d
        square += d * d

    # float64 from here on: a few operations for each total of a thread
    n = (end - first).to(tl.float64)
    delta = tl.sum(total.to(tl.float64), 0) * (1.0 / n)
    m2 = tl.sum(square.to(tl.float64), 0) - n * delta * delta  # may be below 0 by a rounding; the merge sees to that
    out = partial + split * 2 * CHANNELS + columns
    tl.store(out, shift.to(tl.float64) + delta, mask=columns < CHANNELS)
    tl.store(out + CHANNELS, m2, mask=columns < CHANNELS)


@jit(do_not_specialize=["count", "splits"])
def _merge_kernel(
    partial, mean, m2, count, splits, split_rows,
    CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean and m2 [C] of all rows, about the first split's mean; splits in order, BLOCK_S at a time."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    origin = tl.load(partial + columns, mask=columns < CHANNELS, other=0.0)
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    square = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        valid = (split < splits)[:, None] & (columns < CHANNELS)[None, :]
        at = partial + split[:, None] * 2 * CHANNELS + columns[None, :]
        n = tl.minimum(count - split * split_rows, split_rows).to(tl.float64)[:, None]
        away = tl.where(valid, tl.load(at, mask=valid, other=0.0) - origin[None, :], 0.0)
        total += n * away
        square += tl.load(at + CHANNELS, mask=valid, other=0.0) + n * away * away
    n = count.to(tl.float64)
    delta = tl.sum(total, 0) / n
    rest = tl.maximum(tl.sum(square, 0) - n * delta * delta, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(mean + columns, (origin + delta).to(tl.float32), mask=columns < CHANNELS)
    tl.store(m2 + columns, rest.to(tl.float32), mask=columns < CHANNELS)


_TABLE = {
    "default": [
        Launch(192, {"BLOCK_R": 32, "BLOCK_C": 64, "PROGRAMS": 4, "STAGES": 5, "num_warps": 4}),
        Launch(1 << 30, {"BLOCK_R": 16, "BLOCK_C": 128, "PROGRAMS": 4, "STAGES": 5, "num_warps": 4}),
    ]
}
"""By channels. Not yet measured: reasoned for sm_90, where 40 KiB in flight a multiprocessor cover the latency. 4
programs with 3 to 4 tiles of 4 KiB (bf16) on their way keep 48 KiB, in 64 KiB of shared memory. More programs would
only run more epilogues, 800 instructions each. 72 to 96 registers, where 128 would do."""


def _moments_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, channels = as_rows(x), x.shape[-1]
    options = choose(_TABLE, x.device, channels)
    programs = options.pop("PROGRAMS") * processors(x.device)
    block_rows, column_blocks = options["BLOCK_R"], -(-channels // options["BLOCK_C"])
    splits = max(1, min(programs // column_blocks, -(-rows.count // block_rows)))
    split_rows = -(-rows.count // (splits * block_rows)) * block_rows
    splits = -(-rows.count // split_rows)

    partial = torch.empty(splits, 2, channels, dtype=torch.float64, device=x.device)
    mean, m2 = _moments_fake(x)
    launch(
        _split_kernel, (column_blocks, splits), rows.x, partial, rows.count, split_rows, rows.outer_stride,
        rows.inner_stride, PERIOD=rows.period, CHANNELS=channels, **options,
    )  # fmt: skip
    launch(
        _merge_kernel, (-(-channels // 8),), partial, mean, m2, rows.count, splits, split_rows, CHANNELS=channels,
        BLOCK_S=128, BLOCK_C=8, num_warps=4,  # the splits of a wide teacher in one round of loads
    )  # fmt: skip
    return mean, m2


def _moments_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(x.shape[-1], dtype=torch.float32) for _ in range(2))


_moments = register("moments(Tensor x) -> (Tensor, Tensor)", _moments_triton, moments_reference, _moments_fake)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, m2) over all dimensions of x [..., C] but the last, float32 [C] each; no gradient flows.

    x is fp32, bf16 or fp16; a slice of tokens is read where it lies. ValueError: no row or no channel, or 2^31 rows and
    more.
    """
    guard(x.ndim >= 2 and x.numel() > 0, "moments takes [..., C] with at least one row", x=x)
    guard(x.numel() // x.shape[-1] < 2**31, "moments takes fewer than 2^31 rows", x=x)
    return _moments(x.detach()) if use_triton(x) else moments_reference(x.detach())


AOT = tuple(
    ((128, 576, channels), dtype)
    for dtype, widths in ((torch.bfloat16, (64, *VIT_CHANNELS, 4096)), (torch.float32, (64, 1024)))
    for channels in widths
)


def examples(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Example]:
    """Patch tokens [B, N, C] of a teacher, cut from [B, 1 + N, C]."""
    yield Example("moments", _moments, (draw((shape[0], 1 + shape[1], shape[2]), dtype, device)[:, 1:],))
