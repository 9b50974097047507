"""Training data of Multi-HMR's head: people files, images on squares, flips, batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.heads_proof.bodies import body_arrays
from dune_fast import cli
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.heads.multihmr.bedlam import by_image, people_of, published_intrinsics, upright
from dune_fast.heads.multihmr.bedlam_files import convert
from dune_fast.heads.multihmr.camera import default_intrinsics, project
from dune_fast.heads.multihmr.folder import PeopleFolder, collate, is_flipped
from dune_fast.heads.multihmr.people_files import read_people, write_people
from dune_fast.heads.multihmr.smplx import BodyModel
from dune_fast.heads.multihmr.square import fit_square, flip_camera, flip_people
from dune_fast.heads.multihmr.targets import PARTS


@pytest.fixture(scope="module")
def body() -> BodyModel:
    return BodyModel(body_arrays(20))


def people(depths: list[float]) -> dict[str, np.ndarray]:
    n = len(depths)
    out = {name: 0.3 * np.random.randn(n, joints, 3).astype(np.float32) for name, joints in PARTS.items()}
    transl = np.array([[0.2, 0.1, z] for z in depths], np.float32).reshape(n, 3)
    out |= {"betas": np.random.randn(n, 10).astype(np.float32), "transl": transl}
    return out | {"K": np.array([[90.0, 0, 40], [0, 95, 20], [0, 0, 1]], np.float32)}


def write_example(folder: Path, name: str, depths: list[float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.randint(0, 255, (40, 80, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    write_people(folder / f"{name}.npz", people(depths))


def test_squares_keep_points_where_they_are():
    """A point projected by the new camera lies where its pixel has gone."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[30:34, 60:64] = 255
    square = fit_square(Image.fromarray(pixels), 160)
    assert square.pixels.shape == (160, 160, 3) and not square.pixels[:40].any() and not square.pixels[120:].any()
    bright = np.argwhere(square.pixels[..., 0] > 128).mean(0)[::-1] + 0.5
    k = np.array([[90.0, 0, 40], [0, 95, 20], [0, 0, 1]])
    point = np.linalg.inv(k) @ (62, 32, 1)  # the middle of the bright pixels
    moved = square.intrinsics(k) @ point
    np.testing.assert_allclose(moved[:2] / moved[2], bright, atol=0.05)
    np.testing.assert_allclose(square.original(square.intrinsics(k)), k, atol=1e-9)


def test_flipped_people_are_the_mirror_image(body):
    """Joints of the mirrored parameters are the mirrored joints, left and right swapped, up to the random shapes."""
    given = people([3.0, 4.0])
    given["betas"][:, 2:] = 0  # tall and stout alone are symmetric

    def joints(arrays: dict[str, np.ndarray]) -> torch.Tensor:
        t = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()}
        placed = body(t["betas"], body.matrices(*(t[name] for name in PARTS))).joints[:, :55]
        return placed + t["transl"][:, None]

    swap = list(range(55))
    for left, right in ((1, 2), (4, 5), (7, 8), (10, 11), (13, 14), (16, 17), (18, 19), (20, 21), (23, 24)):
        swap[left], swap[right] = right, left
    swap[25:55] = [*range(40, 55), *range(25, 40)]
    before, after = joints(given), joints(flip_people(given))
    mirrored = before[:, swap] * torch.tensor([-1.0, 1, 1])
    torch.testing.assert_close(after, mirrored, atol=1e-4, rtol=1e-4)
    k = torch.from_numpy(given["K"])
    flipped = torch.from_numpy(flip_camera(given["K"], 80))
    seen, other = (project(x, c.expand(2, 3, 3)) for x, c in ((before, k), (after, flipped)))
    torch.testing.assert_close(other[:, swap, 0], 80 - seen[..., 0], atol=1e-2, rtol=1e-3)
    twice = flip_people(flip_people(given))
    assert all(np.array_equal(twice[name], x) for name, x in given.items())


