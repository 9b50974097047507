"""The losses of SAK's tasks: sums over the valid pixels, divided by how many there are.

Labels have the output's height and width; 255 marks a pixel, or one of its channels, that does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = 255
EDGE_WEIGHT = 0.95
"""Of edges; other pixels have 1 minus it."""


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy. logits [B, classes, H, W], labels [B, 1, H, W]."""
    return _cross_entropy(logits, labels, None)


def saliency_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of two classes, weighted by (1 - p, p): p is the share of the first class among the valid."""
    valid = labels != IGNORED
    negatives = ((labels == 0) & valid).sum() / valid.sum().clamp_min(1)
    return _cross_entropy(logits, labels, torch.stack([1 - negatives, negatives]))


def _cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    target = labels.squeeze(1).long()
    losses = F.cross_entropy(logits, target, weights, ignore_index=IGNORED, reduction="sum")
    return losses / (target != IGNORED).sum().clamp_min(1)


def edge_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy, mean over the valid pixels; edges weigh 0.95, others 0.05. Both [B, 1, H, W]."""
    valid = labels != IGNORED
    weights = torch.where(labels > 0, EDGE_WEIGHT, 1 - EDGE_WEIGHT)
    losses = F.binary_cross_entropy_with_logits(logits, valid * labels.float(), weights, reduction="none")
    return (losses * valid).sum() / valid.sum().clamp_min(1)


def normals_loss(normals: Tensor, labels: Tensor) -> Tensor:
    """L1 of the prediction at length 1, summed over the three channels. Both [B, 3, H, W]."""
    return _absolute(F.normalize(normals, dim=1), labels)


def depth_loss(depth: Tensor, labels: Tensor) -> Tensor:
    """L1. Both [B, 1, H, W]."""
    return _absolute(depth, labels)


def _absolute(values: Tensor, labels: Tensor) -> Tensor:
    """Sum of |x - y| over the valid channels of all pixels, divided by the valid pixels."""
    valid = (labels != IGNORED).all(1, keepdim=True)
    return torch.where(valid, (values - labels).abs(), 0.0).sum() / valid.sum().clamp_min(1)


LOSSES: dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]] = {
    "semseg": (1.0, segmentation_loss),
    "human_parts": (2.0, segmentation_loss),
    "sal": (5.0, saliency_loss),
    "edge": (50.0, edge_loss),
    "normals": (10.0, normals_loss),
    "depth": (1.0, depth_loss),
}
"""task -> its weight in the total, its loss"""


def total_loss(
    outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor], distillation: Tensor | float = 0.0, alpha: float = 1.0
) -> Tensor:
    """The tasks' weighted losses, and alpha times the distillation's.

    ValueError for a task that is not one of `LOSSES`.
    """
    if unknown := sorted(set(outputs) - set(LOSSES)):
        raise ValueError(f"tasks {', '.join(unknown)} have no loss; choose among {', '.join(LOSSES)}")
    total = alpha * distillation
    for task, output in outputs.items():
        weight, loss = LOSSES[task]
        total = total + weight * loss(output, labels[task])
    return total
