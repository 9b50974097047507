"""Pairs of photographs end to end: images prepared, exact points and descriptors of two posed views of a room's corner,
what is found, written and said."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dune_fast.heads.head import HeadError
from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.heads.mast3r.images import Prepared, default_long_side, estimated_intrinsics, prepare
from dune_fast.heads.mast3r.two_views import look_at
from dune_fast.infer.files import InferenceError, read_image
from dune_fast.infer.mast3r import run
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig

pytest.importorskip("cv2")
OPTIONS = {
    "width": 8, "patch_size": 14, "dec_dim": 8, "dec_depth": 4, "dec_heads": 2, "desc_dim": 24,
    "layer_dims": [4, 4, 4, 4], "feature_dim": 4, "last_dim": 4,
}  # fmt: skip
SIDE = 112
"""Long side of the prepared images."""
K = np.array([[210.0, 0, 111.5], [0, 210.0, 83.5], [0, 0, 1]])
"""Of photographs of 224 x 168 pixels."""
ANGLE = np.radians(12)
R = np.array([[np.cos(ANGLE), 0, np.sin(ANGLE)], [0, 1, 0], [-np.sin(ANGLE), 0, np.cos(ANGLE)]])
T = np.array([-0.9, 0.1, 0.2])
WORLD_TO_CAMERA = [(np.eye(3), np.zeros(3)), (R, T)]


def corner(k: np.ndarray, size: tuple[int, int], pose: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The world's point at every pixel, [h, w, 3], of three walls: x = 3, y = 1.5 and z = 6 in the first camera's."""
    (height, width), (r, t) = size, pose
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height), [1.0]), -1)[:, :, 0]
    rays, centre = pixels @ np.linalg.inv(k).T @ r, -r.T @ t  # in the world
    with np.errstate(divide="ignore"):
        lengths = (np.array([3.0, 1.5, 6.0]) - centre) / rays
    return centre + rays * np.where(lengths > 0, lengths, np.inf).min(-1)[..., None]


def descriptors(points: np.ndarray) -> Tensor:
    """[h, w, 24] of length 1, whose inner product is largest for the same point."""
    waves = np.random.default_rng(0).normal(0, 3, (3, 12))
    phase = torch.from_numpy(points @ waves)
    return torch.cat([phase.sin(), phase.cos()], -1).float() / 12**0.5


class ExactHead(Mast3rHead):
    """Says of two views what is true, in either order; the first call's first view is the first one."""

    def __init__(self, views: list[Prepared], ks: list[np.ndarray], desc_conf: float = 2.0) -> None:
        super().__init__(**OPTIONS)
        self.calls, self.first, self.desc_conf = 0, None, desc_conf
        cameras = [view.intrinsics(k) for view, k in zip(views, ks, strict=True)]
        poses = zip(cameras, views, WORLD_TO_CAMERA, strict=True)
        self.world = [corner(k, view.size, pose) for k, view, pose in poses]

    def forward(self, view1, view2):
        self.first = view1.raw_patch if self.first is None else self.first
        order = (0, 1) if torch.equal(view1.raw_patch, self.first) else (1, 0)
        self.calls += 1
        r, t = WORLD_TO_CAMERA[order[0]]
        results = []
        for name, i in zip(("pts3d", "pts3d_in_other_view"), order, strict=True):
            points = torch.from_numpy(self.world[i] @ r.T + t).float()[None]
            same = torch.ones(points.shape[:3])
            results.append({
                name: points, "conf": 3 * same, "desc": descriptors(self.world[i])[None],
                "desc_conf": self.desc_conf * same,
            })  # fmt: skip
        return tuple(results)


@pytest.fixture(scope="module")
def encoder() -> VisionTransformer:
    cfg = ViTConfig(image_size=56, patch_size=14, embed_dim=8, depth=1, num_heads=2, num_registers=0)
    return VisionTransformer(cfg).init_weights().eval().requires_grad_(False)


