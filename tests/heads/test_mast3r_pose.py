"""Relative poses of two cameras whose geometry is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from dune_fast.heads.head import HeadError
from dune_fast.heads.mast3r.pose import RelativePose, essential, pnp

pytest.importorskip("cv2")
K1 = np.array([[400.0, 0, 255.5], [0, 410, 191.5], [0, 0, 1]])
K2 = np.array([[500.0, 0, 250], [0, 505, 200], [0, 0, 1]])


def rotation(axis: tuple[float, float, float], degrees: float) -> np.ndarray:
    """By Rodrigues' formula."""
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross, angle = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]), np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


R, T = rotation((0.2, 1, -0.1), 20), np.array([-1.2, 0.1, 0.3])


def scene(count: int = 300, outliers: float = 0.3, noise: float = 0.3) -> dict[str, np.ndarray]:
    """Points in front of two cameras, their pixels with noise, some of view 2's at random places."""
    draw = np.random.default_rng(0)
    x1 = draw.uniform((-2, -1.5, 3), (2, 1.5, 8), (count, 3))
    x2 = x1 @ R.T + T
    pixels1, pixels2 = ((x @ k.T / x[:, 2:])[:, :2] for x, k in ((x1, K1), (x2, K2)))
    pixels1, pixels2 = (p + draw.normal(0, noise, p.shape) for p in (pixels1, pixels2))
    wrong = draw.permutation(count)[: int(outliers * count)]
    pixels2[wrong] = draw.uniform(0, 400, (len(wrong), 2))
    return {"x1": x1, "pixels1": pixels1, "pixels2": pixels2, "depth1": x1[:, 2], "depth2": x2[:, 2]}


def errors(found: RelativePose) -> tuple[float, float]:
    """Degrees and metres."""
    assert found.rotation is not None and found.translation is not None, found.reason
    cosine = (np.trace(found.rotation.T @ R) - 1) / 2
    return float(np.degrees(np.arccos(min(cosine, 1)))), float(np.linalg.norm(found.translation - T))


def test_pnp_finds_the_pose():
    s = scene()
    found = pnp(s["x1"], s["pixels2"], K2)
    degrees, metres = errors(found)
    assert degrees < 0.1 and metres < 0.01 and 210 <= found.inliers <= 216 and found.matches == 300
    pose = found.camera_to_world
    np.testing.assert_allclose(pose[:3, :3] @ T + pose[:3, 3], 0, atol=0.01)  # camera 2's centre is where x2 = 0
    again = pnp(s["x1"], s["pixels2"], K2)
    assert np.array_equal(found.rotation, again.rotation) and np.array_equal(found.translation, again.translation)


@pytest.mark.parametrize("scale", ["consensus", "mean"])
def test_the_essential_matrix_finds_the_pose_and_depths_its_length(scale):
    s = scene()
    depth1, depth2 = s["depth1"].copy(), s["depth2"].copy()
    depth1[::7], depth2[3::7] = 0, np.nan  # not known
    if scale == "consensus":
        depth1[1::7] *= 1.5  # wrong: the mean of the lengths would follow
    found = essential(s["pixels1"], s["pixels2"], K1, K2, depth1, depth2, scale=scale)
    degrees, metres = errors(found)
    assert degrees < 0.15 and metres < 0.06  # without the refinement 1.5 degrees
    assert found.inliers > (80 if scale == "consensus" else 200)
    again = essential(s["pixels1"], s["pixels2"], K1, K2, depth1, depth2, scale=scale)
    assert np.array_equal(found.rotation, again.rotation) and np.array_equal(found.translation, again.translation)


def test_without_enough_matches_there_is_no_pose():
    s = scene(3)
    for found in (
        pnp(s["x1"], s["pixels2"], K2),
        essential(s["pixels1"], s["pixels2"], K1, K2, s["depth1"], s["depth2"]),
    ):
        assert found.rotation is None and found.translation is None and found.camera_to_world is None
        assert (found.inliers, found.matches) == (0, 3) and found.reason.startswith("3 matches; ")


def test_matches_that_determine_nothing_give_no_pose():
    draw = np.random.default_rng(1)
    same, elsewhere = np.zeros((20, 3)), draw.uniform(0, 400, (20, 2))
    assert "RANSAC found no pose" in pnp(same, elsewhere, K2, iterations=50).reason
    assert pnp(np.full((20, 3), np.nan), elsewhere, K2).reason == "0 matches; a pose needs 4"
    pixels = np.zeros((20, 2))
    assert "no essential matrix" in essential(pixels, pixels, K1, K2, np.ones(20), np.ones(20)).reason
    s = scene(100)
    unknown = essential(s["pixels1"], s["pixels2"], K1, K2, s["depth1"], np.zeros(100))
    assert "no match has a depth in both views" in unknown.reason
    behind = essential(s["pixels1"], s["pixels2"], K1, K2, s["depth1"] * 0.01, s["depth2"] * 100)
    behind = behind if behind.rotation is None else essential(
        s["pixels1"], s["pixels2"], K1, K2, s["depth1"] * 100, s["depth2"] * 0.01
    )  # fmt: skip
    assert "contradict the direction" in behind.reason


def test_a_translation_beyond_reason_is_no_pose():
    s = scene()
    assert "is no pose of overlapping views" in pnp(s["x1"] * 1e4, s["pixels2"], K2).reason


@pytest.mark.parametrize("wrong", [np.eye(4), np.diag([-1.0, 1, 1]), np.diag([1.0, np.nan, 1]), np.diag([1.0, 1, 2])])
def test_intrinsics_that_are_none_are_refused(wrong):
    s = scene(10)
    with pytest.raises(HeadError, match="give the 3 x 3 matrix"):
        pnp(s["x1"], s["pixels2"], wrong)
    with pytest.raises(HeadError, match="give the 3 x 3 matrix"):
        essential(s["pixels1"], s["pixels2"], K1, wrong, s["depth1"], s["depth2"])


def test_an_unknown_scale_is_refused():
    s = scene(10)
    with pytest.raises(HeadError, match="scale 'median' is unknown; choose one of consensus, mean"):
        essential(s["pixels1"], s["pixels2"], K1, K2, s["depth1"], s["depth2"], scale="median")


def test_without_opencv_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    s = scene(10)
    with pytest.raises(HeadError, match=r"pip install 'dune-fast\[heads\]'"):
        pnp(s["x1"], s["pixels2"], K2)
