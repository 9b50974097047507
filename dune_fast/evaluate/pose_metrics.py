"""How far off poses are: angles, lengths, reprojections, and what shares of them are good enough. In float64.

A pose is a rotation R and a translation t that take points of the world (or of a first camera) to a camera:
x_camera = R x + t. Quaternions are (w, x, y, z).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

POSE_THRESHOLDS = (5, 15, 30)
"""Degrees, of RRA and RTA."""
MAA_THRESHOLDS = (5, 10, 30)
"""Degrees up to which mAA averages."""


def query_points() -> Tensor:
    """The 196 points of VCRE in the query's camera, metres: a grid 1.8 m wide, 0.9 m high, 1.8 to 3.6 m away."""
    x, y, z = (torch.linspace(*span, dtype=torch.float64) for span in ((-0.9, 0.9, 7), (-0.45, 0.45, 4), (1.8, 3.6, 7)))
    return torch.cartesian_prod(x, y, z)


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """[..., 4] of any length but 0 -> [..., 3, 3]."""
    w, x, y, z = (quaternion.double() / quaternion.double().norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def matrix_to_quaternion(rotation: Tensor) -> Tensor:
    """[..., 3, 3] -> [..., 4] of length 1 with w >= 0, by the largest of its parts, so that nothing cancels."""
    r = rotation.double()
    xx, yy, zz = r[..., 0, 0], r[..., 1, 1], r[..., 2, 2]
    a, b, c = (r[..., i, j] - r[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0)))
    d, e, f = (r[..., i, j] + r[..., j, i] for i, j in ((0, 1), (0, 2), (1, 2)))
    # 4 q q^T, a row for each part
    square = torch.stack([
        1 + xx + yy + zz, a, b, c, a, 1 + xx - yy - zz, d, e, b, d, 1 - xx + yy - zz, f, c, e, f, 1 - xx - yy + zz
    ], -1).unflatten(-1, (4, 4))  # fmt: skip
    largest = square.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row = square.gather(-2, largest[..., None, None].expand(*largest.shape, 1, 4)).squeeze(-2)
    unit = row / row.norm(dim=-1, keepdim=True)
    return torch.where(unit[..., :1] < 0, -unit, unit)


def rotation_errors(estimated: Tensor, true: Tensor) -> Tensor:
    """Degrees between rotations [..., 3, 3], from 0 to 180: 2 asin |vec(q)| of the quaternion q between them."""
    q = matrix_to_quaternion(estimated.double().transpose(-1, -2) @ true.double())
    return torch.rad2deg(2 * torch.asin(q[..., 1:].norm(dim=-1).clamp(max=1)))


def direction_errors(estimated: Tensor, true: Tensor) -> Tensor:
    """Degrees between translations [..., 3], blind to sign and length, from 0 to 90; 90 for a length of 0."""
    a, b = estimated.double(), true.double()
    length = a.norm(dim=-1) * b.norm(dim=-1)
    cosine = (a * b).sum(-1).abs() / length.where(length > 0, 1)
    return torch.rad2deg(torch.acos(cosine.clamp(max=1)))


def centres(rotation: Tensor, translation: Tensor) -> Tensor:
    """Where the cameras of poses [..., 3, 3] and [..., 3] are in the world, [..., 3]."""
    return -(rotation.double().transpose(-1, -2) @ translation.double()[..., None])[..., 0]


def reprojection_errors(
    estimated: tuple[Tensor, Tensor], true: tuple[Tensor, Tensor], intrinsics: Tensor, size: Tensor
) -> Tensor:
    """VCRE [F]: the mean distance in pixels of `query_points` projected by the true and by the estimated pose.

    Arnold et al., "Map-free Visual Relocalization", ECCV 2022. A point goes from the query's camera through the true
    pose to the world and through the estimated one back; both projections are clipped to the image.

    Args:
        estimated, true: rotations [F, 3, 3] and translations [F, 3] of the queries, world to camera.
        intrinsics: [F, 4], fx, fy, cx, cy in pixels.
        size: [F, 2], width and height in pixels.
    """
    points = query_points()
    (r_true, t_true), (r, t) = ((a.double(), b.double()[:, None]) for a, b in (true, estimated))
    moved = (points - t_true) @ r_true @ r.transpose(-1, -2) + t  # rows: R (R_true^T (x - t_true)) + t, [F, 196, 3]

    def project(x: Tensor) -> Tensor:
        pixels = x[..., :2] / x[..., 2:] * intrinsics[:, None, :2] + intrinsics[:, None, 2:]
        # a point on the camera's own plane has no projection: the division gives infinities, which are clipped
        return torch.minimum(pixels.nan_to_num(nan=0.0).clamp(min=0), size[:, None].double())

    return (project(points.expand_as(moved)) - project(moved)).norm(dim=-1).mean(-1)


def precision_and_auc(confidences: Tensor, accepted: Tensor, missing: int) -> tuple[float, float]:
    """Share of good estimates among all frames, and the area under precision over recall as confidence falls.

    Equal confidences are one step of the curve. A frame without an estimate counts against both.

    Args:
        confidences: [F] of the estimates.
        accepted: bool [F], whether an estimate is good enough.
        missing: frames without an estimate.
    """
    count, total = len(confidences), len(confidences) + missing
    if not count:
        return 0.0, 0.0
    order = confidences.argsort(descending=True, stable=True)
    sorted_confidences, good = confidences[order], accepted[order].double().cumsum(0)
    last = torch.ones(count, dtype=torch.bool)
    last[:-1] = sorted_confidences[1:] != sorted_confidences[:-1]
    at = last.nonzero()[:, 0]
    precision, recall = good[at] / (at + 1), (at + 1).double() / total
    steps = recall.diff(prepend=recall.new_zeros(1))
    return float(good[-1] / total), float((precision * steps).sum())


def pose_accuracies(rotation: Tensor, translation: Tensor) -> dict[str, float]:
    """RRA, RTA and mAA, in [0, 1], of errors in degrees; a missing estimate has an infinite error.

    RRA@t and RTA@t are the shares of pairs whose rotation or translation is less than t degrees off; mAA(T) is the mean
    over t = 1 .. T of the share in which both are.

    Args:
        rotation, translation: [F], see `rotation_errors` and `direction_errors`.
    """
    worse = torch.maximum(rotation, translation)

    def share(errors: Tensor, below: Sequence[float]) -> float:
        return torch.stack([(errors < t).double().mean() for t in below]).mean().item()

    found = {f"RRA@{t}": share(rotation, [t]) for t in POSE_THRESHOLDS}
    found |= {f"RTA@{t}": share(translation, [t]) for t in POSE_THRESHOLDS}
    return found | {f"mAA({t})": share(worse, range(1, t + 1)) for t in MAA_THRESHOLDS}
