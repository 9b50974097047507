"""Poses by MASt3R's head for the tasks `mapfree` and `pose`, written as their predictions.

A pair is looked at as by `dune-fast infer mast3r`: view 1 is the reference or first image, view 2 the query or second.
The confidence of a pose is the number of its inliers; a query whose pose is not found has no line.
"""

from __future__ import annotations

import logging
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
    read_text,
    submission_bytes,
)
from dune_fast.evaluate.pose_metrics import matrix_to_quaternion
from dune_fast.evaluate.ranks import Ranks
from dune_fast.evaluate.relocalisation import SUBSAMPLED, mapfree_scenes
from dune_fast.heads.head import HeadError, check_encoder
from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.heads.mast3r.images import Prepared, prepare
from dune_fast.heads.mast3r.pose import RelativePose, opencv
from dune_fast.heads.mast3r.two_views import look_at
from dune_fast.infer.files import read_image
from dune_fast.infer.mast3r import check_options
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
        PoseFileError: no scene, or frames without intrinsics.
        HeadError: encoder and head do not fit, or there is no OpenCV.
        InferenceError: an image that cannot be read.
    """
    _check(encoder, head, pose_method, long_side)
    found: dict[str, list[tuple[str, Pose]]] = {}
    scenes = [(scene, queries(scene)) for scene in mapfree_scenes(data)]
    with Ranks().progress("poses", sum(len(frames) for _, frames in scenes), "frames") as progress:
        for scene, frames in scenes:
            cameras = read_intrinsics(scene / "intrinsics.txt")
            if absent := [name for name in (REFERENCE, *frames) if name not in cameras]:
                raise PoseFileError(f"{scene / 'intrinsics.txt'} lacks the frame {absent[0]}")
            reference = _prepared(scene / REFERENCE, head, long_side)
            lines = found[scene.name] = []
            for name in frames:
                views = (reference, _prepared(scene / name, head, long_side))
                pose = _pose(views, [_matrix(cameras[n]) for n in (REFERENCE, name)], encoder, head, pose_method)
                if pose.rotation is not None and pose.translation is not None:
                    lines.append((name, _line(pose)))
                progress.advance(1)
    write_whole(predictions, submission_bytes(found))


def queries(scene: Path) -> list[str]:
    """The frames of a scene that count, as `poses.txt` names them, without the reference."""
    lines = [line.split() for line in read_text(scene / "poses.txt").splitlines()]
    names = {frame_number(words[0]): words[0] for words in lines if len(words) == 8}
    return [name for name in list(names.values())[::SUBSAMPLED] if name != REFERENCE]


def predict_poses(
    data: Path, encoder: VisionTransformer, head: Mast3rHead, predictions: Path, *,
    pose_method: str = "pnp", long_side: int | None = None,
) -> None:  # fmt: skip
    """Writes the relative pose of each pair of `data`, see `evaluate.relocalisation.measure_poses`.

    Images lie beside `data`. Intrinsics are those of intrinsics.txt there (`image fx fy cx cy W H`); without that file
    focal lengths are read off the points. Arguments and errors as of `predict_mapfree`.
    """
    _check(encoder, head, pose_method, long_side)
    pairs, cameras, lines = list(read_pairs(data, strict=True)), None, []
    if (data.parent / "intrinsics.txt").is_file():
        cameras = read_intrinsics(data.parent / "intrinsics.txt")
    with Ranks().progress("poses", len(pairs), "pairs") as progress:
        for names in pairs:
            if cameras and (absent := [name for name in names if name not in cameras]):
                raise PoseFileError(f"{data.parent / 'intrinsics.txt'} lacks the image {absent[0]}")
            given = [_matrix(cameras[name]) for name in names] if cameras else None
            views = tuple(_prepared(data.parent / name, head, long_side) for name in names)
            pose = _pose(views, given, encoder, head, pose_method)
            if pose.rotation is not None and pose.translation is not None:
                values = _line(pose)
                lines.append(" ".join([*names, *(f"{v:.9g}" for v in (*values.quaternion, *values.translation))]))
            progress.advance(1)
    write_whole(predictions, ("\n".join(lines) + "\n").encode())


def _check(encoder: VisionTransformer, head: Mast3rHead, pose_method: str, long_side: int | None) -> None:
    """HeadError or InferenceError for what does not go together, before the work."""
    if not isinstance(head, Mast3rHead):
        raise HeadError(f"this is a {head.kind} head; poses need a mast3r head")
    check_encoder(head, encoder)
    check_options(pose_method, long_side, head.patch_size)
    opencv()


def _prepared(path: Path, head: Mast3rHead, long_side: int | None) -> Prepared:
    return prepare(read_image(path), head.patch_size, long_side, square_ok=head.norm is not None)


def _pose(
    views: tuple[Prepared, ...], cameras: list[np.ndarray] | None, encoder: VisionTransformer, head: Mast3rHead,
    pose_method: str,
) -> RelativePose:  # fmt: skip
    """Of prepared views; `cameras` are the photographs' own."""
    seen = look_at(*views, encoder, head)
    given = seen.cameras() if cameras is None else [v.intrinsics(k) for v, k in zip(views, cameras, strict=True)]
    return seen.relative_pose(seen.matches(), given, pose_method)


def _matrix(values: tuple[float, ...]) -> np.ndarray:
    """[3, 3] of fx, fy, cx, cy, width, height."""
    fx, fy, cx, cy = values[:4]
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def _line(pose: RelativePose) -> Pose:
    """The pose of camera 2 in the world of camera 1, as files have it."""
    assert pose.rotation is not None and pose.translation is not None
    quaternion = matrix_to_quaternion(torch.from_numpy(pose.rotation)).tolist()
    return Pose(tuple(quaternion), tuple(pose.translation.tolist()), float(pose.inliers))
