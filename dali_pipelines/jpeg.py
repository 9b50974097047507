"""Images made anew: to 8-bit RGB, smaller, encoded as JPEG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

_QUALITY = 95  # without chroma subsampling: 0.9 levels of mean error on the demo's photographs at 512 pixels
_LONGEST_SIDE = 65_500  # of a JPEG that libjpeg writes


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB, the way DALI decodes it: 16 bits lose the lower 8, transparency is ignored.

    Raises:
        ValueError: floating-point or 32-bit pixels, whose range is not known.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range")
    return image.convert("RGB")


def shrink(image: Image.Image, shorter_side: int) -> Image.Image:
    """With at most `shorter_side` pixels on the shorter side: bicubic, antialiased; others as they are."""
    if min(image.size) <= shorter_side:
        return image
    scale = shorter_side / min(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encode_jpeg(image: Image.Image) -> bytes:
    """As JPEG of quality 95, 4:4:4 (no chroma subsampling). Raises ValueError for sides that JPEG cannot have."""
    if max(image.size) > _LONGEST_SIDE:
        raise ValueError(f"{image.size[0]} x {image.size[1]} pixels are too many for a JPEG")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return buffer.getvalue()
