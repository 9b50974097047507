"""Which patches hold a person's head: scores, suppression of neighbours, and the people's cells."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLAMP = 1e-4


class Cells(NamedTuple):
    """P people's patches, in the order of image, row, column (detected) or of the list (training)."""

    image: Tensor
    """[P] int64, index of the image in the batch."""
    row: Tensor
    """[P] int64"""
    column: Tensor
    """[P] int64"""
    slot: Tensor
    """[P] int64, the person's place among those of its image."""
    slots: int
    """Most people of an image: known on the host."""
    kept: Tensor | None = None
    """[P] bool: the others take part in nothing; None for all."""


def scores_of(logits: Tensor) -> Tensor:
    """Probabilities in [1e-4, 1 - 1e-4]."""
    return logits.sigmoid().clamp(CLAMP, 1 - CLAMP)


def suppress(scores: Tensor, kernel: int) -> Tensor:
    """Scores [B, rows, columns] with 0 where a neighbour within `kernel` x `kernel` patches is higher; 1 leaves all.

    Equal neighbours all survive. An even kernel looks one patch further up and left than down and right.
    ValueError for a kernel below 1.
    """
    if kernel < 1:
        raise ValueError(f"nms {kernel}: give an odd number of patches, 3 as published, or 1 for no suppression")
    if kernel == 1:
        return scores
    rows, columns = scores.shape[-2:]
    highest = F.max_pool2d(scores[:, None], kernel, stride=1, padding=kernel // 2)[:, 0, :rows, :columns]
    return torch.where(highest == scores, scores, torch.zeros_like(scores))


def detect(scores: Tensor, threshold: float) -> Cells:
    """The cells of [B, rows, columns] whose score is at least the threshold."""
    image, row, column = torch.where(scores >= threshold)
    return Cells(image, row, column, *slots_of(image))


def slots_of(image: Tensor) -> tuple[Tensor, int]:
    """Each person's place among those of its image [P], and the most people of one; `image` [P] need not be sorted."""
    same = image[:, None] == image
    slot = same.tril(-1).sum(1)
    return slot, int(slot.max()) + 1 if len(image) else 0
