"""MASt3R's training criterion: pointmaps, and a weight times matching; and the criterion that it is tested by."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dune_fast.heads.mast3r.matching_loss import MatchingLoss, MatchingLossConfig, average_precision
from dune_fast.heads.mast3r.point_loss import PointLoss, PointLossConfig, View


@dataclass
class Mast3rLossConfig:
    """The whole criterion; defaults are those of MASt3R's training."""

    points: PointLossConfig = field(default_factory=PointLossConfig)
    matching: MatchingLossConfig = field(default_factory=MatchingLossConfig)
    matching_weight: float = 0.075
    """0: no matching loss."""

    def __post_init__(self) -> None:
        if not 0 <= self.matching_weight < float("inf"):
            raise ValueError(f"matching_weight is {self.matching_weight}: give a number of at least 0")


class Mast3rLoss:
    """The criterion of a batch of pairs; both orders of a pair make two entries of the batch."""

    def __init__(self, cfg: Mast3rLossConfig) -> None:
        self.cfg = cfg
        self.points, self.matching = PointLoss(cfg.points), MatchingLoss(cfg.matching)

    def __call__(self, gt1: View, gt2: View, pred1: View, pred2: View) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar, float32, and metrics without gradient.

        Args:
            gt1, gt2: see `PointLoss` and `MatchingLoss`.
            pred1, pred2: see there.
        """
        loss, metrics = self.points(gt1, gt2, pred1, pred2)
        if self.cfg.matching_weight:
            matching, more = self.matching(gt1, gt2, pred1, pred2)
            loss, metrics = loss + self.cfg.matching_weight * matching, metrics | more
        return loss, metrics


_TEST = PointLoss(PointLossConfig(gt_scale=True, sky_loss_value=0, alpha=0))
_TEST_INVARIANT = PointLoss(PointLossConfig(gt_scale=True, sky_loss_value=0, alpha=0, scale_shift_invariant=True))


@torch.no_grad()
def held_out_metrics(
    gt1: View, gt2: View, pred1: View, pred2: View, negatives_padding: int = 12288
) -> dict[str, Tensor]:
    """What a head is tested by: `points` and `points_invariant`, sums over the two views of the mean distance without
    and with scale and shift taken out, and `average_precision` of the descriptors, the higher the better."""
    return {
        "points": _TEST(gt1, gt2, pred1, pred2)[0],
        "points_invariant": _TEST_INVARIANT(gt1, gt2, pred1, pred2)[0],
        "average_precision": average_precision(gt1, gt2, pred1, pred2, negatives_padding),
    }
