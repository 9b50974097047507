"""Blocks whose attention stays inside windows of the patch grid, with some global blocks between (ViTDet).

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022; as in RADIO. With a period
of p, block i begins to be windowed where i % p = 0 and is global where i % p = p - 1; the last block is always global.
Windows are row-major, and so are the patches in one. What the summary tokens and registers do:

    evaluation   they skip the windowed blocks, and come back unchanged
    training     every window gets a copy; the copies are averaged where a global block follows

Minimal bytes moved: reading and writing the tokens at every change between the two arrangements.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from dune_fast.kernels.nn.block import Block, run_blocks


def window_period(depth: int, num_windowed: int = 0, num_global: int = 4) -> int:
    """The period: `num_windowed` + 1 or, where that is 0, depth // `num_global`. ValueError if it is below 2."""
    period = num_windowed + 1 if num_windowed else depth // num_global
    if period < 2:
        raise ValueError(
            f"windows need a windowed block before every global one; of {depth} blocks num_windowed={num_windowed} "
            f"and num_global={num_global} leave none: lower num_global, or set num_windowed"
        )
    return period


def is_windowed(block: int, depth: int, period: int) -> bool:
    """Whether block `block` of `depth` is windowed."""
    return block % period != period - 1 and block != depth - 1


def fitting_sizes(sizes: Sequence[int], grid: tuple[int, int]) -> list[int]:
    """Sides of windows, in patches, that a grid (rows, columns) can be cut into: smaller than the rows."""
    rows, columns = grid
    return [size for size in sizes if rows % size == 0 and columns % size == 0 and size < rows]


def drawn_window(sizes: Sequence[int], grid: tuple[int, int], probability: float, draws: tuple[float, float]) -> int:
    """Side of a training step's windows by two uniform numbers in [0, 1); 0 for whole attention."""
    fitting = fitting_sizes(sizes, grid)
    if not fitting or draws[0] > probability or probability == 0:
        return 0
    return fitting[int(draws[1] * len(fitting))]


def to_windows(x: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Patches [B, rows * columns, D] -> [B * windows, size * size, D]."""
    rows, columns = grid
    x = x.unflatten(1, (rows // size, size, columns // size, size)).transpose(2, 3)
    return x.reshape(-1, size * size, x.shape[-1])


def from_windows(x: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """[B * windows, size * size, D] -> [B, rows * columns, D]."""
    rows, columns = grid[0] // size, grid[1] // size
    x = x.reshape(-1, rows, columns, size, size, x.shape[-1]).transpose(2, 3)
    return x.reshape(-1, grid[0] * grid[1], x.shape[-1])


def windowed_outputs(
    blocks: Sequence[Block] | nn.ModuleList, x: Tensor, wanted: Collection[int], prefix: int, grid: tuple[int, int],
    size: int, period: int, depth: int, copied: bool, recompute: bool = False,
) -> dict[int, Tensor]:  # fmt: skip
    """Un-normalised tokens [B, P + N, D] after chosen blocks, by index; none beyond the largest is run.

    Args:
        blocks: the network's, those that are run at least.
        x: tokens before the first, [B, P + N, D].
        wanted: indices of blocks.
        prefix: P, summary tokens and registers.
        grid: rows and columns of patches, N in all.
        size: side of a window in patches.
        period: of `window_period`.
        depth: blocks of the whole network; the last of them is global.
        copied: the training's treatment of the summary tokens; the evaluation's otherwise.
        recompute: activation checkpointing, see `run_blocks`.

    Raises:
        ValueError: the grid is not a multiple of the windows.
    """
    rows, columns = grid
    if rows % size or columns % size:
        raise ValueError(
            f"windows of {size} x {size} patches do not cover a grid of {rows} x {columns}: choose images whose sides "
            "are multiples of a window, or no windows"
        )
    count = rows // size * (columns // size)
    outputs: dict[int, Tensor] = {}
    for inside, group in groupby(range(max(wanted) + 1), lambda i: is_windowed(i, depth, period)):
        indices = list(group)
        own = [blocks[i] for i in indices]
        if not inside:
            for i, tokens in zip(indices, run_blocks(own, x, None, recompute), strict=True):
                x = tokens
                if i in wanted:
                    outputs[i] = tokens
            continue
        summary = x[:, :prefix]
        windows = to_windows(x[:, prefix:], grid, size)
        if copied:
            windows = torch.cat([summary.repeat_interleave(count, dim=0), windows], dim=1)
        for i, tokens in zip(indices, run_blocks(own, windows, None, recompute), strict=True):
            if i not in wanted and i != indices[-1]:
                continue
            if copied:
                summary = tokens[:, :prefix].unflatten(0, (-1, count)).mean(1)
                tokens = tokens[:, prefix:]
            x = torch.cat([summary, from_windows(tokens, grid, size)], dim=1)
            if i in wanted:
                outputs[i] = x
    return outputs
