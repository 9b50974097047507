"""Training pairs: geometry through every crop, the order of a run, folders on disk."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.heads.mast3r.correspondences import back_project, project, sample
from dune_fast.heads.mast3r.crops import PosedView, candidate_boxes, resize_and_cut, warp
from dune_fast.heads.mast3r.pair_check import check_pairs
from dune_fast.heads.mast3r.pair_folders import PairDatasetConfig, open_pairs, write_pairs, write_view
from dune_fast.heads.mast3r.pairs import PairDataConfig, PairSource, collate, make_example
from dune_fast.heads.mast3r.training import truth

SIZES = [[28, 14], [28, 28]]
CFG = PairDataConfig(sizes=SIZES, n_corres=32)


def ramp(width: int = 60, height: int = 44) -> PosedView:
    """A slanted plane whose colours are the world's coordinates, so that a warped image can be checked by its depth."""
    camera = np.array([[50.0, 0, 28], [0, 52, 20], [0, 0, 1]])
    x, y = np.meshgrid((np.arange(width) - 28) / 50, (np.arange(height) - 20) / 52)
    depth = (2 / (1 - 0.3 * x + 0.1 * y)).astype(np.float32)
    points = back_project(depth, camera)
    image = (128 + 60 * points[..., [0, 1, 1]]).round().astype(np.uint8)
    return PosedView(image, depth, camera, np.eye(4))


def check(view: PosedView, levels: float) -> None:
    """Each pixel of the interior has the colour of the point that its depth and camera put there."""
    points = back_project(view.depth.astype(np.float64), view.intrinsics, view.pose)[2:-2, 2:-2]
    inside = view.depth[2:-2, 2:-2] > 0
    wanted = 128 + 60 * points[..., :2]
    assert inside.mean() > 0.7
    assert np.abs(view.image[2:-2, 2:-2, :2].astype(float) - wanted)[inside].max() < levels


@pytest.mark.parametrize("target", [(28, 28), (42, 14), (84, 56)])
def test_resizing_keeps_camera_and_pixels_together(target):
    cut = resize_and_cut(ramp(), target)
    assert cut.size == target
    check(cut, 3)  # the nearest depth is up to half an old pixel away: 60 * 2 / 50 / 2 levels


@pytest.mark.parametrize("box", [[3.2, 1.7, 40.4, 26.1], [20, 4, 60, 44], [0, 10, 30, 40]])
def test_a_turned_camera_keeps_camera_and_pixels_together(box):
    view = ramp()
    turned = warp(view, np.array(box), (42, 28))
    assert turned.size == (42, 28) and np.allclose(turned.intrinsics[:2, 2], (21, 14))
    assert np.allclose(turned.pose[:3, :3] @ turned.pose[:3, :3].T, np.eye(3)) and np.allclose(turned.pose[:3, 3], 0)
    check(turned, 3)


def test_candidate_boxes_lie_inside_and_have_the_aspect():
    boxes = candidate_boxes((60, 44), (28, 14), 64, np.random.default_rng(0))
    size = boxes[:, 2:] - boxes[:, :2]
    assert (boxes >= 0).all() and (boxes <= (60, 44, 60, 44)).all() and np.allclose(size[:, 0], 2 * size[:, 1])
    assert np.allclose(size, size[0]) and size[0, 0] <= 60  # one zoom


def test_sampled_correspondences():
    rng = np.random.default_rng(0)
    found = (np.arange(40), np.arange(60, 100))
    sizes = ((10, 12), (9, 12))
    pairs = set(zip(*(x.tolist() for x in found), strict=True))

    def flat(xy: np.ndarray) -> list[int]:
        return (xy[:, 1] * 12 + xy[:, 0]).tolist()

    for n, share, true in ((32, 0.5, 16), (100, 0.5, 40), (120, 0.0, 52), (120, 0.9, 52)):
        xy1, xy2, valid = sample(found, sizes, n, share, rng)
        assert len(xy1) == len(xy2) == len(valid) == n and valid.sum() == true
        assert all(((a, b) in pairs) == v for a, b, v in zip(flat(xy1), flat(xy2), valid, strict=True))
        assert not set(np.array(flat(xy1))[~valid]) & set(found[0].tolist())
        assert not set(np.array(flat(xy2))[~valid]) & set(found[1].tolist())
        if true <= 40:
            assert len(set(flat(xy1[valid]))) == true  # none twice where there are enough
    none = sample((found[0][:0], found[1][:0]), sizes, 8, 0.5, rng)
    assert not none[2].any() and len(none[0]) == 8


@pytest.fixture(scope="module")
def root(rooms, tmp_path_factory):
    """A copy of the rooms, which tests may change."""
    return shutil.copytree(rooms, tmp_path_factory.mktemp("pairs") / "rooms")


