"""Random augmentation parameters of each image, as a pure function of (seed, global position) and the image's size.

The distributions are torchvision's: RandomResizedCrop (ten attempts at an area and a log-uniform ratio, then a centre
crop), a horizontal flip, ColorJitter in a random order, grayscale, Gaussian blur and solarize, each with its
probability. Every image has 36 random words, Philox counters (position, block) in the stream AUGMENT, or (number of the
view, block) in the stream VIEW:

    word  0 ... 19   area and ratio of the ten crop attempts
    word 20, 21      top and left of the crop            word 22      flip
    word 23          jitter or not                       word 24-27   brightness, contrast, saturation, hue
    word 28          order of the jitter                 word 29      grayscale
    word 30, 31      blur or not, its sigma              word 32      solarize
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from dune_fast.dali_pipelines.datasets import DataConfig
from dune_fast.kernels import philox
from dune_fast.kernels.augment import ColourParams

_ATTEMPTS = 10
_BLOCKS = 9  # of four words
_ORDERS = torch.tensor(list(itertools.permutations(range(4))))  # [24, 4]


@dataclass(frozen=True)
class Geometry:
    """What the decoder is to do to each of B images: take a window, resize it, take a square of the result, flip."""

    window: np.ndarray
    """int64 [B, 4]: left, top, width, height in pixels of the stored image."""
    size: np.ndarray
    """int64 [B, 2]: height and width that the window is resized to."""
    anchor: np.ndarray
    """int64 [B, 2]: top and left of the final square in the resized window."""
    flip: np.ndarray
    """bool [B, 2]: mirror left and right, mirror top and bottom."""
    turn: np.ndarray
    """bool [B]: turn the result clockwise by 90 degrees, after all else."""
    side: np.ndarray
    """int64 [B]: height and width of the final square in pixels; one size in a batch that is decoded."""

    def __len__(self) -> int:
        return len(self.turn)

    def __getitem__(self, index: np.ndarray | list[int]) -> Geometry:
        return Geometry(*(getattr(self, f.name)[index] for f in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence[Geometry]) -> Geometry:
        """One batch after the other."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


def draw_words(seed: int, positions: np.ndarray, stream: int = philox.AUGMENT) -> torch.Tensor:
    """The 36 random words of each image: int64 [B, 36] in [0, 2^32). positions: int64 [B], global, or of views."""
    position = torch.from_numpy(np.asarray(positions, np.int64))
    return philox.words(seed, stream, position[:, None], torch.arange(_BLOCKS)).flatten(1)


