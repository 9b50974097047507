"""Map-free relocalisation and relative poses: files of poses against the truth.

`--task mapfree` measures a submission to the map-free benchmark (Arnold et al., ECCV 2022):

    DATA/SCENE/poses.txt          frame qw qx qy qz tx ty tz        world to camera; the reference is the world
    DATA/SCENE/intrinsics.txt     frame fx fy cx cy W H             pixels
    SUBMISSION/pose_SCENE.txt     frame qw qx qy qz tx ty tz confidence       a folder, or a zip of them

Entries are known by the number in a frame's name, so the reference's frame 0 gives way to the query's; every fifth
entry of a scene counts. `--task pose` measures relative poses of pairs of images, see `measure_poses`.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dune_fast.evaluate.pose_files import (
    Pose,
    PoseFileError,
    frame_number,
    read_intrinsics,
    read_pairs,
    read_poses,
    read_submission,
    read_text,
)
from dune_fast.evaluate.pose_metrics import (
    centres,
    direction_errors,
    pose_accuracies,
    precision_and_auc,
    quaternion_to_matrix,
    reprojection_errors,
    rotation_errors,
)

logger = logging.getLogger(__name__)

SUBSAMPLED = 5
"""One of so many entries of a scene counts."""
VCRE_PIXELS = (90, 45)
"""Below which a reprojection error is good."""
POSE_METRES, POSE_DEGREES = 0.25, 5.0
"""Below which a pose is good."""


class SceneErrors(NamedTuple):
    """Of the estimates of one scene, [F] each."""

    translation: Tensor
    """Metres between the cameras' centres."""
    rotation: Tensor
    """Degrees."""
    reprojection: Tensor
    """VCRE in pixels."""
    confidence: Tensor


def measure_mapfree(data: Path, predictions: Path) -> dict[str, Any]:
    """The benchmark's metrics of a submission.

    Args:
        data: folder with a folder a scene, such as the benchmark's `val`.
        predictions: the submission, a folder or a zip file.

    Returns:
        "metrics", by the benchmark's names; "frames" that count, "missing" ones; "scenes"; "missing_scenes", names.

    Raises:
        PoseFileError: no scene, no file of a scene, a truth that cannot be read, or a file that is no zip.
    """
    scenes = mapfree_scenes(data)
    found = read_submission(predictions)
    if unknown := sorted(found.keys() - {scene.name for scene in scenes}):
        logger.warning("%s: there is no scene %s in %s; it is left out", predictions, ", ".join(unknown[:4]), data)
    if not found.keys() & {scene.name for scene in scenes}:
        raise PoseFileError(f"{predictions} has no pose_SCENE.txt of the scenes of {data}, such as {scenes[0].name}")
    errors, missing, absent = [], 0, []
    for scene in scenes:
        truth = read_poses(read_text(scene / "poses.txt"), scene / "poses.txt", 8)
        if not truth:
            raise PoseFileError(f"{scene / 'poses.txt'} has no pose: lines are `frame qw qx qy qz tx ty tz`")
        if scene.name not in found:
            missing += len(truth)  # all of them, as the benchmark does, and not a fifth
            absent.append(scene.name)
            continue
        where = Path(f"{predictions}/pose_{scene.name}.txt")
        estimated = read_poses(found[scene.name], where, 9)
        counted = {frame: truth[frame] for frame in list(truth)[::SUBSAMPLED]}
        both = [frame for frame in counted if frame in estimated]
        missing += len(counted) - len(both)
        if both:
            named = read_intrinsics(scene / "intrinsics.txt")
            cameras = {frame_number(name): values for name, values in named.items()}
            if unknown := [frame for frame in both if frame not in cameras]:
                raise PoseFileError(f"{scene / 'intrinsics.txt'} lacks the frame {unknown[0]}")
            intrinsics = torch.tensor([cameras[frame] for frame in both], dtype=torch.float64)
            errors.append(scene_errors([estimated[f] for f in both], [counted[f] for f in both], intrinsics))
    metrics = mapfree_metrics(errors, missing)
    frames = missing + sum(len(scene.confidence) for scene in errors)
    return {
        "metrics": metrics, "frames": frames, "missing": missing, "scenes": len(scenes), "missing_scenes": absent
    }  # fmt: skip


