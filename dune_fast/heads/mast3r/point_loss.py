"""Regression of pointmaps: the loss of every pixel of two views, and its confidence-weighted mean.

    g_v = inv(pose_1) X_v                               true points of view v in camera 1's frame
    l_v = | p_v / n_p - g_v / n_g |                     of every valid pixel; n: one scale for both views of a pair
    loss = sum over views of mean(l_v c_v - alpha log c_v)

`?` before the norm's mode: a pair in metres divides prediction and truth by the truth's n, so its scale is learnt; any
other pair divides each by its own. Sums under masks replace every selection, so the host never waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NORMS = ("avg_dis", "avg_log1p", "avg_warp-log1p", "median_dis", "sqrt_dis")
_TINY = 1e-8

View = Mapping[str, Tensor]
"""The truth of a batch of views, or a prediction of them; see `PointLoss`."""


@dataclass
class PointLossConfig:
    """Options of the pointmap's loss; defaults are those of MASt3R's training."""

    norm_mode: str = "?avg_dis"
    """How a pair's scale n is measured, from all valid points of both views: avg_dis, the mean distance to camera 1;
    avg_log1p, the mean of log(1 + distance); avg_warp-log1p, the same after points are moved to that distance;
    median_dis, the median distance; sqrt_dis, the squared mean of sqrt(distance). `?` in front: pairs in metres keep
    their scale."""
    gt_scale: bool = False
    """Whether true points, and predicted ones of pairs in metres, are not divided at all."""
    max_metric_scale: float = 0.0
    """A pair in metres with a point this far from camera 1 counts as one of unknown scale; 0: never."""
    sky_loss_value: float = 2.0
    """Loss of a pixel of the sky; 0: the sky is left out."""
    loss_in_log: bool = False
    """Whether points are moved to the distance log(1 + distance) after normalisation."""
    scale_shift_invariant: bool = False
    """Whether shift along z and scale are taken out, by medians; for tests of scenes of unknown scale."""
    alpha: float = 0.2
    """Weight of the confidence's logarithm; 0: the plain mean, without confidence."""

    def __post_init__(self) -> None:
        mode = self.norm_mode.removeprefix("?")
        if mode not in NORMS or self.norm_mode == "?avg_warp-log1p":
            raise ValueError(
                f"norm_mode is {self.norm_mode!r}: give one of {', '.join(NORMS)}, with a `?` in front (but of "
                "avg_warp-log1p) where pairs in metres keep their scale"
            )
        for name in ("max_metric_scale", "sky_loss_value", "alpha"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: give a number of at least 0")


class PointLoss:
    """Loss of the pointmaps of two views of B pairs, float32.

    The truth of a view: `pts3d` [B, H, W, 3] in the world, `valid_mask` and `sky_mask` [B, H, W], `is_metric_scale`
    [B], and of view 1 `camera_pose` [B, 4, 4], camera-to-world. The prediction: `pts3d` of view 1 and
    `pts3d_in_other_view` of view 2 [B, H, W, 3], both in camera 1's frame, and `conf` [B, H, W]. The views may differ
    in size.
    """

    def __init__(self, cfg: PointLossConfig) -> None:
        self.cfg = cfg

    def __call__(self, gt1: View, gt2: View, pred1: View, pred2: View) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar, and metrics without gradient: `point_1` and `point_2`, a view's mean loss before the confidence,
        and `point_conf_1` and `point_conf_2`, after it."""
        losses, masks = self.pixels(gt1, gt2, pred1, pred2)
        total, metrics = losses[0].new_zeros(()), {}
        for v, (loss, mask, pred) in enumerate(zip(losses, masks, (pred1, pred2), strict=True), 1):
            plain = masked_mean(loss, mask)
            metrics[f"point_{v}"] = plain.detach()
            if self.cfg.alpha:
                plain = masked_mean(with_confidence(loss, pred["conf"].float(), self.cfg.alpha), mask)
                metrics[f"point_conf_{v}"] = plain.detach()
            total = total + plain
        return total, metrics

    def pixels(self, gt1: View, gt2: View, pred1: View, pred2: View) -> tuple[list[Tensor], list[Tensor]]:
        """The loss of every pixel of each view, and which of them count, [B, H, W] each."""
        cfg = self.cfg
        valid = [gt1["valid_mask"], gt2["valid_mask"]]
        shapes = [mask.shape for mask in valid]
        world_to_1 = torch.linalg.inv_ex(gt1["camera_pose"].float()).inverse
        truth, found = [], []
        for gt, points in ((gt1, pred1["pts3d"]), (gt2, pred2["pts3d_in_other_view"])):
            rotated = torch.einsum("bij,bhwj->bhwi", world_to_1[:, :3, :3], gt["pts3d"].float())
            truth.append((rotated + world_to_1[:, None, None, :3, 3]).flatten(1, 2))
            found.append(points.float().flatten(1, 2))
        split = truth[0].shape[1]
        g, p = torch.cat(truth, 1), torch.cat(found, 1)  # [B, P, 3], the pixels of both views
        mask = torch.cat([m.flatten(1) for m in valid], 1)  # [B, P]
        # what is not valid may be NaN: zeros keep it out of sums and gradients
        g, p = (torch.where(mask[..., None], x, 0.0) for x in (g, p))
        g, p = self._normalise(g, p, mask, gt1["is_metric_scale"] & gt2["is_metric_scale"])
        if cfg.scale_shift_invariant:
            g, p = self._without_scale_and_shift(g, p, mask)
        if cfg.loss_in_log:
            g, p = _to_log_distance(g), _to_log_distance(p)
        loss = torch.linalg.vector_norm(p - g, dim=-1)
        if cfg.sky_loss_value:
            sky = torch.cat([gt["sky_mask"].flatten(1) for gt in (gt1, gt2)], 1) & ~mask
            loss, mask = torch.where(sky, cfg.sky_loss_value, loss), mask | sky
        parts = [(x[:, :split], x[:, split:]) for x in (loss, mask)]
        losses, masks = ([x.view(shape) for x, shape in zip(pair, shapes, strict=True)] for pair in parts)
        return losses, masks

    def _normalise(self, g: Tensor, p: Tensor, mask: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        """Points divided by their pair's scale."""
        cfg = self.cfg
        if cfg.max_metric_scale:
            farthest = torch.linalg.vector_norm(g, dim=-1).amax(1)  # zeros where not valid
            metric = metric & (farthest < cfg.max_metric_scale)
        g_own, n_g = _divided(g, mask, cfg.norm_mode.removeprefix("?"))
        p_own, _ = _divided(p, mask, cfg.norm_mode.removeprefix("?"))
        if cfg.norm_mode.startswith("?"):
            as_true = p if cfg.gt_scale else p / n_g
            p_own = torch.where(metric[:, None, None], as_true, p_own)
        return (g if cfg.gt_scale else g_own), p_own

    def _without_scale_and_shift(self, g: Tensor, p: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Points less their median z, then brought to one scale: the median distance to the coordinates' medians."""
        g, p = (x - F.pad(_medians(x[..., 2:], mask), (2, 0)) for x in (g, p))
        scales = []
        for x in (g, p):
            distance = torch.linalg.vector_norm(x.detach() - _medians(x, mask), dim=-1, keepdim=True)
            scales.append(_medians(distance, mask).clamp_min(_TINY))
        s_g, s_p = scales[0], scales[1].clamp(1e-3, 1e3)
        return (g, p * (s_g / s_p)) if self.cfg.gt_scale else (g / s_g, p / s_p)


def with_confidence(loss: Tensor, conf: Tensor, alpha: float) -> Tensor:
    """loss * conf - alpha log(conf), elementwise; conf > 0."""
    return loss * conf - alpha * conf.log()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x under a mask of its shape; 0 where the mask is empty."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp_min(1)


def _divided(x: Tensor, mask: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Points [B, P, 3], zero where not valid, over their scale, and the scale [B, 1, 1]."""
    distance = torch.linalg.vector_norm(x, dim=-1)  # [B, P]
    count = mask.sum(1) + _TINY
    if mode == "median_dis":
        scale = _medians(distance[..., None], mask)[:, 0, 0]
    elif mode == "sqrt_dis":
        # the derivative of sqrt is infinite at 0
        root = torch.where(distance > 0, distance.clamp_min(torch.finfo(x.dtype).tiny).sqrt(), 0.0)
        scale = (root.sum(1) / count).square()
    else:
        if mode == "avg_warp-log1p":
            x = _to_log_distance(x)
        scale = (distance if mode == "avg_dis" else distance.log1p()).sum(1) / count
    scale = scale.clamp_min(_TINY)[:, None, None]
    return x / scale, scale


def _to_log_distance(x: Tensor) -> Tensor:
    """Points moved along their ray to the distance log(1 + distance)."""
    distance = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (distance.log1p() / distance.clamp_min(_TINY))


def _medians(x: Tensor, mask: Tensor) -> Tensor:
    """The lower median of the valid ones of [B, P, C], per channel, without gradient: [B, 1, C]; 0 where none is."""
    hidden = x.detach().masked_fill(~mask[..., None], float("nan"))
    return hidden.nanmedian(1, keepdim=True).values.nan_to_num(0.0)
