"""Images as Multi-HMR takes them: the longer side resized to S, centred on a black square, then normalised; and what
that does to a camera. Flips of image, camera and people together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD

_MIRRORED = ((1, 2), (4, 5), (7, 8), (10, 11), (13, 14), (16, 17), (18, 19), (20, 21))
"""Left and right joints of the body, 1 to 21."""
_OTHER = dict(_MIRRORED) | {right: left for left, right in _MIRRORED}
_SWAP = [_OTHER.get(joint, joint) - 1 for joint in range(1, 22)]


@dataclass(frozen=True)
class Square:
    """An image on a black square."""

    pixels: np.ndarray
    """uint8 [S, S, 3]"""
    scale: float
    """Pixels of the square in one of the image."""
    left: int
    top: int
    """Where the image begins."""

    def intrinsics(self, original: np.ndarray) -> np.ndarray:
        """K [3, 3] in pixels of the square, of K in pixels of the image."""
        return self._move @ original

    def original(self, intrinsics: np.ndarray) -> np.ndarray:
        """The inverse of `intrinsics`."""
        return np.linalg.inv(self._move) @ intrinsics

    @property
    def _move(self) -> np.ndarray:
        return np.array([[self.scale, 0.0, self.left], [0.0, self.scale, self.top], [0.0, 0.0, 1.0]])


def fit_square(image: Image.Image, side: int) -> Square:
    """An RGB image on a black square of `side` pixels; nothing is cut off."""
    scale = side / max(image.size)
    width, height = (max(1, round(scale * n)) for n in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC) if scale != 1 else image
    left, top = (side - width) // 2, (side - height) // 2
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[top : top + height, left : left + width] = np.asarray(resized.convert("RGB"))
    return Square(pixels, scale, left, top)


def normalise(
    pixels: np.ndarray, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Tensor:
    """uint8 [S, S, 3] -> float32 [3, S, S]"""
    x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def flip_people(people: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The mirror images of people, see `people_files`: exact for a body model that is its own mirror image."""
    out = dict(people)
    for name, other in (("leye", "reye"), ("reye", "leye"), ("left_hand", "right_hand"), ("right_hand", "left_hand")):
        out[name] = people[other]
    out["body"] = people["body"][:, _SWAP]
    for name in ("root", "body", "jaw", "leye", "reye", "left_hand", "right_hand"):
        out[name] = out[name] * np.array([1.0, -1.0, -1.0], np.float32)
    out["transl"] = people["transl"] * np.array([-1.0, 1.0, 1.0], np.float32)
    return out


def flip_camera(intrinsics: np.ndarray, side: int) -> np.ndarray:
    """K of the mirrored square image of `side` pixels."""
    out = intrinsics.copy()
    out[0, 2] = side - out[0, 2]
    return out