def source(root, batch: int = 4, seed: int = 3, cfg: PairDataConfig = CFG) -> PairSource:
    folders = [open_pairs(name, PairDatasetConfig(str(root), metric=name == "a")) for name in ("a", "b")]
    return PairSource(folders, [3, 1], cfg, seed, batch)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def test_an_example_is_a_function_of_seed_step_and_slot(root):
    """So a resume and another number of ranks see the same: a fresh source gives step 7 without the steps before."""
    first, resumed, other = source(root), source(root), source(root, seed=4)
    for step in range(3):
        first.example(step, 1)
    whole = [first.example(7, slot) for slot in range(4)]
    assert all(equal(resumed.example(7, slot), whole[slot]) for slot in (3, 1, 0, 2))
    assert not equal(other.example(7, 0), whole[0])
    assert {tuple(example["image1"].shape[:2]) for example in whole} == {first.size(7)[::-1]}
    assert len({first.size(step) for step in range(20)}) == 2


def test_every_pair_once_a_pass_and_each_set_its_share(root):
    made = source(root)
    seen = [made.chosen(step, slot) for step in range(20) for slot in range(4)]
    names = [folder.name for folder, _ in seen]
    assert names.count("a") == 60 and names.count("b") == 20
    count = len(made.folders[0])
    of_a = [index for folder, index in seen if folder.name == "a"]
    assert all(sorted(of_a[i : i + count]) == list(range(count)) for i in range(0, 60 - count, count))


@pytest.mark.parametrize("crop", ["auto", "centre"])
def test_the_correspondences_of_an_example_are_of_one_point(root, crop):
    cfg = dataclasses.replace(CFG, crop=crop, sizes=[[56, 42]], n_corres=128)
    made = source(root, cfg=cfg)
    distances = []
    for slot in range(4):
        e = made.example(0, slot)
        (x1, y1), (x2, y2) = (e[f"corres{v}"][e["valid_corres"]].T for v in (1, 2))
        distances.append((e["pts3d1"][y1, x1] - e["pts3d2"][y2, x2]).norm(dim=-1))
        xy, _ = project(e["pts3d1"].numpy(), e["camera_intrinsics1"].numpy(), e["camera_pose1"].numpy())
        grid = np.stack(np.meshgrid(np.arange(56), np.arange(42)), -1)
        known = e["valid_mask1"].numpy()
        assert np.abs(xy - grid)[known].max() < (1.5 if crop == "auto" else 1e-2)  # a warped depth is the nearest one
    assert torch.cat(distances).median() < 0.15  # metres; a pixel is 0.1 at 5 m


def test_monocular_examples_show_one_view_twice(root):
    cfg = dataclasses.replace(CFG, monocular=1.0, crop="centre", jitter=[0, 0, 0, 0])
    example = source(root, cfg=cfg).example(0, 0)
    assert torch.equal(example["image1"], example["image2"])
    assert torch.equal(example["corres1"][example["valid_corres"]], example["corres2"][example["valid_corres"]])


def test_portrait_images_are_stored_transposed():
    view = ramp()
    tall = PosedView(view.image[:, 10:40], view.depth[:, 10:40], view.intrinsics - [[0, 0, 10], [0] * 3, [0] * 3],
                     view.pose)  # fmt: skip
    tall, wide = (v._replace(intrinsics=v.intrinsics.astype(np.float32), pose=v.pose.astype(np.float32))
                  for v in (tall, view))  # fmt: skip
    cfg = PairDataConfig(sizes=[[28, 14]], n_corres=16, crop="centre")
    made = make_example((tall, wide), (28, 14), cfg, np.random.default_rng(0))
    assert made["portrait"] == (True, False) and made["image1"].shape == made["image2"].shape == (14, 28, 3)
    (x1, y1), (x2, y2) = (made[f"corres{v}"][made["valid_corres"]].T for v in (1, 2))
    near = (made["pts3d1"][y1, x1] - made["pts3d2"][y2, x2]).norm(dim=-1)
    assert near.max() < 0.15
    swapped = {k[:-1] + str(3 - int(k[-1])) if k[-1] in "12" else k: v for k, v in made.items()}
    own = {"is_metric_scale": torch.tensor(True), "views": ("one", "two")}
    others = [dict(swapped, portrait=(False, True), name="b", **own), *(dict(made, name=n, **own) for n in "ac")]
    batch = collate(others)
    assert batch["groups"] == [(False, True, 0, 1), (True, False, 1, 3)] and batch["names"] == ["b", "a", "c"]
    assert torch.equal(batch["view1"]["pts3d"][0], made["pts3d2"])
    first, second = truth(batch)
    assert torch.equal(first["corres"][:3], batch["view1"]["corres"])
    assert torch.equal(first["corres"][3:], second["corres"][:3]) and first["valid_corres"].shape == (6, 16)


