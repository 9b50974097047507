"""What is wrong with a data set of pairs, before a training finds out.

    python -m dune_fast.heads.mast3r.pair_check FOLDER
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.heads.mast3r.correspondences import back_project, visible
from dune_fast.heads.mast3r.crops import PosedView
from dune_fast.heads.mast3r.pair_folders import LAYOUTS, PairDatasetConfig, open_pairs

logger = logging.getLogger(__name__)

PUBLISHED = {
    "arkitscenes": True, "blendedmvs": False, "co3d": False, "dl3dv": None, "habitat": None, "mapfree": None,
    "megadepth": False, "scannetpp": True, "staticthings3d": False, "tartanair": None, "unrealstereo4k": None,
    "vkitti": None, "waymo": True, "wildrgbd": True,
}  # fmt: skip
"""Public sets that MASt3R is trained on -> whether its loader takes them to be in metres; None: not published."""
WHERE = (
    "MASt3R's training sets are public, each under terms of its own (most for non-commercial research): "
    f"{', '.join(PUBLISHED)}; configs/data/dune.yaml names the pages of most. Write their views in the layout "
    "\"views\" (dune_fast/heads/mast3r/pair_folders.py), or render rooms for a trial: "
    "python -m dune_fast.heads.mast3r.scenes FOLDER"
)
"""What a user who has no pairs is told."""
_LARGE, _SMALL = 300.0, 0.05
"""Median depths, in metres, beyond which the unit is in doubt."""
_LEAST = 0.05
"""Share of the first view that the second one has to show, on average."""
_UPWARDS = np.diag([1.0, -1.0, -1.0, 1.0])
_READINGS = {
    "as they are": lambda pose: pose,
    "world-to-camera": np.linalg.inv,
    "of cameras whose y points up": lambda pose: pose @ _UPWARDS,
    "world-to-camera, of cameras whose y points up": lambda pose: np.linalg.inv(pose) @ _UPWARDS,
}
"""What a pose may have been meant to be -> the pose as it has to be."""


def check_pairs(name: str, cfg: PairDatasetConfig, most: int = 50, trained_on: bool = True) -> list[str]:
    """A sentence for everything that is wrong or doubtful; empty if nothing is.

    Args:
        name: of the data set, for messages.
        cfg: the data set.
        most: pairs that are read, evenly over the list.
        trained_on: whether it is to be trained on, for which it needs depth.
    """
    try:
        folder = open_pairs(name, cfg)
    except DataError as error:
        return [str(error)]
    found: list[str] = []
    depths, shares = [], []
    chosen = np.unique(np.linspace(0, len(folder) - 1, most).round().astype(int))
    for index in chosen.tolist():
        try:
            views = [folder.read_view(view) for view in folder.pairs[index]]
        except DataError as error:
            found.append(str(error))
            continue
        for view, title in zip(views, folder.pairs[index], strict=True):
            found += [f"{name}: {title} {problem}" for problem in view_problems(view, cfg.layout)]
        known = [view.depth[view.depth > 0] for view in views]
        if cfg.layout == "views" and all(len(depth) for depth in known) and all(_rigid(v.pose) for v in views):
            depths += [float(np.median(depth)) for depth in known]
            shares.append([_share(*(v._replace(pose=read(v.pose)) for v in views)) for read in _READINGS.values()])
    if cfg.layout == "mapfree" and trained_on:
        found.append(f"{name}: the layout 'mapfree' has no depth: for evaluation alone")
    if depths and cfg.metric and not _SMALL <= (median := float(np.median(depths))) <= _LARGE:
        found.append(f"{name}: the median depth is {median:g}, hardly metres: convert it, or say metric: false")
    if shares:
        means = dict(zip(_READINGS, np.mean(shares, 0), strict=True))
        best, given = max(means, key=lambda reading: means[reading]), means["as they are"]
        if means[best] > max(1.15 * given, _LEAST):
            found.append(
                f"{name}: second views show {given:.0%} of what first views do, and {means[best]:.0%} if poses are "
                f"read as {best}: they have to be camera-to-world, x to the right, y down, z forward"
            )
        elif given < _LEAST:
            found.append(
                f"{name}: second views show {given:.1%} of what first views do: poses and depth may be in different "
                "units, or the pairs show nothing in common"
            )
    return list(dict.fromkeys(found))


def view_problems(view: PosedView, layout: str) -> list[str]:
    """What is wrong with one view."""
    found = []
    if not _rigid(view.pose):
        found.append("has a pose that is no rotation and translation")
    if problem := camera_problem(view.intrinsics, view.size):
        found.append(problem)
    if layout == "views" and not (view.depth > 0).any():
        found.append("has no known depth")
    return found


def camera_problem(k: np.ndarray, size: tuple[int, int]) -> str:
    """What is doubtful about the camera matrix [3, 3] of an image of (width, height), "" if nothing is."""
    width, height = size
    if not np.isfinite(k).all() or k[0, 0] <= 0 or k[1, 1] <= 0 or not np.allclose(k[2], (0, 0, 1)):
        return "has intrinsics that are no camera matrix in pixels"
    if not (0 <= k[0, 2] < width and 0 <= k[1, 2] < height):
        return f"has its principal point ({k[0, 2]:g}, {k[1, 2]:g}) outside of the image of {width}x{height}"
    if not 0.2 <= k[0, 0] / max(width, height) <= 10:
        return f"has a focal length of {k[0, 0]:g} pixels in an image of {width}x{height}: of another size?"
    return ""


def _rigid(pose: np.ndarray) -> bool:
    """Whether it is a rotation and a translation."""
    rotation = pose[:3, :3]
    return bool(
        np.isfinite(pose).all()
        and np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3)
        and np.linalg.det(rotation) > 0
        and np.allclose(pose[3], (0, 0, 0, 1), atol=1e-6)
    )


def _share(first: PosedView, second: PosedView) -> float:
    """Share of the first view's known pixels that the second one shows."""
    points = back_project(first.depth, first.intrinsics, first.pose)
    return float(visible(points, second.depth, second.intrinsics, second.pose, 0.02)[first.depth > 0].mean())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m dune_fast.heads.mast3r.pair_check", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, default="views")
    parser.add_argument("--other-unit", action="store_true", help="depth and poses are not in metres")
    parser.add_argument("--pairs", type=int, default=50, help="how many are read (%(default)s)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    cfg = PairDatasetConfig(str(args.folder), args.layout, metric=not args.other_unit)
    found = check_pairs(args.folder.name, cfg, args.pairs)
    for problem in found or [f"{args.folder}: nothing is wrong"]:
        logger.info("%s", problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
