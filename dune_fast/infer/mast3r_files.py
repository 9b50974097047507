"""What `dune-fast infer mast3r` writes of a pair: a cloud of coloured points, and a picture of matches and depths."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.infer.legends import depth_colours, with_depth_legend

_DRAWN = 100
"""Lines between matches at most: more hide the images."""
_GAP = 8
"""Pixels between the pictures."""


def write_ply(path: Path, points: np.ndarray, colours: np.ndarray) -> None:
    """A cloud of points [N, 3] with colours, uint8 [N, 3], as binary PLY."""
    names = ["x", "y", "z", "red", "green", "blue"]
    vertices = np.zeros(len(points), [(name, "<f4" if i < 3 else "u1") for i, name in enumerate(names)])
    for i, name in enumerate(names):
        vertices[name] = points[:, i] if i < 3 else colours[:, i - 3]
    properties = "".join(f"property {'float' if i < 3 else 'uchar'} {name}\n" for i, name in enumerate(names))
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{properties}end_header\n"
    write_whole(path, header.encode(), vertices.tobytes())


def draw_matches(
    path: Path, images: Sequence[np.ndarray], pixels: Sequence[np.ndarray], depths: Sequence[np.ndarray]
) -> None:
    """Both images with lines between matches, evenly chosen where there are many, and their depth maps below them.

    Args:
        path: PNG to write.
        images: uint8 [h, w, 3] each.
        pixels: [N, 2] of each image, (x, y).
        depths: [h, w] of each image, in metres, coloured in one range.
    """
    positive = np.concatenate([depth[depth > 0] for depth in depths])
    low, high = np.percentile(positive, (2, 98)) if len(positive) else (0.0, 1.0)
    maps = [depth_colours(depth, low, high) for depth in depths]
    parts = Image.fromarray(maps[0]), with_depth_legend(maps[1], low, high)
    lefts, top = (0, images[0].shape[1] + _GAP), max(image.shape[0] for image in images) + _GAP
    canvas = Image.new("RGB", (lefts[1] + parts[1].width, top + max(part.height for part in parts)), "white")
    for image, part, left in zip(images, parts, lefts, strict=True):
        canvas.paste(Image.fromarray(image), (left, 0))
        canvas.paste(part, (left, top))
    draw = ImageDraw.Draw(canvas)
    count = len(pixels[0])
    for i in np.unique(np.linspace(0, count - 1, _DRAWN).round().astype(int)) if count else ():
        (x1, y1), (x2, y2) = pixels[0][i], pixels[1][i]
        x2 = x2 + lefts[1]
        colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(0.8 * y1 / images[0].shape[0], 1, 1))
        draw.line((x1, y1, x2, y2), colour)
        for x, y in ((x1, y1), (x2, y2)):
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), outline=colour)
    file = io.BytesIO()
    canvas.save(file, "PNG")
    write_whole(path, file.getvalue())
