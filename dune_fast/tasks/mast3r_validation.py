"""What a MASt3R head is measured by: pointmaps, matches and poses of pairs whose depth and poses are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dune_fast.evaluate.pose_metrics import rotation_errors
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.head import Head
from dune_fast.heads.mast3r.correspondences import back_project, correspondences, project, sample, visible
from dune_fast.heads.mast3r.crops import PosedView, resize_and_cut
from dune_fast.heads.mast3r.loss import held_out_metrics
from dune_fast.heads.mast3r.matching import nearest, symmetric
from dune_fast.heads.mast3r.pair_folders import PairFolder
from dune_fast.heads.mast3r.pairs import PairDataConfig
from dune_fast.heads.mast3r.pose import pnp
from dune_fast.heads.tokens import EncoderTokens
from dune_fast.kernels.augment import augment_colour

MEANS = ("points", "points_invariant", "average_precision", "match_5px")
MEDIANS = ("match_px", "rotation_deg", "direction_deg", "translation_m")
"""Over the pairs."""
_QUERIES, _STEP = 8, 4
"""Pixels between queries of the matches' errors, and between start pixels of the pose's matches."""
_NO_POSE = (180.0, 180.0, float("inf"))


@torch.no_grad()
def measure(
    head: Head, encoder: Callable[[Tensor], EncoderTokens], folder: PairFolder, cfg: PairDataConfig, ranks: Ranks
) -> dict[str, float]:
    """Metrics of all pairs of a data set, cut from the middle to the first of `cfg.sizes`.

    Returns:
        Means over pairs: `points` and `points_invariant`, the pointmaps' mean distances (both views added, the second
        with scale and shift taken out), `average_precision` of the descriptors, `match_5px`, the share of matches less
        than 5 pixels off. Medians over pairs: `match_px`, a pair's median error of the nearest
        descriptor, in pixels; of the pose by PnP `rotation_deg`, `direction_deg`, the angle between the translations,
        0 to 180, and `translation_m`; 180, 180 and inf where there is no pose. Pairs without depth count for the pose
        alone; a metric that no pair counts for is left out.
    """
    table = torch.zeros(len(folder), len(MEANS) + len(MEDIANS), dtype=torch.float64, device=ranks.device)
    for index in ranks.share(f"evaluating on {folder.name}", len(folder)):
        views = [_cut(view, tuple(cfg.sizes[0])) for view in folder.read(index)]
        table[index] = torch.tensor(measure_pair(head, encoder, *views, cfg.n_corres, ranks.device), dtype=table.dtype)
    found = {}
    for name, column in zip((*MEANS, *MEDIANS), ranks.add(table).cpu().numpy().T, strict=True):
        if len(known := column[~np.isnan(column)]):
            found[name] = float((np.mean if name in MEANS else np.median)(known))
    return found


def measure_pair(
    head: Head, encoder: Callable[[Tensor], EncoderTokens], first: PosedView, second: PosedView, n_corres: int,
    device: torch.device,
) -> list[float]:  # fmt: skip
    """The metrics of one pair, in the order of MEANS and MEDIANS; nan for what a pair without depth does not tell."""
    views = (first, second)
    tokens = [encoder(augment_colour(torch.from_numpy(v.image)[None].to(device), None)) for v in views]
    pred1, pred2 = head(*tokens)
    pose = pose_errors(pred1, pred2, first, second)
    if not all((view.depth > 0).any() for view in views):
        return [math.nan] * (len(MEANS) + 1) + [*pose]
    points = [back_project(v.depth, v.intrinsics, v.pose) for v in views]
    gts = _truth(views, points, n_corres, device)
    # as many negatives as the published test takes, or all there are
    found = held_out_metrics(*gts, pred1, pred2, max(0, min(12288, second.depth.size - n_corres)))
    errors = match_errors(pred1["desc"][0], pred2["desc"][0], points[0], first, second)
    means = [float(found[name]) for name in MEANS[:3]]
    return [*means, float((errors < 5).mean()), float(np.median(errors)), *pose]


def match_errors(
    desc1: Tensor, desc2: Tensor, points1: np.ndarray, first: PosedView, second: PosedView
) -> np.ndarray:
    """Pixels [M] between where a point of the first view is in the second one and where its descriptor is found.

    Of a grid of pixels whose points the second view shows; [inf] where there is none.
    """
    grid = np.s_[_QUERIES // 2 :: _QUERIES, _QUERIES // 2 :: _QUERIES]
    seen = visible(points1[grid], second.depth, second.intrinsics, second.pose) & (first.depth[grid] > 0)
    if not seen.any():
        return np.array([np.inf])
    wanted, _ = project(points1[grid][seen], second.intrinsics, second.pose)
    queries = desc1[grid][torch.from_numpy(seen).to(desc1.device)]
    at = nearest(queries, desc2.flatten(0, 1)).cpu().numpy()
    width = desc2.shape[1]
    return np.linalg.norm(np.stack([at % width, at // width], 1) - wanted, axis=1)


def pose_errors(
    pred1: dict[str, Tensor], pred2: dict[str, Tensor], first: PosedView, second: PosedView
) -> tuple[float, float, float]:
    """How far the second camera's pose in the first one's frame is off, by PnP, see `off`."""
    matches = symmetric(pred1["desc"][0], pred2["desc"][0], pred1["desc_conf"][0], pred2["desc_conf"][0], _STEP)
    x, y = matches.xy1.unbind(1)
    found = pnp(pred1["pts3d"][0][y, x].cpu().numpy(), matches.xy2.cpu().numpy(), second.intrinsics)
    if found.camera_to_world is None:
        return _NO_POSE
    return off(found.camera_to_world, np.linalg.inv(first.pose.astype(np.float64)) @ second.pose)


def off(found: np.ndarray, true: np.ndarray) -> tuple[float, float, float]:
    """How far a camera's pose [4, 4] is off: degrees of rotation, degrees between the translations, and metres.

    A translation of zero has no direction: it is 90 degrees off, as far as one at random.
    """
    rotation = rotation_errors(*(torch.from_numpy(pose[:3, :3].copy()) for pose in (found, true)))
    a, b = found[:3, 3], true[:3, 3]
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    angle = np.degrees(np.arccos(np.clip(a @ b / lengths, -1, 1))) if lengths > 0 else 90.0
    return float(rotation), float(angle), float(np.linalg.norm(a - b))


def _cut(view: PosedView, size: tuple[int, int]) -> PosedView:
    """The view's middle; a portrait image is cut to the turned size."""
    return resize_and_cut(view, size[::-1] if view.size[1] > view.size[0] else size)


def _truth(
    views: tuple[PosedView, PosedView], points: list[np.ndarray], n: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """What the losses need, of a batch of one pair in metres; the correspondences are drawn with one seed."""
    cameras = zip(*((v.intrinsics, v.pose) for v in views), strict=True)
    *xy, true = sample(
        correspondences(points[0], points[1], *cameras), tuple(v.depth.shape for v in views), n, 0.5,
        np.random.default_rng(0),
    )  # fmt: skip
    found = []
    for i, view in enumerate(views):
        arrays = {
            "pts3d": points[i].astype(np.float32), "valid_mask": view.depth > 0, "sky_mask": view.depth < 0,
            "camera_pose": view.pose, "corres": xy[i], "valid_corres": true,
        }  # fmt: skip
        tensors = {name: torch.from_numpy(np.ascontiguousarray(x))[None].to(device) for name, x in arrays.items()}
        found.append(tensors | {"is_metric_scale": torch.ones(1, dtype=torch.bool, device=device)})
    return found
