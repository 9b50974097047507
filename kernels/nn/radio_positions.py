"""RADIO's positions: a table larger than the image, cropped anew for every image in training (CPE).

For a grid of h x w patches and a table of S x S:

    training     scale = clamp((s a, s / a), 0, 1), offset = t (1 - scale);  column j reads the table, bilinearly, at
                 x = (scale_x j / (w - 1) + offset_x) (S - 1), row i alike;  s, a, t are drawn for every image
    evaluation   the table resized to a square of the longer side, then its top-left h x w window
    whole        the table is for the largest image there is: its top-left window, resized where the grid is larger

A grid equal to the table takes the table as it is. Everything is float32. Minimal bytes moved in training: the table
once, the positions [B, h w, D] once; `embedding_bag` adds the four neighbours without keeping them apart, and its
backward pass is deterministic, unlike `grid_sample`'s.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dune_fast.kernels.nn.draws import PositionDraws

SMALLEST_SHARE = 0.1
"""Of the table's area that a crop covers, at least."""
ASPECTS = (3 / 4, 4 / 3)


def table_map(table: Tensor) -> Tensor:
    """A table [1, S * S, D] as a map [1, D, S, S], float32."""
    side = math.isqrt(table.shape[1])
    return table.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)


def as_table(square: Tensor) -> Tensor:
    """[1, D, H, W] -> [1, H * W, D]."""
    return square.flatten(2).transpose(1, 2)


def _is_whole(table: Tensor, height: int, width: int) -> bool:
    return height == width == math.isqrt(table.shape[1])


def cropped_positions(table: Tensor, height: int, width: int) -> Tensor:
    """Evaluation: a table [1, S * S, D] for a grid, [1, height * width, D], float32."""
    if _is_whole(table, height, width):
        return table.float()
    longer = max(height, width)
    square = F.interpolate(table_map(table), size=(longer, longer), mode="bilinear", align_corners=False)
    return as_table(square[:, :, :height, :width])


def whole_positions(table: Tensor, height: int, width: int) -> Tensor:
    """Without CPE: a table [1, S * S, D] for a grid, [1, height * width, D], float32."""
    if _is_whole(table, height, width):
        return table.float()
    window = table_map(table)[:, :, :height, :width]
    if window.shape[-2:] != (height, width):
        window = F.interpolate(window, size=(height, width), mode="bilinear", align_corners=False)
    return as_table(window)


def _neighbours(scale: Tensor, offset: Tensor, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Both neighbours of `count` sampling points along one side of the table, and their weights: [B, count, 2] each.

    scale, offset: [B].
    """
    step = torch.arange(count, device=scale.device) / max(count - 1, 1)
    at = (scale[:, None] * step + offset[:, None]) * (side - 1)  # [B, count]
    low = at.floor().clamp(0, side - 1)
    share = (at - low).clamp(0, 1)
    pair = torch.stack([low, (low + 1).clamp_max(side - 1)], dim=-1).long()
    return pair, torch.stack([1 - share, share], dim=-1)


def sampled_positions(table: Tensor, height: int, width: int, draws: PositionDraws) -> Tensor:
    """A crop of the table for every image: [B, height * width, D], float32. `draws.dropout` is not read."""
    side, batch = math.isqrt(table.shape[1]), len(draws.scale)
    least = math.sqrt(SMALLEST_SHARE)
    root = least + (1 - least) * draws.scale.float()
    low, high = (math.log(aspect) for aspect in ASPECTS)
    aspect = torch.exp(low + (high - low) * draws.aspect.float())
    scale = torch.stack([root * aspect, root / aspect], dim=-1).clamp(0, 1)  # [B, 2], x before y
    offset = draws.offset.float() * (1 - scale)
    columns, column_weights = _neighbours(scale[:, 0], offset[:, 0], width, side)
    rows, row_weights = _neighbours(scale[:, 1], offset[:, 1], height, side)
    index = rows[:, :, None, :, None] * side + columns[:, None, :, None, :]  # [B, h, w, 2, 2]
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    index, weights = index.reshape(-1, 4), weights.reshape(-1, 4)
    positions = F.embedding_bag(index, table[0].float(), mode="sum", per_sample_weights=weights)
    return positions.unflatten(0, (batch, height * width))


def training_positions(
    table: Tensor, height: int, width: int, draws: PositionDraws, dropout: float, cropped: bool
) -> Tensor:
    """Positions of every image, [B, height * width, D], float32; zeros where one is trained without.

    Args:
        table: [1, S * S, D].
        dropout: probability of that, "position dropout"; what is kept is not rescaled.
        cropped: CPE, for a table that is larger than the network's nominal input; a grid equal to the table takes it
            as it is. Without, the table is taken as in evaluation.
    """
    if not cropped or _is_whole(table, height, width):
        positions = whole_positions(table, height, width)
    else:
        positions = sampled_positions(table, height, width, draws)
    if dropout:
        positions = positions * (draws.dropout > dropout)[:, None, None]
    return positions


def resized_table(table: Tensor, side: int) -> Tensor:
    """Other weights' table [1, S * S, D] for a side of `side` patches: bicubic, corners aligned, no antialias."""
    if math.isqrt(table.shape[1]) == side:
        return table
    square = F.interpolate(table_map(table), size=(side, side), mode="bicubic", align_corners=True)
    return as_table(square).to(table.dtype)


def resized_projection(weight: Tensor, patch_size: int) -> Tensor:
    """Other weights' patch projection [D, 3, p, p] for another patch size, as `resized_table`."""
    if weight.shape[-1] == patch_size:
        return weight
    size = (patch_size, patch_size)
    return F.interpolate(weight.float(), size=size, mode="bicubic", align_corners=True).to(weight.dtype)
