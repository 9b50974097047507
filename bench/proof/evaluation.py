"""What frozen features are worth: classes by neighbours, foreground by a linear probe, points found again.

    knn      accuracy over the classes of held-out cut-outs; neighbours are composites of training cut-outs
    iou      intersection over union of the foreground, summed over the images, of logits w . patch + b at pixel level
    match    share of patches of a left image whose nearest right patch (cosine) lies within one patch of where the
             measured disparity puts it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dune_fast.evaluate.knn import knn_predict
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD

Features = tuple[Tensor | None, Tensor]
"""cls [B, D], or None where there is none, and patch tokens [B, N, D]."""
Encoder = Callable[[Tensor], Features]
"""Of ImageNet-normalised images [B, 3, S, S]; the grid of patches is square."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Sizes of the measurements."""

    size: int = 112
    """Side of the scenes, in pixels."""
    batch: int = 32
    neighbours: int = 20
    probe_penalty: float = 1e-3
    """Of the probe's squared weights."""
    stereo_size: int = 224
    """Side of a view of the stereo pair."""
    stereo_window: int = 280
    """Pixels of the pair (500 x 741) that a view shows."""
    stereo_views: int = 24


def read_image(path: Path, size: int) -> Tensor:
    """ImageNet-normalised [3, size, size]."""
    with Image.open(path) as image:
        return normalised(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def normalised(image: Image.Image) -> Tensor:
    """ImageNet-normalised [3, H, W] of an RGB image."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


@torch.inference_mode()
def extract(encoder: Encoder, paths: list[Path], cfg: EvaluationConfig) -> Features:
    """Features of all images, float32."""
    parts = []
    for start in range(0, len(paths), cfg.batch):
        cls, patch = encoder(torch.stack([read_image(path, cfg.size) for path in paths[start : start + cfg.batch]]))
        parts.append((None if cls is None else cls.float(), patch.float()))
    cls = None if parts[0][0] is None else torch.cat([c for c, _ in parts])
    return cls, torch.cat([patch for _, patch in parts])


def evaluate(encoder: Encoder, scenes: Path, stereo: Path, cfg: EvaluationConfig) -> dict[str, float]:
    """All measurements.

    Args:
        encoder: frozen.
        scenes: folder of `bench.proof.scenes.make_scenes`.
        stereo: folder with motorcycle_left.png, motorcycle_right.png and motorcycle_disp.npz.
    """
    bank, test = (sorted((scenes / part).rglob("*.jpg")) for part in ("bank", "test"))
    classes = sorted({path.parent.name for path in bank})
    labels = [torch.tensor([classes.index(path.parent.name) for path in paths]) for paths in (bank, test)]
    with torch.inference_mode():
        bank_features, test_features = extract(encoder, bank, cfg), extract(encoder, test, cfg)
    values = {}
    pooled = {"cls": [f[0] for f in (test_features, bank_features)]} if bank_features[0] is not None else {}
    pooled["patch"] = [f[1].mean(1) for f in (test_features, bank_features)]
    for name, (queries, neighbours) in pooled.items():
        found = knn_predict(queries, neighbours, labels[0], len(classes), cfg.neighbours)
        values[f"knn_{name}"] = (found == labels[1]).double().mean().item()
    w, b = fit_probe(bank_features[1], patch_shares(mask_paths(scenes, "bank", bank), bank_features[1]), cfg)
    logits = [features[1] @ w + b for features in (bank_features, test_features)]
    threshold = best_threshold(logits[0], mask_paths(scenes, "bank", bank))
    values["iou"] = foreground_iou(logits[1], mask_paths(scenes, "test", test), threshold)
    values["match"] = stereo_matching(encoder, stereo, cfg)
    return values


def mask_paths(scenes: Path, part: str, paths: list[Path]) -> list[Path]:
    """The masks of images of a part."""
    return [scenes / f"{part}_masks" / path.parent.name / f"{path.stem}.png" for path in paths]


def _mask(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)) > 127


def patch_shares(masks: list[Path], patches: Tensor) -> Tensor:
    """Share of foreground of every patch, float32 [B, N]."""
    side = round(patches.shape[1] ** 0.5)
    return torch.stack([F.adaptive_avg_pool2d(_mask(path).float()[None], side).flatten() for path in masks])


def fit_probe(patches: Tensor, shares: Tensor, cfg: EvaluationConfig) -> tuple[Tensor, Tensor]:
    """Logistic regression with a squared penalty, by L-BFGS on standardised tokens.

    Args:
        patches: [B, N, D].
        shares: [B, N], targets between 0 and 1.

    Returns:
        w [D] and b [], of the tokens as they are.
    """
    x, y = patches.flatten(0, 1), shares.flatten()
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / std
    w = torch.zeros(x.shape[1], requires_grad=True)
    b = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ w + b, y) + cfg.probe_penalty * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    w = w.detach() / std
    return w, b.detach() - w @ mean


def best_threshold(logits: Tensor, masks: list[Path]) -> float:
    """The logit above which the foreground's IoU is largest on these images, of 19 quantiles.

    A probe that is unsure everywhere, as on features of an untrained network, would find nothing above 0.
    """
    thresholds = logits.flatten().quantile(torch.arange(0.05, 1.0, 0.05)).tolist()
    return max(thresholds, key=lambda threshold: foreground_iou(logits[::4], masks[::4], threshold))


def foreground_iou(logits: Tensor, masks: list[Path], threshold: float) -> float:
    """Of logits [B, N], resized bilinearly to the masks; intersections and unions are summed over the images."""
    side = round(logits.shape[1] ** 0.5)
    intersection = union = 0
    for row, path in zip(logits.unflatten(1, (side, side)), masks, strict=True):
        mask = _mask(path)
        found = F.interpolate(row[None, None], mask.shape, mode="bilinear")[0, 0] > threshold
        intersection += (found & mask).sum().item()
        union += (found | mask).sum().item()
    return intersection / union


def stereo_views(folder: Path, cfg: EvaluationConfig) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pairs of windows of the stereo pair, each at a place of its own, so that no position gives a match away.

    Yields:
        left and right view [3, S, S], and where the centre of every point of the left view is in the right one: x and y
        in pixels of the view, [S, S, 2], NaN where no disparity was measured.
    """
    left, right = (Image.open(folder / f"motorcycle_{side}.png").convert("RGB") for side in ("left", "right"))
    with np.load(folder / "motorcycle_disp.npz") as archive:
        disparity = np.asarray(archive["arr_0"], np.float32)
    window, size = cfg.stereo_window, cfg.stereo_size
    rng = np.random.default_rng(0)
    # (n + 0.5) * scale - 0.5: pixel n of the view in the window
    at = (np.arange(size) + 0.5) * window / size
    for _ in range(cfg.stereo_views):
        y = int(rng.integers(left.height - window + 1))
        x = int(rng.integers(left.width - window + 1))
        shift = rng.integers(-window // 4, window // 4 + 1, 2)
        row = int(np.clip(y + shift[0], 0, left.height - window))
        # about the mean disparity to the left, so that the views overlap
        column = int(np.clip(x - 35 + shift[1], 0, left.width - window))
        views = [
            normalised(image.resize((size, size), Image.Resampling.BICUBIC, box=(u, v, u + window, v + window)))
            for image, u, v in ((left, x, y), (right, column, row))
        ]
        rows, columns = np.meshgrid(y + at, x + at, indexing="ij")
        d = disparity[rows.astype(int), columns.astype(int)]
        d[~np.isfinite(d)] = np.nan
        target = np.stack([(columns - d - column) * size / window, (rows - row) * size / window], -1)
        yield views[0], views[1], torch.from_numpy(target).float()


@torch.inference_mode()
def stereo_matching(encoder: Encoder, folder: Path, cfg: EvaluationConfig) -> float:
    """Share of left patches, among those whose match lies in the right view, that are found within a patch."""
    found = there = 0
    for left, right, target in stereo_views(folder, cfg):
        _, patches = encoder(torch.stack([left, right]))
        a, b = F.normalize(patches.float(), dim=-1)  # [N, D] each
        side = round(len(a) ** 0.5)
        step = cfg.stereo_size / side
        centre = ((torch.arange(side) + 0.5) * step).long()
        wanted = target[centre][:, centre].flatten(0, 1)  # [N, 2]
        inside = ((wanted >= 0) & (wanted < cfg.stereo_size)).all(1)  # false for NaN
        nearest = (a @ b.T).argmax(1)
        place = torch.stack([nearest % side, nearest // side], 1).add(0.5) * step
        found += ((place - wanted).norm(dim=1)[inside] <= step).sum().item()
        there += inside.sum().item()
    return found / there
