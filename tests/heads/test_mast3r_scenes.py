"""Rendered rooms: depth against analytic planes, and views of one scene against each other."""

from __future__ import annotations

import numpy as np
import pytest

from dune_fast.heads.mast3r import scenes
from dune_fast.heads.mast3r.correspondences import back_project, correspondences, project, visible
from dune_fast.heads.mast3r.scenes import Room, SceneConfig, make_scene, overlap, render, write_scenes

CFG = SceneConfig(size=(48, 36), views=2, samples=1)


@pytest.fixture(autouse=True)
def few_textures(monkeypatch):
    """A small bank: the real one takes seconds."""
    monkeypatch.setattr(scenes, "_BANK", 3)
    monkeypatch.setattr(scenes, "_TEXELS", 64)
    scenes.make_textures.cache_clear()
    yield
    scenes.make_textures.cache_clear()


@pytest.fixture
def room() -> Room:
    """An empty room of 4 x 2 x 6 metres with a cube of half a metre, turned by 45 degrees, 2 metres ahead."""
    c = np.sqrt(0.5)
    faces = 12
    rng = np.random.default_rng(0)
    return Room(
        np.array([[0, 0, 2.0], [0, 0, 0]]), np.array([[0.25] * 3, [2, 1, 3]]),
        np.stack([np.array([[c, 0, c], [0, 1, 0], [-c, 0, c]]), np.eye(3)]),
        rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8), np.arange(faces) % 2, np.full(faces, 6.0),
        np.full((faces, 2), 3.0), np.ones((faces, 3)),
    )  # fmt: skip


def test_depth_is_the_distance_of_the_planes(room):
    camera, pose = np.array([[40.0, 0, 20], [0, 40, 15], [0, 0, 1]]), np.eye(4)
    view = render(room, camera, pose, (41, 31), 1)
    x, y = np.meshgrid((np.arange(41) - 20) / 40, (np.arange(31) - 15) / 40)
    with np.errstate(divide="ignore"):
        walls = np.minimum.reduce([2 / np.abs(x), 1 / np.abs(y), np.full_like(x, 3)])
    # the cube's edge is nearest: two planes z = 2 - d + |x z|, d half the diagonal of its ground square
    front = (2 - 0.25 * np.sqrt(2)) / (1 + -np.abs(x))
    cube = (np.abs(x * front) < 0.25 * np.sqrt(2)) & (np.abs(y * front) < 0.25)
    expected = np.where(cube, front, walls)
    different = np.abs(view.depth - expected) > 1e-5
    assert not different[1:-1].any() or different.sum() <= 4  # pixels whose ray is an edge
    assert cube.sum() > 50 and np.isclose(view.depth[15, 20], 2 - 0.25 * np.sqrt(2))


def test_a_face_has_the_same_colours_in_every_view(room):
    """Pixels that show one point have one colour: texture and geometry agree."""
    camera = np.array([[300.0, 0, 32], [0, 300, 24], [0, 0, 1]])  # narrow: a pixel is smaller than a texel
    pose = np.eye(4)
    pose[:3, 3] = [0.03, 0.02, 0.1]
    views = [render(room, camera, p, (65, 49), 1) for p in (np.eye(4), pose)]
    points = back_project(views[0].depth.astype(np.float64), camera)
    seen = visible(points, views[1].depth, camera, pose, 1e-2)
    xy, _ = project(points[seen], camera, pose)
    x, y = np.rint(xy).astype(int).T
    difference = np.abs(views[0].image[seen].astype(int) - views[1].image[y, x])
    others = np.abs(np.diff(views[0].image[::8, ::8].astype(int), axis=0))
    assert seen.mean() > 0.5 and np.median(difference) < 12 < np.median(others)


def test_views_of_a_scene_overlap_as_asked():
    views, pairs = make_scene(3, CFG)
    assert len(views) == 2 and pairs == [(0, 1)]
    assert CFG.overlap[0] <= overlap(*views) <= CFG.overlap[1]
    assert all(np.isfinite(v.depth).all() and (v.depth > 0).all() for v in views)
    assert all(np.allclose(v.pose[:3, :3] @ v.pose[:3, :3].T, np.eye(3)) for v in views)
    assert all(np.isclose(np.linalg.det(v.pose[:3, :3]), 1) for v in views)
    points = [back_project(v.depth, v.intrinsics, v.pose) for v in views]
    first, second = correspondences(*points, *zip(*((v.intrinsics, v.pose) for v in views), strict=True))
    distance = np.linalg.norm(points[0].reshape(-1, 3)[first] - points[1].reshape(-1, 3)[second], axis=1)
    assert len(first) > 200 and np.median(distance) < 0.1


def test_a_scene_is_a_function_of_seed_and_number(tmp_path):
    first, again, other = (make_scene(n, CFG)[0][0] for n in (5, 5, 6))
    assert np.array_equal(first.image, again.image) and np.array_equal(first.pose, again.pose)
    assert not np.array_equal(first.image, other.image)
    write_scenes(tmp_path, 1, CFG, first=5)
    written = {path.name: path.read_bytes() for path in (tmp_path / "00005").iterdir()}
    write_scenes(tmp_path, 9, CFG)  # the folder is whole: it stays
    assert {path.name: path.read_bytes() for path in (tmp_path / "00005").iterdir()} == written
    assert (tmp_path / "pairs.txt").read_text() == "00005/0 00005/1\n"
