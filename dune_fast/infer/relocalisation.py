"""Poses by MASt3R's head for the tasks `mapfree` and `pose`, written as their predictions.

A pair is looked at as by `dune-fast infer mast3r`: view 1 is the reference or first image, view 2 the query or second.
The confidence of a pose is the number of its inliers; a query whose pose is not found has no line.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.evaluate.pose_files import (
    Pose,
    PoseFileError,
    frame_number,
    read_intrinsics,
    read_pairs,
    read_poses,
    read_text,
    submission_bytes,
)
from dune_fast.evaluate.pose_metrics import matrix_to_quaternion
from dune_fast.evaluate.ranks import Ranks
from dune_fast.evaluate.relocalisation import SUBSAMPLED, mapfree_scenes
from dune_fast.heads.head import HeadError, check_encoder
from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.heads.mast3r.images import Prepared
from dune_fast.heads.mast3r.pose import RelativePose, opencv
from dune_fast.heads.mast3r.two_views import look_at
from dune_fast.infer.mast3r import check_options, prepared
from dune_fast.kernels.nn.vit import VisionTransformer

logger = logging.getLogger(__name__)

REFERENCE = "seq0/frame_00000.jpg"
"""Of a scene of the map-free benchmark."""


def predict_mapfree(
    data: Path, encoder: VisionTransformer, head: Mast3rHead, predictions: Path, *,
    pose_method: str = "pnp", long_side: int | None = None,
) -> None:  # fmt: skip
    """Writes a submission to the map-free benchmark: every fifth query frame of each scene.

    Args:
        data: see `evaluate.relocalisation`; SCENE/seq0/frame_00000.jpg is the reference.
        encoder: that the head was trained on, on its device.
        head: on the same device.
        predictions: the zip file.
        pose_method: "pnp" or "essential", see `heads.mast3r.pose`.
        long_side: pixels that the images' long side is resized to, a multiple of the patch; about 512 by default.

    Raises:
        PoseFileError: no scene, or frames without intrinsics, or with those of an image of another size.
        HeadError: encoder and head do not fit, or there is no OpenCV.
        InferenceError: an image that cannot be read.
    """
    _check(encoder, head, pose_method, long_side)
    found: dict[str, list[tuple[str, Pose]]] = {}
    failed = Failures("frames")
    scenes = [(scene, queries(scene)) for scene in mapfree_scenes(data)]
    known = [_cameras(scene / "intrinsics.txt", [REFERENCE, *frames]) for scene, frames in scenes]
    total = sum(len(frames) for _, frames in scenes)
    with Ranks().progress("poses", total, "frames") as progress:
        for (scene, frames), cameras in zip(scenes, known, strict=True):
            path = scene / "intrinsics.txt"
            reference = prepared(scene / REFERENCE, head, long_side)
            lines = found[scene.name] = []
            for name in frames:
                views = (reference, prepared(scene / name, head, long_side))
                given = [_camera(cameras, n, view, path) for n, view in zip((REFERENCE, name), views, strict=True)]
                pose = _pose(views, given, encoder, head, pose_method)
                if pose.rotation is not None and pose.translation is not None:
                    lines.append((name, _line(pose)))
                else:
                    failed.add(f"{scene.name}/{name}", pose.reason)
                progress.advance(1)
    failed.say(total)
    write_whole(predictions, submission_bytes(found))


def queries(scene: Path) -> list[str]:
    """The frames of a scene that count, as `poses.txt` names them, without the reference."""
    path = scene / "poses.txt"
    text = read_text(path)
    names = {frame_number(line.split()[0]): line.split()[0] for line in text.splitlines() if line.strip()}
    # every fifth of those that `measure_mapfree` counts, which are fewer than the lines
    return [name for frame in list(read_poses(text, path, 8))[::SUBSAMPLED] if (name := names[frame]) != REFERENCE]


def predict_poses(
    data: Path, encoder: VisionTransformer, head: Mast3rHead, predictions: Path, *,
    pose_method: str = "pnp", long_side: int | None = None,
) -> None:  # fmt: skip
    """Writes the relative pose of each pair of `data`, see `evaluate.relocalisation.measure_poses`.

    Images lie beside `data`. Intrinsics are those of intrinsics.txt there (`image fx fy cx cy W H`); without that file
    focal lengths are read off the points. Arguments and errors as of `predict_mapfree`.
    """
    _check(encoder, head, pose_method, long_side)
    pairs, lines, failed = list(read_pairs(data, strict=True)), [], Failures("pairs")
    path = data.parent / "intrinsics.txt"
    cameras = _cameras(path, [name for pair in pairs for name in pair], needed=False)
    with Ranks().progress("poses", len(pairs), "pairs") as progress:
        for names in pairs:
            views = tuple(prepared(data.parent / name, head, long_side) for name in names)
            given = None
            if cameras is not None:
                given = [_camera(cameras, name, view, path) for name, view in zip(names, views, strict=True)]
            pose = _pose(views, given, encoder, head, pose_method)
            if pose.rotation is not None and pose.translation is not None:
                values = _line(pose)
                lines.append(" ".join([*names, *(f"{v:.9g}" for v in (*values.quaternion, *values.translation))]))
            else:
                failed.add(" ".join(names), pose.reason)
            progress.advance(1)
    failed.say(len(pairs))
    write_whole(predictions, ("\n".join(lines) + "\n").encode())


class Failures:
    """Images whose pose was not found, for one sentence at the end; `unit` is what they are."""

    def __init__(self, unit: str) -> None:
        self.unit, self.count, self.first = unit, 0, ""

    def add(self, name: str, reason: str) -> None:
        self.first = self.first or f"{name}: {reason}"
        self.count += 1

    def say(self, total: int) -> None:
        if self.count:
            logger.warning("%d of %d %s have no pose; the first is %s", self.count, total, self.unit, self.first)


def _check(encoder: VisionTransformer, head: Mast3rHead, pose_method: str, long_side: int | None) -> None:
    """HeadError or InferenceError for what does not go together, before the work."""
    if not isinstance(head, Mast3rHead):
        raise HeadError(f"this is a {head.kind} head; poses need a mast3r head")
    check_encoder(head, encoder)
    check_options(pose_method, long_side, head.patch_size)
    opencv()


def _pose(
    views: tuple[Prepared, ...], cameras: list[np.ndarray] | None, encoder: VisionTransformer, head: Mast3rHead,
    pose_method: str,
) -> RelativePose:  # fmt: skip
    """Of prepared views; `cameras` are the photographs' own."""
    seen = look_at(*views, encoder, head)
    given = seen.cameras() if cameras is None else [v.intrinsics(k) for v, k in zip(views, cameras, strict=True)]
    return seen.relative_pose(seen.matches(), given, pose_method)


