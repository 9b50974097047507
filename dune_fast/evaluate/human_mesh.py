"""Metrics of human mesh recovery: who was found, and how far off their meshes are, in millimetres.

People of an image are matched by their joints in the image. Walking through all pairs by ascending cost, the largest
singular value of the joints' difference [J, 2], a pair of two free people whose boxes overlap (IoU >= 0.05) is a match.

PVE: mean distance of vertices, each mesh minus its pelvis. PA-PVE: after the similarity that fits prediction to truth
best. MPJPE and PA-MPJPE: the same of joints.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

IOU = 0.05
H36M_TO_14 = (6, 5, 4, 1, 2, 3, 16, 15, 14, 11, 12, 13, 8, 10)
"""Rows of a Human3.6M joint regressor [17, V] that MPJPE is of."""
_MM = 1000.0


def boxes_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of the boxes around joints [P, J, 2] and [Q, J, 2] in pixels, [P, Q]; a box of one pixel has the side 1."""
    (low_a, high_a), (low_b, high_b) = ((x.amin(1), x.amax(1)) for x in (a, b))
    low, high = torch.maximum(low_a[:, None], low_b), torch.minimum(high_a[:, None], high_b)
    inter = (high - low + 1).clamp(min=0).prod(-1)
    area_a, area_b = (high_a - low_a + 1).prod(-1), (high_b - low_b + 1).prod(-1)
    return inter / (area_a[:, None] + area_b - inter)


def match_people(found: Tensor, truth: Tensor, iou: float = IOU) -> Tensor:
    """Pairs (prediction, truth) [M, 2] int64 of joints [P, J, 2] and [T, J, 2] in pixels, sorted by the cost."""
    if not len(found) or not len(truth):
        return torch.zeros(0, 2, dtype=torch.int64)
    found, truth = found.double().cpu(), truth.double().cpu()
    costs = torch.linalg.matrix_norm(found[:, None] - truth, ord=2)  # [P, T]
    overlaps = boxes_iou(found, truth)
    pairs: list[tuple[int, int]] = []
    failures = 0
    for k in costs.flatten().argsort(stable=True).tolist():
        i, j = divmod(k, len(truth))
        if overlaps[i, j] < iou:
            failures += 1
        elif all(i != p and j != t for p, t in pairs):
            pairs.append((i, j))
        if len(pairs) == len(truth) or len(pairs) + failures >= len(found):
            break
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def fit_similarity(source: Tensor, target: Tensor) -> Tensor:
    """`source` [..., N, 3] after the rotation, scale and translation that bring it closest to `target`, no reflection.

    Umeyama, PAMI 1991, in float64.
    """
    source, target = source.double(), target.double()
    mean_s, mean_t = source.mean(-2, keepdim=True), target.mean(-2, keepdim=True)
    s, t = source - mean_s, target - mean_t
    u, values, vh = torch.linalg.svd(s.transpose(-1, -2) @ t)  # s^T t = u values vh
    sign = torch.ones_like(values)
    sign[..., -1] = torch.sign(torch.linalg.det(u @ vh))
    rotation = (u * sign[..., None, :]) @ vh  # row vectors: s @ rotation
    scale = (values * sign).sum(-1) / s.square().sum((-2, -1)).clamp(min=1e-30)
    return scale[..., None, None] * (s @ rotation) + mean_t


def mean_distances(found: Tensor, truth: Tensor, aligned: bool) -> Tensor:
    """[M] mm: mean distance of points [M, N, 3] in metres; with `aligned` after `fit_similarity`."""
    found = fit_similarity(found, truth) if aligned else found.double()
    return _MM * torch.linalg.vector_norm(found - truth.double(), dim=-1).mean(-1)


def regress_joints(vertices: Tensor, regressor: Tensor) -> Tensor:
    """[M, 14, 3] of pelvis-centred vertices [M, V, 3] by a Human3.6M regressor [17, V], minus its joint 0."""
    joints = regressor.double() @ vertices.double()
    return (joints - joints[:, :1])[:, list(H36M_TO_14)]


@dataclass
class Counts:
    """Of people over a data set."""

    truth: int = 0
    misses: int = 0
    false_positives: int = 0

    def add(self, found: int, truth: int, matches: int) -> None:
        """One image."""
        self.truth += truth
        self.misses += truth - matches
        self.false_positives += found - matches

    def scores(self) -> dict[str, float]:
        """Precision, recall and F1 in percent, rounded to whole ones as published; 0 if nobody was found."""
        hits = self.truth - self.misses
        if hits == 0:
            return {"precision": 0.0, "recall": 0.0, "f1": 0.0}
        wrong = self.false_positives
        parts = {"precision": hits / (hits + wrong), "recall": hits / (hits + self.misses),
                 "f1": hits / (hits + (wrong + self.misses) / 2)}  # fmt: skip
        return {name: 100 * round(value, 2) for name, value in parts.items()}


@dataclass
class MeshErrors:
    """Metrics over a data set, image by image.

    Args:
        joint_regressor: [17, V] of Human3.6M for MPJPE; None leaves it out.
    """

    joint_regressor: Tensor | None = None
    counts: Counts = field(default_factory=Counts)
    errors: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> millimetres of every match."""

    def add(self, found: tuple[Tensor, Tensor, Tensor], truth: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """One image; returns its matches [M, 2].

        Args:
            found, truth: vertices [P, V, 3] and pelvis [P, 3] in metres, joints in the image [P, J, 2].
        """
        pairs = match_people(found[2], truth[2])
        self.counts.add(len(found[2]), len(truth[2]), len(pairs))
        if len(pairs):
            ours, theirs = (
                (x[0] - x[1][:, None])[i] for x, i in ((found, pairs[:, 0]), (truth, pairs[:, 1]))
            )
            self.keep("pve", ours, theirs)
            if self.joint_regressor is not None:
                self.keep("mpjpe", *(regress_joints(x, self.joint_regressor) for x in (ours, theirs)))
        return pairs

    def keep(self, name: str, found: Tensor, truth: Tensor) -> None:
        """Adds the distances of matched points [M, N, 3], as NAME and aligned as pa_NAME."""
        for prefix, aligned in (("", False), ("pa_", True)):
            self.errors.setdefault(prefix + name, []).extend(mean_distances(found, truth, aligned).tolist())

    def result(self) -> dict[str, float]:
        """Means in millimetres over all matches; precision, recall and F1 in percent."""
        means = {name: sum(values) / len(values) for name, values in self.errors.items() if values}
        return {**means, **self.counts.scores()}
