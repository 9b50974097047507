"""The stereo pair with measured disparity that the proof uses, as pairs of posed views with depth.

scikit-image's Motorcycle pair (Scharstein et al., "High-resolution stereo datasets with subpixel-accurate ground
truth", GCPR 2014), at 741 x 500 pixels. Its calibration, from the documentation of `skimage.data.stereo_motorcycle`:
focal length 994.978 px, baseline 0.193001 m, principal points 31.086 px apart. With disparity d, left minus right:

    Z = focal * baseline / (d + 31.086)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dune_fast.heads.mast3r.crops import PosedView
from dune_fast.heads.mast3r.pair_folders import write_pairs, write_view

FOCAL, BASELINE, OFFSET = 994.978, 0.193001, 31.086
CENTRE = (311.193, 254.877)
"""Of the left camera; the right one's is OFFSET farther to the right."""


def right_disparity(left: np.ndarray) -> np.ndarray:
    """The disparity of the right view's pixels, of the left one's [H, W]; nan where no left pixel lands.

    Of several left pixels that land on one the nearest is seen: the one with the largest disparity.
    """
    right = np.full_like(left, np.nan)
    rows, columns = np.nonzero(np.isfinite(left))
    d = left[rows, columns]
    order = np.argsort(d)  # the last one stays
    rows, columns, d = rows[order], np.rint(columns - d).astype(int)[order], d[order]
    inside = (columns >= 0) & (columns < left.shape[1])
    right[rows[inside], columns[inside]] = d[inside]
    return right


def posed_views(folder: Path) -> tuple[PosedView, PosedView]:
    """The left and the right view; the left camera is the world.

    Args:
        folder: with motorcycle_left.png, motorcycle_right.png and motorcycle_disp.npz.
    """
    with np.load(folder / "motorcycle_disp.npz") as file:
        left = np.asarray(file["arr_0"], np.float64)
    left = np.where(np.isfinite(left), left, np.nan)
    views = []
    for side, disparity, shift in (("left", left, 0.0), ("right", right_disparity(left), 1.0)):
        image = np.array(Image.open(folder / f"motorcycle_{side}.png").convert("RGB"))
        depth = np.nan_to_num(FOCAL * BASELINE / (disparity + OFFSET)).astype(np.float32)
        camera = np.array([[FOCAL, 0, CENTRE[0] + shift * OFFSET], [0, FOCAL, CENTRE[1]], [0, 0, 1]])
        pose = np.eye(4)
        pose[0, 3] = shift * BASELINE
        views.append(PosedView(image, depth, camera, pose))
    return views[0], views[1]


def window(view: PosedView, left: int, top: int, size: tuple[int, int]) -> PosedView:
    """A part of a view, of (width, height)."""
    part = np.s_[top : top + size[1], left : left + size[0]]
    camera = np.array(view.intrinsics)
    camera[:2, 2] -= (left, top)
    return PosedView(view.image[part], view.depth[part], camera, view.pose)


def write_stereo(root: Path, folder: Path, count: int = 12, size: tuple[int, int] = (480, 360)) -> None:
    """Windows of both views, each at a place of its own, so that no position gives a match away, as pairs."""
    if (root / "pairs.txt").is_file():
        return
    left, right = posed_views(folder)
    rng = np.random.default_rng(0)
    room = np.array(left.size) - size
    names = []
    for i in range(count):
        corner = rng.integers(0, room + 1)
        # about the mean disparity to the left, so that the windows overlap
        other = (corner - (35, 0) + rng.integers(-size[0] // 5, size[0] // 5 + 1, 2)).clip(0, room)
        for side, view, (x, y) in (("left", left, corner), ("right", right, other)):
            write_view(root, f"{side}{i:02d}", window(view, x, y, size))
        names.append((f"left{i:02d}", f"right{i:02d}"))
    write_pairs(root, names)