def resized_crops(words: torch.Tensor, sizes: np.ndarray, scale: list[float], ratio: list[float]) -> np.ndarray:
    """Windows with the distribution of torchvision's RandomResizedCrop, int64 [B, 4]: left, top, width, height.

    Args:
        words: int64 [B, 36] from `draw_words`.
        sizes: int64 [B, 2], width and height of each image.
        scale, ratio: [smallest, largest] share of the area and width / height.
    """
    u = philox.to_uniform(words[:, : 2 * _ATTEMPTS]).double().numpy().reshape(-1, _ATTEMPTS, 2)
    width, height = (np.asarray(sizes, np.int64)[:, i] for i in (0, 1))  # [B]
    area = (width * height)[:, None] * (scale[0] + (scale[1] - scale[0]) * u[:, :, 0])  # [B, 10]
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * u[:, :, 1])
    w, h = np.rint(np.sqrt(area * aspect)).astype(np.int64), np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = fits.argmax(1)[:, None]
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
    some = fits.any(1)
    # no attempt fits: the largest centre crop whose ratio is allowed
    fallback_w = np.where(width / height > ratio[1], np.rint(height * ratio[1]).astype(np.int64), width)
    fallback_h = np.where(width / height < ratio[0], np.rint(width / ratio[0]).astype(np.int64), height)
    w, h = np.where(some, w, fallback_w), np.where(some, h, fallback_h)
    drawn = words[:, 20:22].numpy()
    top = np.where(some, drawn[:, 0] * (height - h + 1) >> 32, (height - h) // 2)
    left = np.where(some, drawn[:, 1] * (width - w + 1) >> 32, (width - w) // 2)
    return np.stack([left, top, w, h], axis=1)


def shown_sizes(sizes: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Width and height of images once they are turned, int64 [B, 2]; arguments as in `train_geometry`."""
    sizes = np.asarray(sizes, np.int64)
    return np.where(turn[:, None], sizes[:, ::-1], sizes)


def train_geometry(
    words: torch.Tensor, sizes: np.ndarray, turn: np.ndarray, image_size: int, config: DataConfig
) -> Geometry:
    """RandomResizedCrop and flip.

    Args:
        words: int64 [B, 36] from `draw_words`.
        sizes: int64 [B, 2], width and height of each image as it is stored.
        turn: bool [B], which images are to be turned clockwise by 90 degrees first.
        image_size: side of the result in pixels.
    """
    sizes = np.asarray(sizes, np.int64)
    window = resized_crops(words, shown_sizes(sizes, turn), list(config.crop_scale), list(config.crop_ratio))
    flip = (philox.to_uniform(words[:, 22]) < config.flip_probability).numpy()
    batch = len(flip)
    flip = np.stack([flip, np.zeros_like(flip)], axis=1)
    return as_stored(
        Geometry(
            window, np.full((batch, 2), image_size), np.zeros((batch, 2), np.int64), flip, turn,
            np.full(batch, image_size),
        ), sizes, image_size,
    )  # fmt: skip


def validation_geometry(stored_sizes: np.ndarray, turn: np.ndarray, image_size: int) -> Geometry:
    """The shorter side resized to image_size, then the centre square. Arguments: see `train_geometry`."""
    stored_sizes = np.asarray(stored_sizes, np.int64)
    sizes = np.where(turn[:, None], stored_sizes[:, ::-1], stored_sizes)
    batch = len(sizes)
    shorter = sizes.min(1, keepdims=True)
    resized = np.where(sizes == shorter, image_size, image_size * sizes // shorter)[:, ::-1]  # height, width
    anchor = np.rint((resized - image_size) / 2).astype(np.int64)
    window = np.concatenate([np.zeros((batch, 2), np.int64), sizes], axis=1)
    upright, side = np.zeros((batch, 2), bool), np.full(batch, image_size)
    geometry = Geometry(window, np.ascontiguousarray(resized), anchor, upright, turn, side)
    return as_stored(geometry, stored_sizes, image_size)


def as_stored(shown: Geometry, stored_sizes: np.ndarray, image_size: int) -> Geometry:
    """The same geometry, of results of `image_size`, in the pixels of the stored image, where an image is to be turned.

    The turned image shows at (y, x) the stored pixel (height - 1 - x, y). Cutting, resizing and mirroring commute with
    that, so all of it is done to the stored image and only the small result is turned.
    """
    left, top, width, height = shown.window.T
    turn = shown.turn[:, None]
    window = np.stack([top, stored_sizes[:, 1] - left - width, height, width], axis=1)
    anchor = np.stack([shown.size[:, 1] - shown.anchor[:, 1] - image_size, shown.anchor[:, 0]], axis=1)
    return Geometry(
        window=np.where(turn, window, shown.window),
        size=np.where(turn, shown.size[:, ::-1], shown.size),
        anchor=np.where(turn, anchor, shown.anchor),
        flip=np.where(turn, shown.flip[:, ::-1], shown.flip),
        turn=shown.turn,
        side=shown.side,
    )


def colour_params(words: torch.Tensor, config: DataConfig) -> ColourParams:
    """Colour parameters of each image, on the CPU. words: int64 [B, 36] from `draw_words`."""
    u = philox.to_uniform(words)  # [B, 36]
    jittered = u[:, 23] < config.jitter_probability

    def between(column: int, low: float, high: float, off: float) -> torch.Tensor:
        return torch.where(jittered, low + (high - low) * u[:, column], off)

    def factor(column: int, strength: float) -> torch.Tensor:
        return between(column, max(0.0, 1 - strength), 1 + strength, off=1.0)

    low, high = config.blur_sigma
    return ColourParams(
        order=_ORDERS[(words[:, 28] * len(_ORDERS)) >> 32],
        brightness=factor(24, config.brightness),
        contrast=factor(25, config.contrast),
        saturation=factor(26, config.saturation),
        hue=between(27, -config.hue, config.hue, off=0.0),
        grayscale=u[:, 29] < config.grayscale_probability,
        blur=u[:, 30] < config.blur_probability,
        sigma=low + (high - low) * u[:, 31],
        solarize=u[:, 32] < config.solarize_probability,
    )
