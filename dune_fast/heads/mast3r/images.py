"""Photographs as MASt3R takes them, and its pixels as those of the photographs.

The long side is resized to about 512 pixels, then a centred part is cut out whose sides are multiples of the patch;
no square is cut out. Pixel centres are at integers. The focal length, where nobody knows it, is read off the points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dune_fast.heads.head import HeadError
from dune_fast.kernels.nn.vit import VisionTransformer

_LONG_SIDE = 512
_STEPS = 20


def default_long_side(patch_size: int) -> int:
    """The multiple of the patch closest to 512 pixels: 518 for patches of 14, 512 for 16."""
    return max(1, round(_LONG_SIDE / patch_size)) * patch_size


def for_encoder(images: Tensor, encoder: VisionTransformer) -> Tensor:
    """Images with values in [-1, 1], [B, 3, H, W], as MASt3R's interface has them, normalised as the encoder wants."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (encoder.mean, encoder.std))
    return (images * 0.5 + 0.5 - mean) / std


@dataclass(frozen=True)
class Prepared:
    """An image for the network, and where it lies in the photograph."""

    image: Tensor
    """float32 [3, h, w], in [-1, 1]."""
    original: tuple[int, int]
    """(height, width) of the photograph."""
    scale: tuple[float, float]
    """Resized over original size, (x, y)."""
    offset: tuple[int, int]
    """(left, top) of the part, in resized pixels."""

    @property
    def size(self) -> tuple[int, int]:
        """(h, w)."""
        return tuple(self.image.shape[1:])

    @property
    def colours(self) -> np.ndarray:
        """uint8 [h, w, 3]."""
        return ((self.image.movedim(0, -1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()

    def to_original(self, pixels: np.ndarray) -> np.ndarray:
        """(x, y) here as (x, y) in the photograph, float64 [N, 2]."""
        return (np.asarray(pixels, np.float64) + self.offset + 0.5) / self.scale - 0.5

    def intrinsics(self, original: np.ndarray) -> np.ndarray:
        """The photograph's camera matrix [3, 3] in pixels of this image."""
        k = np.asarray(original, np.float64).copy()
        k[:2, 2] += 0.5
        k[:2] *= np.array(self.scale)[:, None]
        k[:2, 2] -= np.array(self.offset) + 0.5
        return k

    def original_intrinsics(self, own: np.ndarray) -> np.ndarray:
        """The inverse of `intrinsics`."""
        k = np.asarray(own, np.float64).copy()
        k[:2, 2] += np.array(self.offset) + 0.5
        k[:2] /= np.array(self.scale)[:, None]
        k[:2, 2] -= 0.5
        return k


def prepare(photograph: np.ndarray, patch_size: int, long_side: int | None = None, square_ok: bool = True) -> Prepared:
    """A photograph, uint8 [H, W, 3], for the network.

    Args:
        patch_size: of the encoder, in pixels.
        long_side: pixels that the long side is resized to; `default_long_side` by default.
        square_ok: whether a square image stays one; else it is cut to 4:3, as the released MASt3R was trained.

    Raises:
        HeadError: no image of this kind, or one that would not be a patch wide.
    """
    if photograph.ndim != 3 or photograph.shape[2] != 3 or photograph.dtype != np.uint8:
        raise HeadError(f"a photograph is uint8 [H, W, 3], got {photograph.dtype} {list(photograph.shape)}")
    long_side = default_long_side(patch_size) if long_side is None else long_side
    image = Image.fromarray(photograph)
    longest = max(image.size)
    method = Image.Resampling.LANCZOS if longest > long_side else Image.Resampling.BICUBIC
    resized = tuple(round(side * long_side / longest) for side in image.size)
    part = [2 * (side // 2) // patch_size * patch_size for side in resized]  # (width, height)
    if part[0] == part[1] and not square_ok:
        part[1] = 3 * part[0] // 4 // patch_size * patch_size
    if min(part) < patch_size:
        raise HeadError(
            f"an image of {image.width} x {image.height} pixels, its long side resized to {long_side}, is not one "
            f"patch of {patch_size} pixels wide: use a wider part of it, or a longer side"
        )
    left, top = (side // 2 - size // 2 for side, size in zip(resized, part, strict=True))
    pixels = np.array(image.resize(resized, method).crop((left, top, left + part[0], top + part[1])))
    values = torch.from_numpy(pixels).movedim(-1, 0).float() / 127.5 - 1
    scale = (resized[0] / image.width, resized[1] / image.height)
    return Prepared(values, photograph.shape[:2], scale, (left, top))


def estimated_intrinsics(points: np.ndarray) -> np.ndarray | None:
    """The camera that sees points [H, W, 3], of its own frame, each at its pixel: principal point in the middle.

    The focal length f with the least sum of distances |pixel - f (X / Z, Y / Z)|, by Weiszfeld's iteration, as DUSt3R
    does (Wang et al., CVPR 2024, section 3.3). None if the points are of no camera.
    """
    height, width = points.shape[:2]
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).reshape(-1, 2) - centre
    flat = points.reshape(-1, 3).astype(np.float64)
    seen = np.isfinite(flat).all(1) & (flat[:, 2] > 0)
    pixels, rays = pixels[seen], flat[seen, :2] / flat[seen, 2:]
    along, squared = (pixels * rays).sum(1), (rays * rays).sum(1)
    if not squared.sum() > 0:
        return None
    focal = along.sum() / squared.sum()
    for _ in range(_STEPS):
        weight = 1 / np.maximum(np.linalg.norm(pixels - focal * rays, axis=1), 1e-8)
        focal = (weight * along).sum() / (weight * squared).sum()
    if not np.isfinite(focal) or focal <= 0:
        return None
    return np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]])