@pytest.fixture
def photographs(tmp_path) -> list[Path]:
    """224 x 168 pixels, of any content."""
    draw, paths = np.random.default_rng(0), [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        Image.fromarray(draw.integers(0, 256, (168, 224, 3), np.uint8)).save(path)
    return paths


def prepared(paths: list[Path]) -> list[Prepared]:
    return [prepare(read_image(path), 14, SIDE) for path in paths]


@pytest.mark.parametrize("method", ["pnp", "essential"])
@pytest.mark.parametrize("known", [True, False])
def test_points_matches_and_pose_come_back(photographs, encoder, tmp_path, caplog, method, known):
    caplog.set_level(logging.INFO, "dune_fast")
    head = ExactHead(prepared(photographs), [K, K])
    out = tmp_path / "out"
    (found,) = run(
        photographs, encoder, head, out, intrinsics=K if known else None, pose_method=method, long_side=SIDE, step=4
    )
    assert found["reason"] == "" and found["inliers"] > 0.6 * found["matches"] > 100
    cosine = (np.trace(np.array(found["rotation"]).T @ R) - 1) / 2
    assert np.degrees(np.arccos(cosine)) < 0.5
    assert np.linalg.norm(np.array(found["translation"]) - T) < 0.05
    with np.load(out / "pair.npz") as pair:
        pair = dict(pair)
    assert pair["points1"].shape == (84, 112, 3) and pair["points2"].shape == (84, 112, 3)
    np.testing.assert_allclose(pair["points2"], head.world[1], rtol=1e-5)  # in camera 1's frame, which is the world's
    np.testing.assert_allclose(pair["depth2"], (head.world[1] @ R.T + T)[..., 2], rtol=1e-5)
    np.testing.assert_allclose(pair["intrinsics1"], K, rtol=1e-3)
    np.testing.assert_allclose(pair["rotation"], found["rotation"])
    # each match shows one point of the world, to a pixel and a half of the photographs
    at = np.round((pair["matches1"] + 0.5) * pair["scale1"] - 0.5 - pair["offset1"]).astype(int)
    seen = head.world[0][at[:, 1], at[:, 0]] @ R.T + T
    pixels = (seen @ K.T)[:, :2] / seen[:, 2:]
    assert np.quantile(np.abs(pixels - pair["matches2"]).max(1), 0.9) < 2.5
    header, _, body = (out / "points.ply").read_bytes().partition(b"end_header\n")
    assert b"element vertex 18816\n" in header and len(body) == 18816 * 15
    first = np.frombuffer(body[:15], "<f4,<f4,<f4,u1,u1,u1")[0]
    np.testing.assert_allclose(list(first)[:3], head.world[0][0, 0], rtol=1e-5)
    assert list(first)[3:] == prepared(photographs)[0].colours[0, 0].tolist()
    with Image.open(out / "matches.png") as drawn:
        # two images, their depths below, one scale at the right
        assert 2 * 112 + 8 < drawn.width < 3 * 112 and drawn.height == 2 * 84 + 8
        beside = np.array(drawn)[:84, :112] != prepared(photographs)[0].colours
        assert 0.05 < beside.any(-1).mean() < 0.9  # lines, and between them the photograph
    said = caplog.text
    assert f"camera 2 by {method}: x2 = R x1 + t" in said and "turned by 1" in said and "do not trust" not in said
    assert ("focal lengths, read off the points: 210" in said) is not known


@pytest.mark.parametrize("method, passes", [("pnp", 1), ("essential", 2)])
def test_the_head_runs_once_where_that_is_enough(photographs, encoder, method, passes):
    views = prepared(photographs)
    head = ExactHead(views, [K, K])
    seen = look_at(*views, encoder, head)
    pose = seen.relative_pose(seen.matches(), [view.intrinsics(K) for view in views], method)
    assert not pose.reason and head.calls == passes
    assert seen.relative_pose(seen.matches(), [None, None], method).reason.startswith("the points show no focal length")
    with pytest.raises(HeadError, match="pose method 'icp' is unknown"):
        seen.relative_pose(seen.matches(), [K, K], "icp")


def test_a_pair_without_overlap_is_said(photographs, encoder, tmp_path, caplog):
    caplog.set_level(logging.INFO, "dune_fast")
    head = ExactHead(prepared(photographs), [K, K], desc_conf=0.5)
    (found,) = run(photographs, encoder, head, tmp_path / "out", intrinsics=K, long_side=SIDE)
    assert found["rotation"] is None and found["reason"] == "0 matches; a pose needs 4" and found["matches"] == 0
    assert "no pose: 0 matches" in caplog.text and "may not show the same place; do not trust the pose" in caplog.text
    with np.load(tmp_path / "out" / "pair.npz") as pair:
        assert np.isnan(pair["rotation"]).all() and pair["reason"] == "0 matches; a pose needs 4"
    assert (tmp_path / "out" / "matches.png").is_file()


def test_landscape_and_portrait_of_two_sizes(encoder, tmp_path, caplog):
    """A drawn head, whatever it says: every image keeps its own orientation and size."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, size in zip(paths, ((120, 90), (60, 200)), strict=True):
        Image.new("RGB", size, (90, 20, 200)).save(path)
    caplog.set_level(logging.INFO, "dune_fast")
    head = Mast3rHead(**OPTIONS, encoder_name="dune_vitbase_14_448_paper_encoder").eval().requires_grad_(False)
    run(paths, encoder, head, tmp_path, long_side=56)
    assert "the head was trained on the encoder dune_vitbase_14_448_paper_encoder" in caplog.text
    with np.load(tmp_path / "pair.npz") as pair:
        assert pair["points1"].shape == (42, 56, 3) and pair["points2"].shape == (56, 14, 3)
        assert np.isfinite(pair["points1"]).all()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"pose_method": "icp"}, "pose method 'icp' is unknown; choose one of pnp, essential"),
        ({"long_side": 100}, "100 pixels is not a multiple of the patch size 14; the nearest are 98 and 112"),
        ({"long_side": -14}, "-14 pixels is not a multiple"),
        ({"step": 0}, "step 0: give pixels"),
        ({"step": 85, "long_side": SIDE}, "step 85: the shorter side of the resized images is 84 px"),
        ({"confidence": np.nan}, "a confidence is nan"),
        ({"points_confidence": np.nan}, "a confidence is nan"),
        ({"intrinsics": np.eye(2)}, "give the 3 x 3 matrix"),
        ({"intrinsics": np.zeros((3, 3, 3))}, "give the 3 x 3 matrix"),
    ],
)
def test_options_without_sense_are_refused(photographs, encoder, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        run(photographs, encoder, Mast3rHead(**OPTIONS), tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_other_than_two_images_are_refused(photographs, encoder, tmp_path):
    for images in (photographs[:1], photographs * 2):
        with pytest.raises(InferenceError, match=f"a pair is two images, got {len(images)}"):
            run(images, encoder, Mast3rHead(**OPTIONS), tmp_path)
    with pytest.raises(InferenceError, match="cannot be read"):
        run([photographs[0], tmp_path / "none.png"], encoder, Mast3rHead(**OPTIONS), tmp_path)


def test_an_encoder_that_does_not_fit_is_refused(photographs, encoder, tmp_path):
    with pytest.raises(HeadError, match="the mast3r head reads 12 channels of 14 x 14 px patches, the encoder gives 8"):
        run(photographs, encoder, Mast3rHead(**{**OPTIONS, "width": 12}), tmp_path)


def test_one_camera_of_two_sizes_is_refused(photographs, encoder, tmp_path, caplog):
    """Regression: the principal point of a landscape image was taken for that of a portrait one."""
    Image.new("RGB", (168, 224)).save(photographs[1])
    head = Mast3rHead(**OPTIONS).eval().requires_grad_(False)
    with pytest.raises(InferenceError, match=r"a.png has 224 x 168 pixels, b.png 168 x 224, and one camera is given"):
        run(photographs, encoder, head, tmp_path / "out", intrinsics=K, long_side=56)
    turned = np.array([[210.0, 0, 83.5], [0, 210.0, 300], [0, 0, 1]])
    both = np.stack([K, turned])
    run(photographs, encoder, head, tmp_path / "out", intrinsics=both, long_side=56, confidence=1e9)  # no match, quick
    with np.load(tmp_path / "out" / "pair.npz") as pair:
        np.testing.assert_allclose(pair["intrinsics2"], turned)
    assert "by the given intrinsics, b.png has its principal point (83.5, 300) outside of the image" in caplog.text


def test_an_image_that_is_too_narrow_is_named(photographs, encoder, tmp_path):
    Image.new("RGB", (5, 300)).save(photographs[1])
    with pytest.raises(InferenceError, match=r"b.png: an image of 5 x 300 pixels, .* is not one patch of 14"):
        run(photographs, encoder, Mast3rHead(**OPTIONS), tmp_path / "out")


def test_a_cloud_without_points_is_said(photographs, encoder, tmp_path, caplog):
    head = ExactHead(prepared(photographs), [K, K])
    (found,) = run(photographs, encoder, head, tmp_path, intrinsics=K, long_side=SIDE, points_confidence=4.0)
    assert found["points"] == 0 and "0 points of confidence 4 or more" in caplog.text  # a warning


def test_outputs_that_are_not_finite_are_refused(photographs, encoder, tmp_path):
    head = Mast3rHead(**OPTIONS).requires_grad_(False)
    head.downstream_head2.dpt.head[4].bias.fill_(200.0)  # exp of it overflows
    with pytest.raises(HeadError, match="head's points are not finite"):
        run(photographs, encoder, head, tmp_path, long_side=56)


@pytest.mark.parametrize("patch, side", [(14, 518), (16, 512), (8, 512)])
def test_the_long_side_is_near_512(patch, side):
    assert default_long_side(patch) == side


@pytest.mark.parametrize(
    "size, patch, square_ok, wanted",
    [
        ((720, 540), 14, True, (518, 378)),  # resized to 518 x 388 (388.5 is even after rounding), cut to 27 patches
        ((540, 720), 16, False, (384, 512)),
        ((1000, 1000), 14, True, (518, 518)),
        ((1000, 1000), 16, False, (512, 384)),
        ((300, 100), 16, False, (512, 160)),
    ],
)
def test_images_are_cut_to_whole_patches(size, patch, square_ok, wanted):
    view = prepare(np.zeros((size[1], size[0], 3), np.uint8), patch, None, square_ok)
    assert (view.size[1], view.size[0]) == wanted and view.original == (size[1], size[0])


def test_pixels_of_the_photograph_come_back():
    """A bright spot is found where it was; a camera matrix maps to the same pixel both ways."""
    photograph = np.zeros((300, 421, 3), np.uint8)
    photograph[100:108, 200:208] = 255  # its middle is (203.5, 103.5)
    view = prepare(photograph, 14, 224)
    bright = (view.image[0] + 1).double().numpy()
    middle = [(bright.sum(axis) * np.arange(bright.shape[1 - axis])).sum() / bright.sum() for axis in (0, 1)]
    np.testing.assert_allclose(view.to_original(np.array([middle])), [[203.5, 103.5]], atol=0.1)
    k = np.array([[300.0, 0, 190], [0, 310, 140], [0, 0, 1]])
    point = np.array([0.1, -0.2, 2.0])
    own = view.intrinsics(k) @ point / 2
    np.testing.assert_allclose(view.to_original(own[None, :2]), [(k @ point)[:2] / 2])
    np.testing.assert_allclose(view.original_intrinsics(view.intrinsics(k)), k)


def test_an_image_narrower_than_a_patch_is_refused():
    with pytest.raises(HeadError, match="is not one patch of 14 pixels wide"):
        prepare(np.zeros((1000, 20, 3), np.uint8), 14)
    with pytest.raises(HeadError, match=r"a photograph is uint8 \[H, W, 3\]"):
        prepare(np.zeros((100, 20), np.uint8), 14)


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :5] = 255  # the left side becomes the top
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = read_image(tmp_path / "a.png")
    assert upright.shape == (30, 20, 3) and upright[:5].min() == 255 and upright[5:].max() == 0


def test_the_focal_length_is_that_of_the_points():
    k = np.array([[150.0, 0, 39.5], [0, 150.0, 29.5], [0, 0, 1]])
    points = corner(k, (60, 80), WORLD_TO_CAMERA[0])
    np.testing.assert_allclose(estimated_intrinsics(points), k)
    points[::3] = points[::3, ::-1]  # a third of the rows is wrong
    assert abs(estimated_intrinsics(points)[0, 0] / 150 - 1) < 0.05
    assert estimated_intrinsics(np.zeros((4, 4, 3))) is None
    assert estimated_intrinsics(-points) is None