def test_examples_come_nearest_first_without_those_behind(tmp_path):
    write_example(tmp_path / "train" / "a", "one", [5.0, 2.0, -1.0, 3.0])
    write_example(tmp_path / "train", "two", [])
    folder = PeopleFolder(tmp_path, "train", 56)
    assert [image.name for image, _ in folder.files] == ["one.png", "two.png"] and len(folder) == 2
    one, two = folder.read(0), folder.read(1)
    assert one.people["transl"][:, 2].tolist() == [2.0, 3.0, 5.0]
    assert one.image.shape == (3, 56, 56) and one.people["betas"].shape == (3, 11)
    assert not one.people["betas"][:, 10].any()
    flipped = folder.read(0, flip=True)
    torch.testing.assert_close(flipped.image, one.image.flip(2))
    assert flipped.intrinsics[0, 2] == pytest.approx(56 - float(one.intrinsics[0, 2]))
    batch = collate([one, two, one])
    assert batch["index"].tolist() == [0, 0, 0, 2, 2, 2] and batch["slot"].tolist() == [0, 1, 2, 0, 1, 2]
    assert batch["slots"] == 3 and batch["people"]["body"].shape == (6, 21, 3)
    empty = collate([two])
    assert empty["slots"] == 0 and empty["people"]["transl"].shape == (0, 3) and len(empty["slot"]) == 0


def test_flips_are_a_function_of_seed_and_position():
    drawn = [is_flipped(3, i) for i in range(100)]
    assert drawn[:9] == [is_flipped(3, i) for i in range(9)] and drawn[:30] != [is_flipped(4, i) for i in range(30)]
    assert 30 < sum(drawn) < 70


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"body": None}, "lacks the arrays body"),
        ({"body": np.zeros((1, 22, 3))}, r"body is \[1, 22, 3\], expected \[1, 21, 3\]"),
        ({"betas": np.zeros((2, 10))}, r"betas is \[2, 10\], expected \[1, L\]"),
        ({"transl": np.full((1, 3), np.nan)}, "transl has values that are not finite"),
        ({"K": np.zeros((3, 3))}, "K has no focal lengths"),
        ({"j2d": np.zeros((1, 9, 2))}, "j2d is"),
    ],
)
def test_wrong_people_files_are_refused(tmp_path, change, message):
    arrays = {name: x for name, x in {**people([3.0]), **change}.items() if x is not None}
    write_people(tmp_path / "a.npz", arrays)
    with pytest.raises(DataError, match=message):
        read_people(tmp_path / "a.npz")


def test_missing_data_say_where_to_ask(tmp_path):
    with pytest.raises(DataError, match="there is no folder .*train.*bedlam.is.tue.mpg.de after registration"):
        PeopleFolder(tmp_path, "train", 56)
    (tmp_path / "val").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "a.png")
    with pytest.raises(DataError, match="has 1 images, none with a file of people"):
        PeopleFolder(tmp_path, "val", 56)
    write_example(tmp_path / "train", "a", [3.0])
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "a.jpg")
    with pytest.raises(DataError, match=r"a.jpg and .*a.png have one people file, a.npz: rename"):
        PeopleFolder(tmp_path, "train", 56)
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="holds no people"):
        read_people(tmp_path / "a.npz")


def test_default_intrinsics_see_sixty_degrees():
    k = default_intrinsics(448)
    assert float(448 / 2 / k[0, 0]) == pytest.approx(np.tan(np.radians(30))) and k[0, 2] == k[1, 2] == 224


def test_bedlams_rows_become_people():
    """Poses are cut at the published columns, the camera's translation is added, images of close-ups are turned."""
    poses = np.arange(2 * 165, dtype=np.float64).reshape(2, 165)
    ext = np.tile(np.eye(4), (2, 1, 1))
    ext[:, :3, 3] = (1, 2, 3)
    k = np.tile(np.array([[900.0, 0, 640], [0, 900, 360], [0, 0, 1]]), (2, 1, 1))
    found = people_of(poses, np.zeros((2, 11)), np.array([[0.0, 0, 5], [0, 0, 2]]), ext, k, (1280, 720))
    assert found["transl"].tolist() == [[1, 2, 5], [1, 2, 8]]  # nearest first
    starts = {name: found[name][1].flat[0] for name in PARTS}
    assert starts == {"root": 0, "body": 3, "jaw": 66, "leye": 69, "reye": 72, "left_hand": 75, "right_hand": 120}
    assert found["right_hand"][1].flat[-1] == 164
    np.testing.assert_array_equal(found["K"], k[0])  # a centred principal point is kept
    square = fit_square(Image.new("RGB", (1280, 720)), 448)
    off = published_intrinsics(np.array([[900.0, 0, 600], [0, 900, 300], [0, 0, 1]]), (1280, 720))
    np.testing.assert_allclose(square.intrinsics(off)[:2, 2], (600 / 1280 * 448, 300 / 720 * 448), atol=0.5)
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    turned = upright(image, "20221011_closeup_suburb/seq_1.png")
    assert turned.size == (2, 4) and turned.getpixel((1, 0)) == (255, 0, 0)  # clockwise
    assert upright(image, "seq_1.png") is image
    assert {name: rows.tolist() for name, rows in by_image(["a", "b", "a"]).items()} == {"a": [0, 2], "b": [1]}
    with pytest.raises(ValueError, match=r"poses is \[2, 156\], expected \[2, 165\]"):
        people_of(poses[:, :156], np.zeros((2, 11)), np.zeros((2, 3)), ext, k, (1280, 720))
    k[1, 0, 0] = 800
    with pytest.raises(ValueError, match="cam_int differs"):
        people_of(poses, np.zeros((2, 11)), np.zeros((2, 3)), ext, k, (1280, 720))


