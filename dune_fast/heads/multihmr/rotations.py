"""Rotations as six numbers, as matrices and as axis-angle vectors.

Six numbers (a1, a2), Zhou et al., CVPR 2019: x = a1 / |a1|, y = a2 - (x . a2) x, normalised, z = x cross y; the matrix
has the columns x, y, z. Axis-angle r: axis r / |r|, angle |r| in radians.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALL = 1e-3  # radians; below it the series' next term is under float32's rounding


def matrix_from_six(six: Tensor) -> Tensor:
    """[..., 6] -> [..., 3, 3], the first three numbers towards the first column."""
    first, second = six[..., :3], six[..., 3:]
    x = F.normalize(first, dim=-1)
    y = F.normalize(second - (x * second).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y, dim=-1)], -1)


def skew(r: Tensor) -> Tensor:
    """[..., 3] -> [..., 3, 3] with skew(r) v = r cross v."""
    x, y, z = r.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [torch.stack(row, -1) for row in ((zero, -z, y), (z, zero, -x), (-y, x, zero))]
    return torch.stack(rows, -2)


def matrix_from_axis_angle(r: Tensor) -> Tensor:
    """Rodrigues' formula, [..., 3] radians -> [..., 3, 3]; smooth at zero, where its gradient exists, too."""
    square = (r * r).sum(-1)[..., None, None]
    small = square < _SMALL**2
    angle = torch.where(small, torch.ones_like(square), square).sqrt()
    first = torch.where(small, 1 - square / 6, angle.sin() / angle)
    second = torch.where(small, 0.5 - square / 24, 2 * ((angle / 2).sin() / angle) ** 2)
    k = skew(r)
    return torch.eye(3, dtype=r.dtype, device=r.device) + first * k + second * (k @ k)


def axis_angle_from_matrix(matrix: Tensor) -> Tensor:
    """[..., 3, 3] -> [..., 3] with an angle in [0, pi]; stable at both ends. Of the two at pi, one."""
    m = matrix
    trace = m.diagonal(dim1=-2, dim2=-1).sum(-1)
    xx, yy, zz = m.diagonal(dim1=-2, dim2=-1).unbind(-1)
    # the outer product of the quaternion (w, x, y, z) with itself, times four; its largest column is the best one
    a, b, c = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    d, e, f = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    columns = torch.stack(
        [
            torch.stack([1 + trace, a, b, c], -1),
            torch.stack([a, 1 + xx - yy - zz, d, e], -1),
            torch.stack([b, d, 1 - xx + yy - zz, f], -1),
            torch.stack([c, e, f, 1 - xx - yy + zz], -1),
        ],
        -2,
    )  # [..., 4, 4], symmetric
    best = columns.diagonal(dim1=-2, dim2=-1).argmax(-1)
    q = columns.gather(-2, best[..., None, None].expand(*best.shape, 1, 4))[..., 0, :]
    q = F.normalize(q, dim=-1)
    q = torch.where(q[..., :1] < 0, -q, q)
    length = torch.linalg.vector_norm(q[..., 1:], dim=-1, keepdim=True)
    small = length < 1e-7
    angle = 2 * torch.atan2(length, q[..., :1])
    return q[..., 1:] * torch.where(small, torch.full_like(length, 2.0), angle / torch.where(small, 1.0, length))
