"""Two photographs to points, matches and the relative pose of their cameras: `dune-fast infer mast3r`.

    pair.npz      points [h, w, 3] of both images in the frame of camera 1, confidences, depths, matches, cameras, pose
    points.ply    the confident points with their colours
    matches.png   both images with lines between matches, and their depths

Matches and cameras are in pixels of the photographs (turned upright), pixel centres at integers. Lengths are in metres
where the head was trained on metres. x2 = rotation @ x1 + translation for a point in the frames of cameras 1 and 2.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.heads.head import Head, HeadError, check_encoder
from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.heads.mast3r.images import Prepared, prepare
from dune_fast.heads.mast3r.matching import Matches
from dune_fast.heads.mast3r.pair_check import camera_problem
from dune_fast.heads.mast3r.pose import RelativePose, check_intrinsics, opencv
from dune_fast.heads.mast3r.two_views import POSE_METHODS, TwoViews, look_at
from dune_fast.infer.files import InferenceError, read_image
from dune_fast.infer.mast3r_files import draw_matches, write_ply
from dune_fast.kernels.nn.vit import VisionTransformer, nearest_multiples
from dune_fast.teachers.local_paths import result_folder

logger = logging.getLogger(__name__)

_FEW_MATCHES, _FEW_INLIERS = 50, 25
"""Fewer do not show that two images are of the same place."""


def run(
    images: Sequence[Path], encoder: VisionTransformer, head: Head, out: Path, *,
    intrinsics: np.ndarray | None = None, pose_method: str = "pnp", long_side: int | None = None, step: int = 8,
    confidence: float = 1.001, points_confidence: float = 1.5,
) -> list[dict[str, Any]]:  # fmt: skip
    """Writes the files of a pair, see the top of this file, and logs what was found.

    Args:
        images: two files; the first one is view 1, whose camera is the origin.
        encoder: that the head was trained on, on its device.
        head: on the same device.
        out: folder of the results.
        intrinsics: [3, 3] of both photographs, which then have one size, or [2, 3, 3]; None reads focal lengths off
            the points and takes the middle of the images as principal points.
        pose_method: "pnp" or "essential", see `heads.mast3r.pose`.
        long_side: pixels that the images' long side is resized to, a multiple of the patch; about 512 by default.
        step: pixels between the start pixels of the matching.
        confidence: a match's, at least.
        points_confidence: a point's in points.ply, at least.

    Returns:
        One entry: `images`, `matches` (number), `inliers`, `rotation` and `translation` (None, with a `reason`, where
        no pose was found), `points` (number in points.ply), `files`.

    Raises:
        HeadError: encoder and head do not fit, or there is no OpenCV.
        InferenceError: not two images, one that cannot be read, or an option without sense.
        ResultPathError: `out` cannot be written.
    """
    if not isinstance(head, Mast3rHead):
        raise HeadError(f"this is a {head.kind} head; points and poses of pairs need a mast3r head")
    check_encoder(head, encoder)
    _check(images, pose_method, long_side, step, (confidence, points_confidence), head.patch_size)
    given = None if intrinsics is None else _two_cameras(intrinsics)
    opencv()  # without it, say so before the work
    if head.encoder_name:  # another one of its width would be taken, and give nonsense
        logger.info("the head was trained on the encoder %s", head.encoder_name)
    names = [Path(path).name for path in images]
    views = [prepared(Path(path), head, long_side) for path in images]
    if step > (shortest := min(min(view.size) for view in views)):
        raise InferenceError(f"step {step}: the shorter side of the resized images is {shortest} px; give at most that")
    if given is not None:
        _check_sizes(names, views, given, one=np.ndim(intrinsics) == 2)
    result_folder(out)
    seen = look_at(*views, encoder, head)
    matches = seen.matches(step, confidence)
    cameras = seen.cameras() if given is None else [v.intrinsics(k) for v, k in zip(views, given, strict=True)]
    pose = seen.relative_pose(matches, cameras, pose_method)
    original = [None if k is None else view.original_intrinsics(k) for view, k in zip(views, cameras, strict=True)]
    kept = [conf >= points_confidence for conf in seen.conf]
    files = _write(out, views, seen, matches, original, pose, kept)
    _say(names, seen, matches, original if given is None else None, pose, pose_method, confidence)
    count = sum(int(mask.sum()) for mask in kept)
    (logger.info if count else logger.warning)("%d points of confidence %g or more", count, points_confidence)
    for path in files:
        logger.info("wrote %s", path)
    return [{
        "images": [str(path) for path in images], "matches": len(matches.xy1), "inliers": pose.inliers,
        "rotation": None if pose.rotation is None else pose.rotation.tolist(),
        "translation": None if pose.translation is None else pose.translation.tolist(),
        "reason": pose.reason, "points": count, "files": [str(path) for path in files],
    }]  # fmt: skip


def prepared(path: Path, head: Mast3rHead, long_side: int | None) -> Prepared:
    """A photograph for the network; InferenceError if it cannot be read, or is less than a patch wide."""
    photograph = read_image(path)
    try:
        # the released MASt3R was not trained on square images, DUNE's is used on them
        return prepare(photograph, head.patch_size, long_side, square_ok=head.norm is not None)
    except HeadError as error:
        raise InferenceError(f"{path}: {error}") from error


def _check(
    images: Sequence[Path], pose_method: str, long_side: int | None, step: int, confidences: Sequence[float], patch: int
) -> None:
    """InferenceError for options that make no sense."""
    if len(images) != 2:
        raise InferenceError(f"a pair is two images, got {len(images)}: name the first and the second view")
    check_options(pose_method, long_side, patch)
    if step < 1:
        raise InferenceError(f"step {step}: give pixels between the start pixels of the matching, 1 or more")
    if np.isnan(confidences).any():
        raise InferenceError("a confidence is nan: give numbers from which matches and points count")


def check_options(pose_method: str, long_side: int | None, patch: int) -> None:
    """InferenceError for a pose method that there is not, or a long side that is no multiple of the patch."""
    if pose_method not in POSE_METHODS:
        raise InferenceError(f"pose method {pose_method!r} is unknown; choose one of {', '.join(POSE_METHODS)}")
    if long_side is not None and (long_side < patch or long_side % patch):
        raise InferenceError(
            f"a long side of {long_side} pixels is not a multiple of the patch size {patch}; the nearest are "
            f"{nearest_multiples(long_side, patch)}"
        )


def _two_cameras(intrinsics: np.ndarray) -> list[np.ndarray]:
    """Camera matrices of both images; HeadError for what is none."""
    k = np.asarray(intrinsics, np.float64)
    return [check_intrinsics(one) for one in (k if k.ndim == 3 and len(k) == 2 else (k, k))]


def _check_sizes(names: Sequence[str], views: Sequence[Prepared], cameras: Sequence[np.ndarray], one: bool) -> None:
    """InferenceError for one camera of photographs of two sizes; warns of cameras that are hardly the photographs'."""
    sizes = [view.original[::-1] for view in views]
    if one and sizes[0] != sizes[1]:
        raise InferenceError(
            f"{names[0]} has {sizes[0][0]} x {sizes[0][1]} pixels, {names[1]} {sizes[1][0]} x {sizes[1][1]}, and one "
            "camera is given for both: give the intrinsics of the first and of the second, eight numbers"
        )
    for name, size, camera in zip(names, sizes, cameras, strict=True):
        if problem := camera_problem(camera, size):
            logger.warning("by the given intrinsics, %s %s", name, problem)