def write_bedlam(root: Path, scene: str, names: list[str], size: tuple[int, int]) -> None:
    """Labels and images of a scene with one person a name, in BEDLAM's format."""
    n = len(names)
    k = np.tile(np.array([[90.0, 0, 20], [0, 90, 40], [0, 0, 1]]), (n, 1, 1))
    (root / "labels").mkdir(parents=True, exist_ok=True)
    np.savez(
        root / "labels" / f"{scene}.npz", imgname=np.array(names), pose_cam=0.1 * np.random.randn(n, 165),
        shape=np.zeros((n, 11)), trans_cam=np.array([[0, 0, 3.0 + i] for i in range(n)]), cam_int=k,
        cam_ext=np.tile(np.eye(4), (n, 1, 1)), sub=np.array([None] * n, dtype=object),
    )  # fmt: skip
    for name in names:
        path = root / "images" / f"{scene}_6fps" / "png" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.randint(0, 255, (size[1], size[0], 3), np.uint8)).save(path)


def test_bedlam_becomes_a_folder_of_people(tmp_path, capsys):
    """People of an image come together, close-ups are turned, others are links; what is not there is left out."""
    write_bedlam(tmp_path, "scene", ["seq_0/a.png", "seq_0/b.png", "seq_0/a.png", "seq_1/c.png"], (40, 80))
    write_bedlam(tmp_path, "scene_closeup", ["seq_0/a.png"], (80, 40))
    (tmp_path / "images" / "scene_6fps" / "png" / "seq_1" / "c.png").unlink()
    command = ["heads", "bedlam", "--labels", str(tmp_path / "labels"), "--images", str(tmp_path / "images"), "--out"]
    for _ in range(2):  # once more over its own results
        assert cli.main([*command, str(tmp_path / "data" / "train")]) == 0
        assert "3 images with people files" in capsys.readouterr().out
    folder = PeopleFolder(tmp_path / "data", "train", 56)
    names = [str(image.relative_to(tmp_path / "data" / "train")) for image, _ in folder.files]
    assert names == ["scene/seq_0/a.png", "scene/seq_0/b.png", "scene_closeup/seq_0/a.png"]
    assert [len(folder.read(i).people["transl"]) for i in range(3)] == [2, 1, 1]
    assert read_people(folder.files[0][1])["transl"][:, 2].tolist() == [3.0, 5.0]
    assert folder.files[0][0].is_symlink() and not folder.files[2][0].is_symlink()
    original = tmp_path / "images" / "scene_closeup_6fps" / "png" / "seq_0" / "a.png"
    with Image.open(folder.files[2][0]) as turned, Image.open(original) as lies:
        assert turned.size == (40, 80) and turned.getpixel((39, 0)) == lies.getpixel((0, 0))
    assert cli.main([*command, str(tmp_path / "few"), "--every", "25"]) == 0
    assert "2 images" in capsys.readouterr().out
    (tmp_path / "images" / "scene_6fps" / "png").rename(tmp_path / "images" / "scene")
    assert cli.main([*command, str(tmp_path / "images")]) == 2  # it would take the images away
    assert "a.png is the image itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"imgname": np.array(["../../a.png"])}, "names the image '../../a.png', which is not below"),
        ({"imgname": np.array([None], dtype=object)}, "imgname holds object, not text"),
        ({"pose_cam": np.zeros((1, 156))}, r"pose_cam is \[1, 156\], expected \[1, 165\]"),
        ({"imgname": np.array(["none.png"])}, "no image is below .*SCENE_6fps/png"),
    ],
)
def test_other_labels_than_bedlams_are_refused(tmp_path, changed, message):
    write_bedlam(tmp_path, "scene", ["seq_0/a.png"], (8, 8))
    file = tmp_path / "labels" / "scene.npz"
    with np.load(file, allow_pickle=True) as given:
        arrays = {**{name: given[name] for name in given.files}, **changed}
    np.savez(file, **arrays)
    with pytest.raises(DataError, match=message):
        convert(tmp_path / "labels", tmp_path / "images", tmp_path / "out")
