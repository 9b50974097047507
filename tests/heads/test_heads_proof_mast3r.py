"""The stereo pair of the proof as posed views with depth, and the proof's page."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image

from bench.heads_proof import mast3r, stereo
from bench.heads_proof.stereo import BASELINE, FOCAL, OFFSET, posed_views, right_disparity, write_stereo
from dune_fast.engine.config import compose_config
from dune_fast.heads.mast3r.correspondences import back_project, project, visible
from dune_fast.heads.mast3r.pair_check import check_pairs
from dune_fast.heads.mast3r.pair_folders import PairDatasetConfig, open_pairs
from dune_fast.heads.tokens import EncoderTokens
from dune_fast.tasks.mast3r import Mast3rTask


@pytest.fixture
def folder(tmp_path):
    """A pair of 200 x 160 pixels: a wall at disparity 10 and a board before it at 40, columns 80 to 119 of the left."""
    disparity = np.full((160, 200), 10.0, np.float32)
    disparity[:, 80:120] = 40
    disparity[:20] = np.inf
    rng = np.random.default_rng(0)
    wall, board = (rng.integers(0, 256, (160, w, 3), dtype=np.uint8) for w in (220, 40))
    left, right = wall[:, :200].copy(), wall[:, 10:210].copy()
    left[:, 80:120], right[:, 40:80] = board, board
    for side, image in (("left", left), ("right", right)):
        Image.fromarray(image).save(tmp_path / f"motorcycle_{side}.png")
    np.savez(tmp_path / "motorcycle_disp.npz", arr_0=disparity)
    return tmp_path


def test_points_of_the_left_view_are_where_the_disparity_puts_them(folder):
    left, right = posed_views(folder)
    points = back_project(left.depth.astype(np.float64), left.intrinsics, left.pose)
    xy, depth = project(points, right.intrinsics, right.pose)
    known = left.depth > 0
    assert known[20:].all() and not known[:20].any()
    assert np.allclose(left.depth[30, 100], FOCAL * BASELINE / (40 + OFFSET))
    assert np.allclose(depth[known], left.depth[known])
    x, y = np.meshgrid(np.arange(200), np.arange(160))
    expected = np.where((x >= 80) & (x < 120), x - 40, x - 10)
    assert np.allclose(xy[known], np.stack([expected, y], -1)[known], atol=1e-3)
    # what both images show is the same, and what the board hides is not visible
    seen = visible(points, right.depth, right.intrinsics, right.pose) & known
    u, v = np.rint(xy[seen]).astype(int).T
    assert np.array_equal(left.image[seen], right.image[v, u])
    hidden = (x >= 50) & (x < 80)  # wall that lies behind the board in the right view, columns 40 to 69
    assert not seen[hidden].any() and seen[30, 100] and seen[30, 150]


def test_the_nearest_of_several_pixels_is_seen():
    found = right_disparity(np.array([[1.0, np.nan, 3.0, 1.0, 9.0]]))
    assert np.array_equal(found, [[np.nan, np.nan, 1.0, np.nan, np.nan]], equal_nan=True)  # 3 - 1 = 2; the rest is out
    found = right_disparity(np.array([[0.0, 1.0, 0.0]]))
    assert np.array_equal(found, [[1.0, np.nan, 0.0]], equal_nan=True)


def test_windows_are_pairs_without_fault(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(stereo, "FOCAL", 150.0)
    monkeypatch.setattr(stereo, "CENTRE", (60.0, 70.0))
    write_stereo(tmp_path / "pairs", folder, 3, (140, 100))
    cfg = PairDatasetConfig(str(tmp_path / "pairs"))
    assert len(open_pairs("stereo", cfg)) == 3 and open_pairs("stereo", cfg).read(0)[0].size == (140, 100)
    assert check_pairs("stereo", cfg) == []


def test_the_proof_s_training_is_a_task(tmp_path):
    places = {name: tmp_path / name for name in ("encoder", "train")}
    cfg = compose_config(mast3r.overrides(mast3r.Settings(), places, tmp_path / "run"))
    assert cfg.steps == mast3r.Settings.steps and cfg.head.options["layer_dims"] == mast3r.HEAD["layer_dims"]
    (missing,) = Mast3rTask(cfg).missing()
    assert str(places["train"]) in missing.where


def test_what_needs_no_head(rooms, tmp_path):
    """Poses of a camera that stays where it is, and matches of tokens: near perfect between a view and itself."""
    folder = open_pairs("rooms", PairDatasetConfig(str(rooms)))
    first, second = folder.read(0)
    found = mast3r.no_motion(dataclasses.replace(folder, pairs=folder.pairs[:1]))
    assert np.isclose(found["translation_m"], np.linalg.norm(second.pose[:3, 3]), atol=1e-3)
    assert np.isclose(2 * np.cos(np.radians(found["rotation_deg"])) + 1, np.trace(second.pose[:3, :3]), atol=1e-3)
    assert found["direction_deg"] == 90
    same = dataclasses.replace(folder, pairs=[(name, name) for name, _ in folder.pairs[:1]])

    def encoder(images):  # a patch's mean colours in its nine parts
        parts = F.adaptive_avg_pool2d(images, (9, 12))
        patch = F.unfold(parts, 3, stride=3).mT
        return EncoderTokens(None, patch, None, patch, (3, 4))

    own, others = (mast3r.token_matches(encoder, pairs, (56, 42)) for pairs in (same, folder))
    assert own["match_px"] <= 1 and own["match_5px"] > 0.9  # between the border and the first centres all are equal
    assert others["match_px"] > 2


def test_a_head_has_to_keep_the_limits_and_to_beat_all_that_needs_none(monkeypatch):
    monkeypatch.setattr(mast3r, "LIMITS", {"rooms": {"match_px": 5.0, "rotation_deg": 9.0}})
    rows = {
        "no motion": {"rooms": {"rotation_deg": 8.0}}, "tokens": {"rooms": {"match_px": 6.5}},
        "untrained": {"rooms": {"match_px": 47.0, "rotation_deg": 99.0}},
        "trained": {"rooms": {"match_px": 4.0, "rotation_deg": 8.5}},
    }  # fmt: skip
    checks = mast3r.checked(rows)
    assert [c["passed"] for c in checks] == [True, False]
    rows["trained"]["rooms"] = {"match_px": 6.0, "rotation_deg": 7.5}
    assert [c["passed"] for c in mast3r.checked(rows)] == [False, True]
    result = {
        "settings": {"steps": 3, "batch": 2, "size": (168, 126), "matching_weight": 1.0},
        "seconds": {"steps": 9}, "parameters": 2_000_000, "checks": checks,
        "pairs": dict.fromkeys(("train", "rooms", "stereo"), 5),
        "metrics": rows | {"untrained": {"rooms": {"translation_m": float("inf")}}},
    }  # fmt: skip
    text = mast3r.page(result)
    assert text.count("- pass: rooms") == 1 and text.count("- FAIL: rooms") == 1 and "| none |" in text
    assert "rotation (deg): 8.5, at most 9 is asked for, and less than no motion 8, untrained 99" in text
