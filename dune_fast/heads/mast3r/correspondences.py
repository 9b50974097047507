"""Which pixels of two posed depth maps show the same point, and which are shown to a head as correspondences.

Pixel (x, y) with integer coordinates is a pixel's centre. A point: X = ((x - cx) z / fx, (y - cy) z / fy, z), then the
camera-to-world pose. Depth z is along the optical axis; 0 is unknown, below 0 is sky.
"""

from __future__ import annotations

import numpy as np


def back_project(depth: np.ndarray, intrinsics: np.ndarray, pose: np.ndarray | None = None) -> np.ndarray:
    """Points [H, W, 3] of a depth map [H, W], in the world, or in the camera without a pose."""
    height, width = depth.shape
    x = (np.arange(width, dtype=depth.dtype) - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (np.arange(height, dtype=depth.dtype) - intrinsics[1, 2]) / intrinsics[1, 1]
    points = np.stack([x[None, :] * depth, y[:, None] * depth, depth], -1)
    return points if pose is None else points @ pose[:3, :3].T + pose[:3, 3]


def project(points: np.ndarray, intrinsics: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (x, y) [..., 2] and depths [...] of world points [..., 3]; a point in the camera's plane is not finite."""
    in_camera = (points - pose[:3, 3]) @ pose[:3, :3]
    depth = in_camera[..., 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        xy = in_camera[..., :2] / depth[..., None]
    focal, centre = intrinsics[[0, 1], [0, 1]], intrinsics[:2, 2]
    return xy * focal + centre, depth


def nearest_pixels(points: np.ndarray, intrinsics: np.ndarray, pose: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Flat index y * W + x [N] of the pixel of an image of size (H, W) that each point [..., 3] falls on.

    Points outside take the nearest pixel of the border, points in the camera's plane pixel 0.
    """
    height, width = size
    xy, _ = project(points.reshape(-1, 3), intrinsics, pose)
    finite = np.isfinite(xy).all(-1)
    xy = np.rint(np.where(finite[:, None], xy, 0.0)).clip(0, (width - 1, height - 1)).astype(np.int64)
    return xy[:, 1] * width + xy[:, 0]


def mutual(there: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Indices [M] of view 1, ascending, that `back` [N2] sends back to where `there` [N1] sent them from."""
    return np.flatnonzero(back[there] == np.arange(len(there)))


def correspondences(
    points1: np.ndarray, points2: np.ndarray, intrinsics: tuple[np.ndarray, np.ndarray],
    poses: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Flat indices [M] of both views: all pixels that project onto each other.

    A pixel of unknown depth counts as a point, and nothing is tested for being hidden; see `visible`.

    Args:
        points1, points2: world points [H, W, 3] of the views' pixels.
        intrinsics, poses: of views 1 and 2, 3x3 and 4x4 camera-to-world.
    """
    there = nearest_pixels(points1, intrinsics[1], poses[1], points2.shape[:2])
    back = nearest_pixels(points2, intrinsics[0], poses[0], points1.shape[:2])
    first = mutual(there, back)
    return first, there[first]


def visible(
    points1: np.ndarray, depth2: np.ndarray, intrinsics2: np.ndarray, pose2: np.ndarray, tolerance: float = 0.02
) -> np.ndarray:
    """Which points [..., 3] view 2 shows, bool [...]: inside, in front, and as far away as its depth map says.

    Args:
        tolerance: allowed difference of the depths, as a share of the depth.
    """
    xy, depth = project(points1, intrinsics2, pose2)
    inside = np.isfinite(xy).all(-1) & (depth > 0)
    x, y = np.rint(np.where(inside[..., None], xy, -1.0)).astype(np.int64).transpose(-1, *range(xy.ndim - 1))
    inside &= (x >= 0) & (x < depth2.shape[1]) & (y >= 0) & (y < depth2.shape[0])
    there = depth2[np.where(inside, y, 0), np.where(inside, x, 0)]
    return inside & (there > 0) & (np.abs(there - depth) <= tolerance * depth)


def sample(
    found: tuple[np.ndarray, np.ndarray], sizes: tuple[tuple[int, int], tuple[int, int]], n: int, negatives: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """n correspondences: true ones, and pixels that have no partner as wrong ones.

    Args:
        found: flat indices [M] of both views, all true correspondences.
        sizes: (H, W) of both views.
        n: how many; true ones beyond a share of 1 - negatives only where too few pixels have no partner.
        negatives: share of wrong ones; more where too few are true.
        rng: draws them.

    Returns:
        (x, y) of both views, int64 [n, 2] each, and which are true, bool [n]; in random order.
    """
    free = [np.setdiff1d(np.arange(h * w), index) for index, (h, w) in zip(found, sizes, strict=True)]
    true = min(len(found[0]), round(n * (1 - negatives)))
    wrong = min(n - true, *(len(pixels) for pixels in free))
    if true + wrong < n and len(found[0]):
        true = n - wrong
    wrong = n - true
    chosen = _draw(len(found[0]), true, rng)
    picks = [np.concatenate([index[chosen], pixels[_draw(len(pixels), wrong, rng)]])
             for index, pixels in zip(found, free, strict=True)]  # fmt: skip
    order = rng.permutation(n)
    xy = [np.stack([pick[order] % w, pick[order] // w], -1) for pick, (_, w) in zip(picks, sizes, strict=True)]
    return xy[0], xy[1], order < true


def _draw(available: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices below `available`, without repetition as far as they go."""
    whole = [rng.permutation(available) for _ in range(-(-count // max(available, 1)))]
    return np.concatenate([np.zeros(0, np.int64), *whole])[:count]