def test_folders_round_trip(tmp_path):
    view = ramp()
    far = view._replace(pose=np.array(view.pose))
    far.pose[:3, 3] = [4e6, 5e5, 100.0]  # far from the world's origin, as surveyed coordinates are
    write_view(tmp_path, "a/1", far)
    write_view(tmp_path, "b", far._replace(pose=far.pose + np.eye(4, k=3) * 0.25), millimetres=True)
    rows = [" ".join(map(str, row)) for m in (far.intrinsics, far.pose) for row in m.tolist()]
    (tmp_path / "c.txt").write_text("\n".join(rows))
    Image.fromarray(view.image).save(tmp_path / "c.jpg", quality=100)
    np.save(tmp_path / "c.depth.npy", np.where(view.depth > 2, np.nan, -1.0))
    write_pairs(tmp_path, [("a/1", "b"), ("b", "c")])
    folder = open_pairs("own", PairDatasetConfig(str(tmp_path)))
    first, second = folder.read(0)
    assert np.array_equal(first.image, view.image) and np.array_equal(first.depth, view.depth)
    assert np.abs(second.depth - view.depth).max() < 6e-4
    assert np.array_equal(first.pose, np.eye(4)) and np.allclose(second.pose[:3, 3], [0.25, 0, 0], atol=1e-6)
    sky = folder.read(1)[1].depth
    assert set(np.unique(sky)) == {-1.0, 0.0}


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    cfg = PairDatasetConfig(str(tmp_path))
    with pytest.raises(DataError, match="two views a line"):
        open_pairs("own", cfg)
    (tmp_path / "pairs.txt").write_text("# only a comment\n")
    with pytest.raises(DataError, match="there is no pair"):
        open_pairs("own", cfg)
    (tmp_path / "pairs.txt").write_text("a b\na\n")
    with pytest.raises(DataError, match="line 2"):
        open_pairs("own", cfg)
    (tmp_path / "pairs.txt").write_text("a b\n")
    folder = open_pairs("own", cfg)
    with pytest.raises(DataError, match=r"no image a\{"):
        folder.read(0)
    write_view(tmp_path, "a", ramp())
    write_view(tmp_path, "b", ramp())
    np.save(tmp_path / "b.depth.npy", np.ones((3, 4), np.float32))
    with pytest.raises(DataError, match="60x44 pixels and a depth map of 4x3"):
        folder.read(0)
    Image.fromarray(np.ones((44, 60), np.uint8)).save(tmp_path / "b.depth.png")
    (tmp_path / "b.depth.npy").unlink()
    with pytest.raises(DataError, match="16 bits"):
        folder.read(0)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("b.npz", b"PK\x03\x04 no zip", "b.npz is damaged, or no file of numpy's"),
        ("b.npz", b"", "b.npz is damaged"),
        ("b.depth.npy", b"", "b.depth.npy is damaged"),
        ("b.png", b"", "no known image format"),
        ("b.npz", {"pose": np.zeros((4, 4))}, "a camera that is none"),
        ("b.npz", {"pose": np.full((4, 4), np.nan)}, "a camera that is none"),
        ("b.npz", {"intrinsics": np.zeros((3, 3))}, "a camera that is none"),
    ],
)
def test_damaged_files_and_cameras_are_named(tmp_path, name, content, words):
    """Regression: they ended a training with an error of zipfile's or numpy's that named no view, or made it NaN."""
    for view in "ab":
        write_view(tmp_path, view, ramp())
    write_pairs(tmp_path, [("a", "b")])
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.savez(tmp_path / name, **{"intrinsics": ramp().intrinsics, "pose": ramp().pose, **content})
    with pytest.raises(DataError, match=f"own: .*b of .*{words}"):
        open_pairs("own", PairDatasetConfig(str(tmp_path))).read(0)


def test_a_list_that_is_no_text_is_named(tmp_path):
    (tmp_path / "pairs.txt").write_bytes(b"\xff\xfe a b")
    with pytest.raises(DataError, match="pairs.txt cannot be read"):
        open_pairs("own", PairDatasetConfig(str(tmp_path)))


def test_images_of_16_bits_are_not_clipped(tmp_path):
    """Regression: Pillow's conversion made everything from 256 on white."""
    write_view(tmp_path, "a", ramp())
    write_pairs(tmp_path, [("a", "a")])
    Image.fromarray(np.full((44, 60), 100 << 8, np.uint16)).save(tmp_path / "a.png")
    first, _ = open_pairs("own", PairDatasetConfig(str(tmp_path))).read(0)
    assert (first.image == 100).all()


