"""Metrics of segmentation and depth: sums that are added over images and ranks, then read once."""

from __future__ import annotations

import torch
from torch import Tensor

from dune_fast.heads.linear.depth import MIN_DEPTH
from dune_fast.heads.linear.segmentation import IGNORED

EIGEN_CROP = (slice(45, 471), slice(41, 601))
"""Rows and columns of a 480x640 image of NYUd that count."""
DEPTH_METRICS = ("rmse", "abs_rel", "a1", "a2", "a3", "log_10", "rmse_log", "sq_rel", "mae", "silog")
"""`a1`, `a2`, `a3`: share of pixels with max(p / t, t / p) below 1.25, 1.25^2, 1.25^3."""


class ConfusionMatrix:
    """Counts of pixels by true and predicted class.

    Args:
        classes: number of classes.
        device: of the counts.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.float64, device=device)
        """[true class, predicted class]; float64 is exact up to 2^53 pixels."""

    def add(self, prediction: Tensor, labels: Tensor) -> None:
        """Takes classes int64 [...] of pixels in; those with the label 255 do not count.

        Raises:
            ValueError: a label that no class has.
        """
        kept = labels != IGNORED
        truth, found = labels[kept], prediction[kept]
        n = len(self.counts)
        if truth.numel() and not 0 <= int(truth.min()) <= int(truth.max()) < n:
            raise ValueError(f"a label is {int(truth.max())}: give classes 0 to {n - 1}, and {IGNORED} for none")
        self.counts += torch.bincount(truth * n + found, minlength=n * n).view(n, n)

    def iou(self) -> Tensor:
        """Intersection over union of each class over all pixels, float64 [classes]; NaN where there is no pixel."""
        both = self.counts.diagonal()
        return both / (self.counts.sum(0) + self.counts.sum(1) - both)

    def result(self) -> dict[str, float]:
        """`miou`: mean over the classes that occur in truth or prediction; `accuracy` of pixels and of classes."""
        right, total = self.counts.diagonal(), self.counts.sum(1)
        return {
            "miou": self.iou().nanmean().item(),
            "pixel_accuracy": (right.sum() / total.sum()).item(),
            "class_accuracy": (right / total).nanmean().item(),
        }


def depth_errors(prediction: Tensor, truth: Tensor, max_depth: float) -> Tensor:
    """The metrics of one image.

    Args:
        prediction: [...], metres; clamped to [0.001, max_depth] here.
        truth: of the same shape; pixels count where it is above 0.001 and below max_depth.

    Returns:
        float64 [10], in the order of `DEPTH_METRICS`; NaN if no pixel counts.
    """
    valid = (truth > MIN_DEPTH) & (truth < max_depth)
    p, t = prediction[valid].double().clamp(MIN_DEPTH, max_depth), truth[valid].double()
    ratio, log_error = torch.maximum(p / t, t / p), p.log() - t.log()
    squares = (p - t).square()
    return torch.stack(
        [
            squares.mean().sqrt(),
            ((p - t).abs() / t).mean(),
            *((ratio < 1.25**power).double().mean() for power in (1, 2, 3)),
            (p.log10() - t.log10()).abs().mean(),
            log_error.square().mean().sqrt(),
            (squares / t).mean(),
            (p - t).abs().mean(),
            100 * (log_error.square().mean() - log_error.mean().square()).clamp_min(0).sqrt(),
        ]
    )


class DepthMetrics:
    """Means over images of the metrics of each image; images without a pixel that counts are left out."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(len(DEPTH_METRICS) + 1, dtype=torch.float64, device=device)
        """The metrics', and the number of images."""

    def add(self, prediction: Tensor, truth: Tensor, max_depth: float) -> None:
        """Takes one image in, see `depth_errors`."""
        errors = depth_errors(prediction, truth, max_depth)
        if errors.isfinite().all():
            self.sums += torch.cat([errors, errors.new_ones(1)])

    def result(self) -> dict[str, float]:
        """Name -> mean."""
        *sums, count = self.sums.tolist()
        return {name: value / count if count else float("nan") for name, value in zip(DEPTH_METRICS, sums, strict=True)}