def _write(
    out: Path, views: Sequence[Prepared], seen: TwoViews, matches: Matches, cameras: Sequence[np.ndarray | None],
    pose: RelativePose, kept: Sequence[np.ndarray],
) -> list[Path]:  # fmt: skip
    """The three files; cameras are in the photographs' pixels, `kept` are the masks of the points of the cloud."""
    nowhere = np.full((3, 3), np.nan)
    xy = [x.cpu().numpy() for x in matches[:2]]
    arrays: dict[str, np.ndarray] = {
        "match_confidence": matches.confidence.cpu().numpy(),
        "rotation": nowhere if pose.rotation is None else pose.rotation,
        "translation": nowhere[0] if pose.translation is None else pose.translation,
        "inliers": np.array(pose.inliers), "reason": np.array(pose.reason),
    }  # fmt: skip
    for i, view in enumerate(views):
        k = cameras[i]
        arrays |= {
            f"points{i + 1}": seen.points[i], f"conf{i + 1}": seen.conf[i], f"depth{i + 1}": seen.depths[i],
            f"matches{i + 1}": view.to_original(xy[i]), f"intrinsics{i + 1}": nowhere if k is None else k,
            f"scale{i + 1}": np.array(view.scale), f"offset{i + 1}": np.array(view.offset),
        }  # fmt: skip
    paths = [out / name for name in ("pair.npz", "points.ply", "matches.png")]
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_whole(paths[0], file.getvalue())
    points, colours = (
        np.concatenate([x[k] for x, k in zip(maps, kept, strict=True)])
        for maps in (seen.points, [view.colours for view in views])
    )
    write_ply(paths[1], points, colours)
    draw_matches(paths[2], [view.colours for view in views], xy, seen.depths)
    return paths


def _say(
    names: Sequence[str], seen: TwoViews, matches: Matches, estimated: Sequence[np.ndarray | None] | None,
    pose: RelativePose, method: str, confidence: float,
) -> None:  # fmt: skip
    """Logs the result in a few sentences."""
    count, conf = len(matches.xy1), [float(np.median(c)) for c in seen.conf]
    logger.info("%s, %s: %d matches of confidence %g or more", *names, count, confidence)
    logger.info("median confidence of the points: %.2f and %.2f", *conf)
    if estimated is not None and all(k is not None for k in estimated):
        focal = [k[0, 0] for k in estimated if k is not None]
        logger.info("focal lengths, read off the points: %.1f and %.1f pixels; better give the intrinsics", *focal)
    if pose.rotation is None or pose.translation is None:
        logger.warning("no pose: %s", pose.reason)
    else:
        angle = np.degrees(np.arccos(np.clip((np.trace(pose.rotation) - 1) / 2, -1, 1)))
        length = np.linalg.norm(pose.translation)
        logger.info("camera 2 by %s: x2 = R x1 + t, with %d of %d matches", method, pose.inliers, pose.matches)
        for row, t in zip(pose.rotation, pose.translation, strict=True):
            logger.info("  R %9.5f %9.5f %9.5f   t %9.4f m", *row, t)
        logger.info("  turned by %.2f degrees, moved by %.3f m", angle, length)
    if count < _FEW_MATCHES or (not pose.reason and pose.inliers < _FEW_INLIERS):
        what = f"{count} matches alone" if count < _FEW_MATCHES else f"{pose.inliers} matches alone agree with the pose"
        logger.warning("%s: the images may not show the same place; do not trust the pose", what)