def mapfree_scenes(data: Path) -> list[Path]:
    """The folders of the scenes, sorted; PoseFileError if there is none."""
    scenes = sorted(path.parent for path in data.glob("*/poses.txt"))
    if not scenes:
        raise PoseFileError(f"{data} has no scene: folders with poses.txt and intrinsics.txt are expected in it")
    return scenes


def scene_errors(estimated: list[Pose], truth: list[Pose], intrinsics: Tensor) -> SceneErrors:
    """Errors of F estimates; `intrinsics`: [F, 6], fx, fy, cx, cy, width, height in pixels."""

    def tensors(poses: list[Pose]) -> tuple[Tensor, Tensor]:
        quaternions = torch.tensor([pose.quaternion for pose in poses], dtype=torch.float64)
        return quaternion_to_matrix(quaternions), torch.tensor([p.translation for p in poses], dtype=torch.float64)

    ours, true = tensors(estimated), tensors(truth)
    return SceneErrors(
        (centres(*ours) - centres(*true)).norm(dim=-1),
        rotation_errors(ours[0], true[0]),
        reprojection_errors(ours, true, intrinsics[:, :4], intrinsics[:, 4:]),
        torch.tensor([pose.confidence for pose in estimated], dtype=torch.float64),
    )


def mapfree_metrics(scenes: list[SceneErrors], missing: int) -> dict[str, float]:
    """The benchmark's numbers, by its names: medians are of scenes, then averaged; shares are of all frames.

    Args:
        scenes: those with at least one estimate.
        missing: frames without an estimate.
    """
    translation, rotation, reprojection, confidence = (
        torch.cat([scene[i] for scene in scenes]) if scenes else torch.zeros(0, dtype=torch.float64) for i in range(4)
    )

    def medians(name: str) -> float:
        found = [torch.quantile(getattr(scene, name), 0.5) for scene in scenes]
        return torch.stack(found).mean().item() if found else math.nan

    result = {
        "Average Median Translation Error": medians("translation"),
        "Average Median Rotation Error": medians("rotation"),
        "Average Median Reprojection Error": medians("reprojection"),
    }
    good = (translation < POSE_METRES) & (rotation < POSE_DEGREES)
    rules = {f"Pose Error < ({100 * POSE_METRES}cm, {POSE_DEGREES:g}deg)": good}
    rules |= {f"VCRE < {pixels}px": reprojection < pixels for pixels in VCRE_PIXELS}
    for name, accepted in rules.items():
        precision, auc = precision_and_auc(confidence, accepted, missing)
        result |= {f"Precision @ {name}": precision, f"AUC @ {name}": auc}
    total = len(confidence) + missing
    return result | {"Estimates for % of frames": len(confidence) / total if total else 0.0}


def measure_poses(data: Path, predictions: Path) -> dict[str, Any]:
    """RRA, RTA and mAA of relative poses of pairs of images.

    Both files have a line a pair, `first second qw qx qy qz tx ty tz`: two names of images, and the pose that takes
    points of the first camera to the second. The length of a translation does not count. A pair without an estimate
    counts as wrong; an empty file estimates none. Raises PoseFileError for files that cannot be read, a line of the
    truth included.
    """
    truth, estimated = read_pairs(data, strict=True), read_pairs(predictions)
    if not truth:
        raise PoseFileError(f"{data} has no pair: lines are `first second qw qx qy qz tx ty tz`")
    if read_text(predictions).strip() and not any(pair in estimated for pair in truth):
        raise PoseFileError(f"{predictions} has no pair of {data}; one of them is {' '.join(next(iter(truth)))}")
    rotation = torch.full((len(truth),), math.inf, dtype=torch.float64)
    translation = rotation.clone()
    for i, (pair, true) in enumerate(truth.items()):
        if (found := estimated.get(pair)) is not None:
            matrices = (quaternion_to_matrix(torch.tensor(pose.quaternion)) for pose in (found, true))
            rotation[i] = rotation_errors(*matrices)
            translation[i] = direction_errors(torch.tensor(found.translation), torch.tensor(true.translation))
    missing = sum(pair not in estimated for pair in truth)
    return {"metrics": pose_accuracies(rotation, translation), "pairs": len(truth), "missing": missing}
