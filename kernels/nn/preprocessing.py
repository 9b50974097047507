"""What an encoder's images go through: resized, cut to a square, normalised; and how other libraries write that down.

The same as a run's evaluation: the shorter side is resized to the image size (bicubic, antialiased), a square is cut
out of the middle, and (image - mean) / std is taken of RGB in [0, 1].
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Preprocessing:
    """A callable: one image, or a batch of tensors, to what the encoder takes.

    `dataclasses.replace(encoder.transform, image_size=448)` gives another size.
    """

    image_size: int
    """Side of the square, in pixels; a multiple of the encoder's patch size."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Of RGB in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """See `mean`."""
    crop_pct: float = 1.0
    """The square's side over the shorter side of the resized image."""
    interpolation: str = "bicubic"
    """Of the resizing; nothing else is known here."""

    def __call__(self, image: Image | np.ndarray | Tensor) -> Tensor:
        """One image as [3, S, S], or a batch of tensors as [B, 3, S, S], float32.

        Takes PIL of any mode (turned upright by its EXIF orientation), a uint8 array [H, W, 3], or a tensor [3, H, W]
        or [B, 3, H, W], uint8 or floating point in [0, 1]; ValueError for anything else. PIL images are resized by PIL,
        tensors by torch, as in torchvision's v2 transforms.
        """
        if isinstance(image, Tensor):
            pixels = self._cut(self._resized(image))
        else:
            pixels = self._cut(torch.from_numpy(self._by_pil(image)).permute(2, 0, 1))
        pixels = pixels.float().div(255) if pixels.dtype == torch.uint8 else pixels.float()
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """Height and width once the shorter side is as long as it is to be; the longer one is rounded down."""
        short = int(self.image_size / self.crop_pct)
        if height <= width:
            return short, int(short * width / height)
        return int(short * height / width), short

    def _by_pil(self, image: Image | np.ndarray) -> np.ndarray:
        from PIL import Image as PIL
        from PIL import ImageOps

        if isinstance(image, np.ndarray):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(f"an array of an image is uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
            image = PIL.fromarray(image)
        if not isinstance(image, PIL.Image):
            raise ValueError(f"give a PIL image, an array [H, W, 3] or a tensor, not a {type(image).__name__}")
        image = ImageOps.exif_transpose(image).convert("RGB")
        height, width = self._scaled(image.height, image.width)
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), PIL.Resampling.BICUBIC)
        return np.array(image)

    def _resized(self, image: Tensor) -> Tensor:
        if image.ndim not in (3, 4) or image.shape[-3] != 3:
            raise ValueError(f"a tensor of images is [3, H, W] or [B, 3, H, W], got {list(image.shape)}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise ValueError(f"a tensor of images is uint8 or floating point in [0, 1], got {image.dtype}")
        size = self._scaled(*image.shape[-2:])
        if size == tuple(image.shape[-2:]):
            return image
        batch = image if image.ndim == 4 else image[None]
        exact = batch if batch.dtype == torch.uint8 and not batch.is_cuda else batch.float()
        out = F.interpolate(exact, size, mode="bicubic", antialias=True)
        if image.dtype == torch.uint8 and out.dtype != torch.uint8:
            out = out.round().clamp(0, 255).to(torch.uint8)
        return out if image.ndim == 4 else out[0]

    def _cut(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        top, left = round((height - self.image_size) / 2), round((width - self.image_size) / 2)
        return image[..., top : top + self.image_size, left : left + self.image_size]

    def as_json(self) -> str:
        """All fields, for a file's metadata."""
        return json.dumps(asdict(self))

    def timm(self) -> dict[str, Any]:
        """The part of timm's `pretrained_cfg` that `timm.data.resolve_data_config` reads."""
        return {
            "input_size": [3, self.image_size, self.image_size], "mean": list(self.mean), "std": list(self.std),
            "interpolation": self.interpolation, "crop_pct": self.crop_pct, "crop_mode": "center",
        }  # fmt: skip

    def transformers(self) -> dict[str, Any]:
        """The content of `preprocessor_config.json`."""
        return {
            "image_processor_type": "BitImageProcessor", "do_convert_rgb": True,
            "do_resize": True, "size": {"shortest_edge": int(self.image_size / self.crop_pct)}, "resample": 3,
            "do_center_crop": True, "crop_size": {"height": self.image_size, "width": self.image_size},
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(self.mean), "image_std": list(self.std),
        }  # fmt: skip