def test_map_free_scenes_are_read_and_not_trained_on(tmp_path):
    scene = tmp_path / "s00001"
    for seq in (0, 1):
        (scene / f"seq{seq}").mkdir(parents=True)
        Image.fromarray(np.zeros((72, 54, 3), np.uint8)).save(scene / f"seq{seq}" / "frame_00005.jpg")
    frames = ["seq0/frame_00005.jpg", "seq1/frame_00005.jpg"]
    (scene / "intrinsics.txt").write_text("# frame fx fy cx cy W H\n" + "".join(f"{f} 59 60 27 36 54 72\n"
                                                                              for f in frames))  # fmt: skip
    half = np.sqrt(0.5)  # a quarter turn about y, then a step of 2 along the camera's axis
    (scene / "poses.txt").write_text(f"{frames[0]} 1 0 0 0 0 0 0\n{frames[1]} {half} 0 {half} 0 0 0 2\n")
    np.savez(scene / "overlaps.npz", idxs=[[0, 5, 1, 5], [0, 5, 1, 6]], overlaps=[0.5, 0.9])
    folder = open_pairs("mapfree", PairDatasetConfig(str(tmp_path), "mapfree"))
    first, second = folder.read(0)
    assert len(folder) == 1 and first.size == (54, 72) and np.allclose(first.intrinsics[:2, 2], (27, 36))
    point = second.pose @ [0, 0, 2, 1]  # lies where the first camera stands
    assert np.allclose(point, [0, 0, 0, 1], atol=1e-6) and np.allclose(second.pose[:3, 2], [-1, 0, 0], atol=1e-6)
    with pytest.raises(DataError, match="has no depth"):
        PairSource([folder], [1], CFG, 0, 4)
    assert not first.depth.any()
    (scene / "poses.txt").write_text(f"{frames[0]} 1 0 0 0 0 0 0\n")
    with pytest.raises(DataError, match=r"seq1/frame_00005.jpg .* s00001/poses.txt lacks it"):
        folder.read(0)
    (scene / "overlaps.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"overlaps.npz cannot be read: .*; it holds `idxs`"):
        open_pairs("mapfree", PairDatasetConfig(str(tmp_path), "mapfree"))


def test_options_that_make_no_sense_are_refused():
    for wrong in ({"sizes": [[14, 28]]}, {"sizes": []}, {"crop": "random"}, {"n_corres": 0}, {"jitter": [1.0]},
                  {"jitter": [0.5, 0.5, 0.5, 0.9]}):  # fmt: skip
        with pytest.raises(DataError):
            PairDataConfig(**wrong)
    with pytest.raises(DataError, match="layout"):
        PairDatasetConfig(layout="colmap")


def test_the_check_finds_what_is_wrong(root, tmp_path):
    cfg = PairDatasetConfig(str(root))
    assert check_pairs("good", cfg) == []
    folder = open_pairs("good", cfg)
    names = sorted({name for pair in folder.pairs for name in pair})

    def copy(change, **options) -> str:
        other = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in names:
            write_view(other, name, change(folder.read_view(name)))
        write_pairs(other, folder.pairs)
        return "\n".join(check_pairs("own", PairDatasetConfig(str(other), **options)))

    assert "as world-to-camera:" in copy(lambda v: v._replace(pose=np.linalg.inv(v.pose)))
    assert "hardly metres" in copy(lambda v: v._replace(depth=1000 * v.depth))
    assert "hardly metres" not in copy(lambda v: v._replace(depth=1000 * v.depth), metric=False)
    assert "no rotation" in copy(lambda v: v._replace(pose=v.pose * [[2], [2], [2], [1]]))
    assert "no known depth" in copy(lambda v: v._replace(depth=0 * v.depth))
    assert "principal point" in copy(lambda v: v._replace(intrinsics=v.intrinsics * [[10], [10], [1]]))
    small = np.array([[0.1, 1, 1], [1, 0.1, 1], [1, 1, 1]])
    assert "of another size" in copy(lambda v: v._replace(intrinsics=v.intrinsics * small))
    upwards = np.diag([1.0, -1, -1, 1])
    assert "different units" in copy(lambda v: v._replace(pose=v.pose * np.array([[1, 1, 1, 1000]] * 3 + [[1] * 4])))
    assert "whose y points up: they" in copy(lambda v: v._replace(pose=v.pose @ upwards))
    assert "two views a line" in "".join(check_pairs("none", PairDatasetConfig(str(tmp_path / "none"))))
