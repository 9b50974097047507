"""Teachers' own crops of the student's images, for `data.teacher_views`.

A teacher's crop is the student's, smaller by the factor `teacher_zoom` about its centre and moved by whole patches of
the student's grid. It may reach beyond the image: that part is zeros, and not valid. Flip, turn and colours are the
student's. Four random words a crop, Philox counter (position, which of the crops) in the stream TEACHER_VIEW:

    word 0   zoom, uniform           word 1, 2   shift, round(N(0, sigma)) patches across and down, by Box and Muller

The window is decoded once more for every crop: DALI decodes one window of an image at a time. On a processor an image
of 500 x 375 pixels at 224 px takes 3.0 ms, 7.0 with one crop of as many pixels, 7.8 with one of 384.

Bounds are whole pixels of the image, and of the crop: a shift is that many patches to half a pixel. The transform is
made of these bounds, and exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dune_fast.dali_pipelines.augmentation import Geometry, as_stored, resized_crops, shown_sizes
from dune_fast.dali_pipelines.datasets import DataConfig
from dune_fast.kernels import philox
from dune_fast.kernels.nn.homography import between_views, box_mask


class OwnCrop(NamedTuple):
    """Of the teachers that see the same pixels."""

    name: str
    side: int | None
    """Of the picture, in pixels; None for the student's."""


class CropPlan(NamedTuple):
    """One crop of each of B images."""

    name: str
    geometry: Geometry
    quad: Tensor
    """float64 [B, 4, 2], where the source's corners lie in the picture, in pixels."""
    transform: Tensor
    """float64 [B, 3, 3], of a point of the picture to the student's, see `kernels.nn.homography`."""
    wanted: bool = True
    """Whether some teacher looks at it in this step; else it is not decoded."""


def student_window(words: Tensor, sizes: np.ndarray, turn: np.ndarray, config: DataConfig) -> np.ndarray:
    """The student's crop in the image as it is shown, int64 [B, 4]: see `augmentation.train_geometry`."""
    return resized_crops(words, shown_sizes(sizes, turn), list(config.crop_scale), list(config.crop_ratio))


def own_crops(
    crops: Sequence[OwnCrop], seed: int, positions: np.ndarray, words: Tensor, sizes: np.ndarray,
    turn: np.ndarray, student: Geometry, patch: int, config: DataConfig, wanted: Collection[str] | None = None,
) -> list[CropPlan]:  # fmt: skip
    """The teachers' crops of a batch.

    Args:
        seed, positions: of the randomness; int64 [B], global.
        words, sizes, turn: see `augmentation.train_geometry`.
        student: what that has made of them.
        patch: the student's, in pixels.
        wanted: names of the crops that are looked at; None for all.
    """
    window, shown = student_window(words, sizes, turn, config), shown_sizes(sizes, turn)
    image_size = int(student.side[0])
    flip = np.where(turn[:, None], student.flip[:, ::-1], student.flip)  # as it is shown
    own = np.full((len(turn), 2), image_size)
    theirs = _quad(shown, window, own, np.zeros_like(own), flip, image_size)
    found = []
    for index, crop in enumerate(crops):
        side = image_size if crop.side is None else crop.side
        zoom, shift = _draws(seed, positions, index, config)
        bounds = [_along(axis, window, shown, zoom, shift, patch / image_size, side) for axis in (0, 1)]
        (left, width, across, x), (top, height, down, y) = bounds
        geometry = Geometry(
            np.stack([left, top, width, height], axis=1), np.stack([down, across], axis=1), np.stack([y, x], axis=1),
            flip, turn, np.full(len(turn), side),
        )  # fmt: skip
        quad = _quad(shown, geometry.window, geometry.size, geometry.anchor, flip, side)
        transform = between_views(quad, (side, side), theirs, (image_size, image_size))
        stored = as_stored(geometry, np.asarray(sizes, np.int64), side)
        found.append(CropPlan(crop.name, stored, quad, transform, wanted is None or crop.name in wanted))
    return found


def as_given(
    crops: Sequence[CropPlan], pictures: Sequence[Tensor], to_device: Callable[[Tensor], Tensor]
) -> dict[str, dict[str, Tensor]] | None:
    """`Batch.teacher_views` of pictures float32 [B, 3, T, T], one tensor for each crop that is wanted; None without
    crops."""
    if not crops:
        return None
    found, waiting = {}, iter(pictures)
    for crop in crops:
        side = int(crop.geometry.side[0])
        valid = box_mask(to_device(crop.quad), (side, side))
        found[crop.name] = {"transform": to_device(crop.transform.float()), "valid": valid}
        if crop.wanted:
            found[crop.name]["images"] = next(waiting) * valid[:, None]
    return found


def _draws(seed: int, positions: np.ndarray, index: int, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Zoom float64 [B] and shift, whole numbers of patches, float64 [B, 2]."""
    position = torch.from_numpy(np.asarray(positions, np.int64))
    u = philox.to_uniform(philox.words(seed, philox.TEACHER_VIEW, position, index)).double().numpy()  # [B, 4]
    low, high = config.teacher_zoom
    radius = np.sqrt(-2 * np.log1p(-u[:, 1])) * config.teacher_shift
    angle = 2 * math.pi * u[:, 2]
    shift = np.rint(radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1))
    return low + (high - low) * u[:, 0], shift


def _along(
    axis: int, window: np.ndarray, shown: np.ndarray, zoom: np.ndarray, shift: np.ndarray, patch: float, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Along x (0) or y (1): begin and length of the pixels that are decoded, what they are resized to, and where in
    that the picture begins; int64 [B] each."""
    begin, length, whole = window[:, axis], window[:, 2 + axis], shown[:, axis]
    wanted = length / zoom
    centre = np.clip(begin + length / 2 + shift[:, axis] * patch * length, 0, whole)
    low = centre - wanted / 2
    first = np.clip(np.floor(low + 1e-6), 0, whole - 1).astype(np.int64)
    last = np.clip(np.ceil(low + wanted - 1e-6), first + 1, whole).astype(np.int64)
    scale = side / wanted
    anchor = np.rint((low - first) * scale).astype(np.int64)
    anchor = np.where(low + 1e-6 >= 0, np.maximum(anchor, 0), anchor)
    resized = np.maximum(1, np.rint((last - first) * scale)).astype(np.int64)
    # rounded, they may end a pixel before the picture does, although the image goes on
    resized = np.where(low + wanted - 1e-6 <= whole, np.maximum(resized, anchor + side), resized)
    return first, last - first, resized, anchor


def _quad(
    shown: np.ndarray, window: np.ndarray, size: np.ndarray, anchor: np.ndarray, flip: np.ndarray, side: int
) -> Tensor:
    """Where the corners of images of `shown` pixels (width, height) lie in a picture of `side`, float64 [B, 4, 2]."""
    ends = []
    for axis in (0, 1):
        scale = size[:, 1 - axis] / window[:, 2 + axis]
        low = -window[:, axis] * scale - anchor[:, 1 - axis]
        high = (shown[:, axis] - window[:, axis]) * scale - anchor[:, 1 - axis]
        mirrored = flip[:, axis]
        ends.append((np.where(mirrored, side - low, low), np.where(mirrored, side - high, high)))
    (x0, x1), (y0, y1) = ends
    return torch.from_numpy(np.stack([np.stack([x0, x1, x1, x0], 1), np.stack([y0, y0, y1, y1], 1)], axis=2))
