"""Pinhole cameras: intrinsics, rays of patches, depth from the head's value, projection.

K [3, 3] is in pixels of the square image of side S that the encoder sees. Points are in the camera's frame, metres.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FOV = 60.0
"""Degrees of the field of view that depths are normalised to, and that an uncalibrated image is taken to have."""

NEAREST = 1e-6  # metres; closer than this a point is projected as if it were here


def default_intrinsics(side: int, fov: float = FOV) -> Tensor:
    """K [3, 3] of a square image without calibration: the principal point in the middle, rounded down.

    ValueError if the field of view is not between 0 and 180 degrees.
    """
    if not 0 < fov < 180:
        raise ValueError(f"fov {fov:g}: give the field of view in degrees, between 0 and 180, or intrinsics")
    focal = side / (2 * math.tan(math.radians(fov) / 2))
    return torch.tensor([[focal, 0.0, side // 2], [0.0, focal, side // 2], [0.0, 0.0, 1.0]])


def inverse(intrinsics: Tensor) -> Tensor:
    """K^-1 [B, 3, 3] in float32, without waiting for the device."""
    return torch.linalg.inv_ex(intrinsics.float())[0]


def camera_embedding(intrinsics: Tensor, grid: int, patch_size: int, bands: int, max_resolution: int) -> Tensor:
    """Fourier features of every patch's ray, [B, grid, grid, 3 + 6 bands]: ray, sines, cosines.

    The ray is K^-1 (row, column, 1): published weights were trained with rows in place of columns, and the other way
    round.
    """
    steps = torch.arange(grid, device=intrinsics.device, dtype=torch.float32) * patch_size + patch_size // 2
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    points = torch.stack([rows, columns, torch.ones_like(rows)], -1)  # [g, g, 3]
    rays = (inverse(intrinsics)[:, None, None] @ points[..., None])[..., 0]  # [B, g, g, 3]
    frequencies = torch.linspace(1.0, max_resolution / 2, bands, device=rays.device)
    angles = (rays[..., None] * frequencies).flatten(-2) * math.pi
    return torch.cat([rays, angles.sin(), angles.cos()], -1)


def focal_ratio(intrinsics: Tensor, side: int) -> Tensor:
    """f / fn [B]: the image's focal length over that of a field of view of 60 degrees."""
    return intrinsics[:, 0, 0] * (2 * math.tan(math.radians(FOV) / 2) / side)


def depth_of(value: Tensor, ratio: Tensor, nearness: bool, nearest: float = 0.0, farthest: float = 50.0) -> Tensor:
    """Metres along the optical axis [P], of the head's value [P] and `focal_ratio` [P], clamped to the two limits.

    Args:
        nearness: whether the value is the depth's logarithm.
    """
    if not nearness:
        return (value * ratio).clamp(nearest, farthest)
    # beyond the clamp exp would overflow, and its gradient be 0 x infinity
    logarithm = (value * ratio).clamp(max=math.log(farthest) + 1)
    return (logarithm.exp() - 1e-10).clamp(nearest, farthest)


def value_of(depth: Tensor, ratio: Tensor, nearness: bool) -> Tensor:
    """The inverse of `depth_of`."""
    return (depth + 1e-10).log() / ratio if nearness else depth / ratio


def project(points: Tensor, intrinsics: Tensor) -> Tensor:
    """Pixels [P, n, 2] of points [P, n, 3], K [P, 3, 3]."""
    z = points[..., 2:]
    plane = points / torch.where(z.abs() < NEAREST, torch.full_like(z, NEAREST), z)
    return (plane @ intrinsics.transpose(-1, -2))[..., :2]


def unproject(pixels: Tensor, depth: Tensor, inverse_intrinsics: Tensor) -> Tensor:
    """Points [P, 3] at pixels [P, 2] and depths [P], K^-1 [P, 3, 3]."""
    homogeneous = torch.cat([pixels, torch.ones_like(pixels[:, :1])], -1)
    return depth[:, None] * (inverse_intrinsics @ homogeneous[..., None])[..., 0]
