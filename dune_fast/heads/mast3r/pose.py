"""The relative pose of two views from matches and pointmaps, by OpenCV: x2 = R x1 + t, t in the points' unit, metres.

    pnp         view 1's points at the matches, view 2's pixels and intrinsics: SQPNP inside RANSAC, then refined
    essential   both views' pixels and intrinsics: MAGSAC, then refined; the length of t from the matches' depths

Barath et al., "MAGSAC++", CVPR 2020; Terzakis and Lourakis, "SQPNP", ECCV 2020. A pose that cannot be found is None,
with the reason; its confidence is the number of inliers. The same input gives the same pose.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np

from dune_fast.heads.head import HeadError

MIN_PNP, MIN_ESSENTIAL = 4, 5
"""Matches that determine a pose."""
_REFINED_FROM = 6
"""Inliers from which the pose is refined on all of them."""
_FARTHEST = 1000.0
"""A translation that is longer, in metres, is none of two views that show the same thing."""
_REFINEMENTS = 10
SCALES = ("consensus", "mean")


@dataclass(frozen=True)
class RelativePose:
    """x2 = rotation @ x1 + translation for a point's coordinates in both cameras' frames."""

    rotation: np.ndarray | None
    """float64 [3, 3]; None if there is no pose."""
    translation: np.ndarray | None
    """float64 [3], in metres."""
    inliers: int
    """Matches that agree with the pose: its confidence."""
    matches: int
    """Matches that it was estimated from."""
    reason: str = ""
    """Why there is no pose."""

    @property
    def camera_to_world(self) -> np.ndarray | None:
        """Camera 2 in the frame of camera 1, float64 [4, 4]."""
        if self.rotation is None or self.translation is None:
            return None
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = self.rotation.T, -self.rotation.T @ self.translation
        return pose


def opencv() -> ModuleType:
    """OpenCV, its random numbers set to their start; HeadError without it."""
    try:
        import cv2
    except ImportError as error:
        raise HeadError("poses need OpenCV: pip install 'dune-fast[heads]'") from error
    cv2.setRNGSeed(0)
    return cv2


def check_intrinsics(intrinsics: np.ndarray) -> np.ndarray:
    """A camera matrix, float64 [3, 3]; HeadError if it is none."""
    k = np.asarray(intrinsics, np.float64)
    if k.shape != (3, 3) or not np.isfinite(k).all() or k[0, 0] <= 0 or k[1, 1] <= 0 or (k[2] != (0, 0, 1)).any():
        raise HeadError(
            f"intrinsics {np.asarray(intrinsics).tolist()}: give the 3 x 3 matrix [[fx, 0, cx], [0, fy, cy], "
            "[0, 0, 1]] in pixels, with positive focal lengths"
        )
    return k


def pnp(
    points: np.ndarray, pixels: np.ndarray, intrinsics: np.ndarray, *,
    threshold: float = 5.0, iterations: int = 10_000, confidence: float = 0.9999,
) -> RelativePose:  # fmt: skip
    """The pose of the camera that sees points at pixels.

    Args:
        points: [N, 3] in the frame of camera 1, or of the world.
        pixels: [N, 2], (x, y) in view 2, pixel centres at integers.
        intrinsics: of view 2, [3, 3].
        threshold: largest reprojection error of an inlier, in pixels.
        iterations, confidence: of RANSAC.

    Raises:
        HeadError: no OpenCV, or no camera matrix.
    """
    k, count = check_intrinsics(intrinsics), len(points)
    finite = np.isfinite(points).all(1) & np.isfinite(pixels).all(1)
    if finite.sum() < MIN_PNP:
        return _none(count, f"{finite.sum()} matches; a pose needs {MIN_PNP}")
    cv2 = opencv()
    world, seen = (np.ascontiguousarray(x[finite], np.float64) for x in (points, pixels))
    try:
        found, rotation, translation, inliers = cv2.solvePnPRansac(
            world, seen, k, None, iterationsCount=iterations, reprojectionError=threshold, confidence=confidence,
            flags=cv2.SOLVEPNP_SQPNP,
        )  # fmt: skip
    except cv2.error:  # points that determine nothing, e.g. all the same
        found, inliers = False, None
    if not found or inliers is None or len(inliers) < MIN_PNP:
        return _none(count, f"RANSAC found no pose that {MIN_PNP} of {count} matches agree with")
    chosen = inliers[:, 0]
    if len(chosen) >= _REFINED_FROM:
        rotation, translation = cv2.solvePnPRefineLM(world[chosen], seen[chosen], k, None, rotation, translation)
    return _checked(cv2.Rodrigues(rotation)[0], translation[:, 0], len(chosen), count)


def essential(
    pixels1: np.ndarray, pixels2: np.ndarray, intrinsics1: np.ndarray, intrinsics2: np.ndarray,
    depth1: np.ndarray, depth2: np.ndarray, *,
    threshold: float = 2.0, confidence: float = 0.9999, scale: str = "consensus", scale_threshold: float = 0.1,
) -> RelativePose:  # fmt: skip
    """The pose between two views, its direction from their matches, its length from their depths.

    Args:
        pixels1, pixels2: [N, 2] each, (x, y), pixel centres at integers.
        intrinsics1, intrinsics2: [3, 3].
        depth1, depth2: [N] each, z of the matches in their own camera's frame, in metres; 0 or not finite: not known.
        threshold: distance of an inlier from its epipolar line, in pixels.
        confidence: of MAGSAC.
        scale: "consensus" for the length that most inliers agree with, "mean" for that of their mean.
        scale_threshold: how far lengths may differ that agree, in metres.

    Returns:
        With "consensus" the inliers are the matches that agree with the length.

    Raises:
        HeadError: no OpenCV, no camera matrix, or another `scale`.
    """
    if scale not in SCALES:
        raise HeadError(f"scale {scale!r} is unknown; choose one of {', '.join(SCALES)}")
    k1, k2, count = check_intrinsics(intrinsics1), check_intrinsics(intrinsics2), len(pixels1)
    if count < MIN_ESSENTIAL:
        return _none(count, f"{count} matches; an essential matrix needs {MIN_ESSENTIAL}")
    cv2 = opencv()
    rays1, rays2 = _rays(pixels1, k1), _rays(pixels2, k2)
    focal = np.mean([k1[0, 0], k1[1, 1], k2[0, 0], k2[1, 1]])
    flat1, flat2 = (np.ascontiguousarray(rays[:, :2]) for rays in (rays1, rays2))
    try:
        matrices, agreeing = cv2.findEssentialMat(
            flat1, flat2, np.eye(3), method=cv2.USAC_MAGSAC, prob=confidence, threshold=threshold / focal
        )
    except cv2.error:
        matrices = None
    if matrices is None:
        return _none(count, f"MAGSAC found no essential matrix that fits {count} matches")
    best, rotation, direction, inside = 0, np.eye(3), np.zeros(3), np.zeros(count, bool)
    for matrix in np.split(matrices, len(matrices) // 3):  # some configurations have several solutions
        in_front, r, t, mask = cv2.recoverPose(matrix, flat1, flat2, np.eye(3), 1e9, mask=agreeing.copy())[:4]
        if in_front > best:
            best, rotation, direction, inside = in_front, r, t[:, 0], mask[:, 0] > 0
    if best < MIN_ESSENTIAL:
        return _none(
            count,
            f"{best} of {count} matches lie in front of both cameras; a pose needs {MIN_ESSENTIAL}. Views from one "
            "place have no essential matrix, but a pose by pnp",
        )
    rotation, direction = _refined(rays1[inside], rays2[inside], rotation, direction)
    depths = np.stack([np.asarray(depth1, np.float64), np.asarray(depth2, np.float64)])
    known = inside & np.isfinite(depths).all(0) & (depths > 0).all(0)
    if not known.any():
        return _none(count, "no match has a depth in both views, so the length of the translation is not known")
    lengths = (rays2[known] * depths[1, known, None] - rays1[known] * depths[0, known, None] @ rotation.T) @ direction
    length, agree = _consensus(lengths, scale_threshold) if scale == "consensus" else (lengths.mean(), best)
    if length <= 0:
        return _none(count, "the depths of both views contradict the direction of the translation")
    return _checked(rotation, direction * length, agree, count)


def _rays(pixels: np.ndarray, k: np.ndarray) -> np.ndarray:
    """[N, 3], the points at depth 1 that are seen at pixels [N, 2]."""
    return np.column_stack([np.asarray(pixels, np.float64), np.ones(len(pixels))]) @ np.linalg.inv(k).T


def _sampson(rays1: np.ndarray, rays2: np.ndarray, rotation: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """[N], the distances of matches [N, 3] from the epipolar geometry, to first order, at focal length 1."""
    matrix = np.cross(direction, rotation, axis=0)
    lines2, lines1 = rays1 @ matrix.T, rays2 @ matrix
    return (rays2 * lines2).sum(1) / np.sqrt((lines1[:, :2] ** 2).sum(1) + (lines2[:, :2] ** 2).sum(1) + 1e-18)


def _refined(
    rays1: np.ndarray, rays2: np.ndarray, rotation: np.ndarray, direction: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rotation and direction with the least sum of squared `_sampson`, by Gauss-Newton from those of RANSAC.

    MAGSAC's own result is rough: of 210 matches with 0.3 pixels of noise it was 1.5 degrees off, refined 0.1.
    """
    cv2, step = opencv(), 1e-6
    best = _sampson(rays1, rays2, rotation, direction)
    for _ in range(_REFINEMENTS):
        sideways = np.linalg.svd(direction[None])[2][1:]  # two directions across t, [2, 3]

        def moved(change: np.ndarray, r=rotation, t=direction, s=sideways) -> tuple[np.ndarray, np.ndarray]:
            turned = t + change[3:] @ s
            return cv2.Rodrigues(change[:3])[0] @ r, turned / np.linalg.norm(turned)

        slopes = [(_sampson(rays1, rays2, *moved(step * unit)) - best) / step for unit in np.eye(5)]
        r, t = moved(np.linalg.lstsq(np.stack(slopes, 1), -best, rcond=None)[0])
        errors = _sampson(rays1, rays2, r, t)
        if not errors @ errors < best @ best:
            break
        rotation, direction, best = r, t, errors
    return rotation, direction


def _consensus(lengths: np.ndarray, threshold: float) -> tuple[float, int]:
    """The one of [N] lengths with most others, itself included, closer than the threshold, and how many they are."""
    ordered = np.sort(lengths)
    low = np.searchsorted(ordered, ordered - threshold, "right")
    high = np.searchsorted(ordered, ordered + threshold, "left")
    at = int(np.argmax(high - low))
    return float(ordered[at]), int((high - low)[at])


def _checked(rotation: np.ndarray, translation: np.ndarray, inliers: int, matches: int) -> RelativePose:
    """The pose, or none if it is senseless."""
    length = np.linalg.norm(translation)
    if not np.isfinite(rotation).all() or not length <= _FARTHEST:
        return _none(matches, f"the translation came out as {length:g} m, which is no pose of overlapping views")
    return RelativePose(rotation, translation, inliers, matches)


def _none(matches: int, reason: str) -> RelativePose:
    return RelativePose(None, None, 0, matches, reason)
