"""Resizing and cropping posed images with depth, so that camera and pixels stay consistent.

Pixel (x, y) with integer coordinates is a pixel's centre. Sizes are (width, height), boxes (left, top, right, bottom).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


class PosedView(NamedTuple):
    """An image with depth and camera."""

    image: np.ndarray
    """uint8 [H, W, 3]."""
    depth: np.ndarray
    """float32 [H, W], along the optical axis; 0: unknown, below 0: sky."""
    intrinsics: np.ndarray
    """[3, 3], in pixels."""
    pose: np.ndarray
    """[4, 4], camera-to-world."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.image.shape[1], self.image.shape[0]


def scaled_intrinsics(
    intrinsics: np.ndarray, scale: float | np.ndarray, offset: tuple[float, float] = (0, 0)
) -> np.ndarray:
    """Of an image resized by a factor (or one of x and one of y) and then cut at (left, top)."""
    scale, result = np.broadcast_to(scale, 2), np.array(intrinsics)
    result[:2, :2] *= scale[:, None]
    result[:2, 2] = (intrinsics[:2, 2] + 0.5) * scale - 0.5 - np.asarray(offset)
    return result


def covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[tuple[int, int], float]:
    """The smallest size of an image's shape that covers the target, and the factor to it."""
    scale = max(t / s for t, s in zip(target, size, strict=True)) + 1e-8
    return (int(size[0] * scale), int(size[1] * scale)), scale


def nearest_resize(depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map [H, W] resized to (width, height): pixel x takes pixel floor(x * old / new)."""
    columns, rows = (np.arange(new) * old // new for new, old in zip(size, depth.shape[::-1], strict=True))
    return depth[rows[:, None], columns]


def resize_and_cut(view: PosedView, target: tuple[int, int]) -> PosedView:
    """The view resized until it covers the target size, then its centre."""
    size, scale = covering_size(view.size, target)
    taken = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    image = np.array(Image.fromarray(view.image).resize(size, taken))
    left, top = ((s - t) // 2 for s, t in zip(size, target, strict=True))
    window = np.s_[top : top + target[1], left : left + target[0]]
    # what `resize` does: the factor of each axis is that of the whole sizes
    exact = np.array(size) / view.size
    intrinsics = scaled_intrinsics(view.intrinsics, exact, (left, top))
    return PosedView(image[window], nearest_resize(view.depth, size)[window], intrinsics, view.pose)


class Recentred(NamedTuple):
    """A camera turned so that a box of the old image becomes a new one with the principal point in its middle."""

    homography: np.ndarray
    """[3, 3], from new pixels to old ones."""
    intrinsics: np.ndarray
    rotation: np.ndarray
    """[3, 3], from the new camera to the old one."""


def recentre(intrinsics: np.ndarray, box: np.ndarray, target: tuple[int, int]) -> Recentred:
    """The turn to a box, which is rounded to whole pixels, shown in the target size."""
    box = np.rint(box)
    size = box[2:] - box[:2]
    new = np.array(intrinsics, np.float64)
    new[:2, 2] = size / 2
    # of each axis the side of the box that is farther from the principal point: there the turn shall be exact
    far = np.abs(box[2:] - intrinsics[:2, 2]) > np.abs(box[:2] - intrinsics[:2, 2])
    old_corner, new_corner = np.where(far, box[2:], box[:2]), np.where(far, size, 0.0)
    rays = [np.linalg.solve(k, [*c, 1.0]) for k, c in ((intrinsics, old_corner), (new, new_corner))]
    rotation = _turn_to(rays[0]) @ _turn_to(rays[1]).T
    new[[0, 1], [0, 1]] *= (np.array(target) / size).min()
    new[:2, 2] = np.array(target) / 2
    return Recentred(intrinsics @ rotation @ np.linalg.inv(new), new, rotation)


def _turn_to(ray: np.ndarray) -> np.ndarray:
    """The rotation that takes (0, 0, 1) to a ray's direction about the axis perpendicular to both."""
    x, y, z = ray / np.linalg.norm(ray)
    cross = np.array([[0, 0, x], [0, 0, y], [-x, -y, 0]])  # [axis]x of the axis (0, 0, 1) x ray
    return np.eye(3) + cross + cross @ cross / (1 + z)


def warp(view: PosedView, box: np.ndarray, target: tuple[int, int]) -> PosedView:
    """The view of a camera turned to a box; image bicubic, depth nearest, black and unknown outside."""
    turned = recentre(view.intrinsics, box, target)
    grid = np.stack([*np.meshgrid(*(np.arange(n) for n in target)), np.ones(target[::-1])], -1)  # [H, W, 3]
    at = grid @ turned.homography.T
    xy = at[..., :2] / at[..., 2:]
    # to [-1, 1] from the first pixel's centre to the last one's
    where = torch.from_numpy(2 * xy / (np.array(view.size) - 1) - 1).float()[None]
    image = torch.from_numpy(np.ascontiguousarray(view.image)).permute(2, 0, 1)[None].float()
    image = F.grid_sample(image, where, mode="bicubic", padding_mode="border", align_corners=True)
    column, row = np.rint(xy).astype(np.int64).transpose(2, 0, 1)
    inside = (column >= 0) & (column < view.size[0]) & (row >= 0) & (row < view.size[1])
    column, row = np.where(inside, column, 0), np.where(inside, row, 0)
    # the third coordinate of the old pixel's point in the new camera
    ray = np.stack([column, row, np.ones_like(row)], -1) @ np.linalg.inv(view.intrinsics).T
    depth = view.depth[row, column] * (ray @ turned.rotation)[..., 2]
    pose = np.array(view.pose)
    pose[:3, :3] = view.pose[:3, :3] @ turned.rotation
    return PosedView(
        image[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy() * inside[..., None],
        np.where(inside, depth, 0).astype(np.float32), turned.intrinsics.astype(view.intrinsics.dtype), pose,
    )  # fmt: skip


def candidate_boxes(
    size: tuple[int, int], target: tuple[int, int], count: int, rng: np.random.Generator
) -> np.ndarray:
    """Boxes [count, 4] of the target's aspect at random places of the image, at one random zoom."""
    side, shorter = min(size), min(target)
    allowed = max(0.1 * side, side * (side - shorter) // shorter)
    zoom = np.exp(rng.uniform(0, np.log1p(allowed / side)))
    whole = np.array(size, np.float64)
    box = np.array(target) * (whole / target).min()  # the largest that fits
    corner = rng.uniform(0, 1, (count, 2)) * (whole * zoom - box)
    return np.concatenate([corner, corner + box], 1) / zoom


def best_boxes(
    boxes: tuple[np.ndarray, np.ndarray], found: tuple[np.ndarray, np.ndarray], widths: tuple[int, int]
) -> tuple[int, int]:
    """The candidates of views 1 and 2 with most correspondences inside both.

    Args:
        boxes: [K, 4] of each view.
        found: flat indices [M] of both views.
        widths: of both views, in pixels.
    """
    inside = []
    for box, index, width in zip(boxes, found, widths, strict=True):
        xy = np.stack([index % width, index // width], -1)[None]  # [1, M, 2]
        inside.append(((xy >= box[:, None, :2]) & (xy < box[:, None, 2:])).all(-1))
    counts = inside[0].astype(np.float32) @ inside[1].T.astype(np.float32)
    best = np.unravel_index(counts.argmax(), counts.shape)
    return int(best[0]), int(best[1])