def _cameras(path: Path, names: list[str], needed: bool = True) -> dict[str, tuple[float, ...]] | None:
    """The lines of intrinsics.txt, before the work; None for no file where none is needed.

    PoseFileError if an image of these names is not beside it, or not in it.
    """
    if gone := [name for name in names if not (path.parent / name).is_file()]:
        raise PoseFileError(f"there is no image {path.parent / gone[0]}; {len(gone)} of {len(names)} are missing")
    if not needed and not path.is_file():
        return None
    cameras = read_intrinsics(path)
    if absent := [name for name in names if name not in cameras]:
        raise PoseFileError(f"{path} lacks the image {absent[0]}")
    return cameras


def _camera(cameras: Mapping[str, tuple[float, ...]], name: str, view: Prepared, path: Path) -> np.ndarray:
    """[3, 3] of an image's line of intrinsics.txt; PoseFileError if it is of an image of another size."""
    fx, fy, cx, cy, width, height = cameras[name]
    if (height, width) != view.original:
        raise PoseFileError(
            f"{path} has {name} with {width:g} x {height:g} pixels, and the image has {view.original[1]} x "
            f"{view.original[0]}: give the intrinsics of the image as it is"
        )
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def _line(pose: RelativePose) -> Pose:
    """The pose of camera 2 in the world of camera 1, as files have it."""
    assert pose.rotation is not None and pose.translation is not None
    quaternion = matrix_to_quaternion(torch.from_numpy(pose.rotation)).tolist()
    return Pose(tuple(quaternion), tuple(pose.translation.tolist()), float(pose.inliers))
