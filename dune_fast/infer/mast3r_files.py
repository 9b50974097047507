"""What `dune-fast infer mast3r` writes of a pair: a cloud of coloured points, and a picture of matches and depths."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dune_fast.dali_pipelines.storage import write_whole

_DRAWN = 100
"""Lines between matches at most: more hide the images."""
_GAP = 8
"""Pixels between the two images."""


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
    path: Path, images: Sequence[np.ndarray], pixels: Sequence[np.ndarray], depths: Sequence[np.ndarray], title: str
) -> None:
    """Both images with lines between matches, evenly chosen where there are many, and both depth maps.

    Args:
        path: PNG to write.
        images: uint8 [h, w, 3] each.
        pixels: [N, 2] of each image, (x, y).
        depths: [h, w] of each image, in metres.
        title: above the images.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    (h1, w1), (h2, w2) = (image.shape[:2] for image in images)
    canvas = np.full((max(h1, h2), w1 + _GAP + w2, 3), 255, np.uint8)
    canvas[:h1, :w1], canvas[:h2, w1 + _GAP :] = images
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    widths = [canvas.shape[1] / canvas.shape[0], *(w / h for h, w in ((h1, w1), (h2, w2)))]
    axes = figure.subplots(1, 3, width_ratios=widths)
    axes[0].imshow(canvas)
    axes[0].set_title(title, fontsize=10)
    chosen = np.unique(np.linspace(0, len(pixels[0]) - 1, _DRAWN).round().astype(int)) if len(pixels[0]) else []
    for i in chosen:
        (x1, y1), (x2, y2) = pixels[0][i], pixels[1][i]
        colour = colormaps["jet"](y1 / h1)
        axes[0].plot([x1, x2 + w1 + _GAP], [y1, y2], "-o", color=colour, linewidth=0.7, markersize=2)
    for axis, depth, name in zip(axes[1:], depths, ("1", "2"), strict=True):
        positive = depth[np.isfinite(depth) & (depth > 0)]
        low, high = np.percentile(positive, (2, 98)) if len(positive) else (0, 1)
        drawn = axis.imshow(depth, cmap="turbo_r", vmin=low, vmax=high)
        axis.set_title(f"depth of image {name} [m]", fontsize=10)
        figure.colorbar(drawn, ax=axis, shrink=0.8)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    write_whole(path, file.getvalue())
