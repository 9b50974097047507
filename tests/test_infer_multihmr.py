"""People of photographs, from image files to files and pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.heads_proof.bodies import write_body_model
from dune_fast import cli
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.evaluate.hmr import bodies_of, compare_files
from dune_fast.evaluate_predictions import run_measured
from dune_fast.heads.files import save_head
from dune_fast.heads.head import HeadError
from dune_fast.heads.multihmr.body_file import BodyModelError
from dune_fast.heads.multihmr.head import MultiHmrHead
from dune_fast.heads.multihmr.people_files import read_people, write_people
from dune_fast.heads.multihmr.smplx import load_body_model
from dune_fast.infer.bodies import draw_bodies, draw_scores
from dune_fast.infer.multihmr import predict_people, run
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.teachers.architecture import architecture_metadata


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_body_model(tmp_path_factory.mktemp("model") / "SMPLX_NEUTRAL.npz", 20)


@pytest.fixture(scope="module")
def networks() -> tuple[VisionTransformer, MultiHmrHead]:
    torch.manual_seed(1)
    encoder = VisionTransformer(ViTConfig(image_size=56, patch_size=14, embed_dim=24, depth=1, num_heads=2))
    head = MultiHmrHead(24, 56, heads=2, head_dim=8, dim=24, hidden=24)
    with torch.no_grad():
        head.x_attention_head.deccam.bias[0] = 1.2  # 3.3 metres
    return encoder.init_weights().eval().requires_grad_(False), head.eval().requires_grad_(False)


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    Image.fromarray(np.random.randint(0, 255, (90, 120, 3), np.uint8)).save(tmp_path / "two people.png")
    return tmp_path / "two people.png"


def test_files_of_an_image(tmp_path, networks, photograph, model_file):
    (result,) = run([photograph], *networks, model_file, tmp_path / "out", threshold=0.4)
    found = read_people(tmp_path / "out" / "two people.npz")
    n = result["people"]
    assert n == len(found["scores"]) > 0 and (found["scores"] >= 0.4).all()
    assert found["v3d"].shape[0] == n and found["j3d"].shape == (n, 127, 3)
    with Image.open(tmp_path / "out" / "two people_people.png") as drawn:
        assert drawn.size == (120, 90)
    # K counts in pixels of the image: 60 degrees over the longer side
    assert found["K"][0, 0] == pytest.approx(120 / 2 / np.tan(np.radians(30)), rel=1e-5)
    # the parameters alone give the same vertices, joints and pixels
    model = load_body_model(model_file)
    bare = {name: x for name, x in found.items() if name not in ("v3d", "j3d", "j2d")}
    again = bodies_of(bare, model, photograph)
    torch.testing.assert_close(again[0], torch.from_numpy(found["v3d"]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again[2], torch.from_numpy(found["j2d"]), atol=1e-2, rtol=1e-4)
    lines = (tmp_path / "out" / "two people_person0.obj").read_text().splitlines()
    corners = [line.split() for line in lines if line.startswith("v ")]
    np.testing.assert_allclose(np.array([row[1:] for row in corners], float), found["v3d"][0], atol=1e-4)
    assert sum(line.startswith("f ") for line in lines) == len(model.faces)
    assert compare_files(tmp_path / "out", tmp_path / "out")["f1"] == 100


def test_the_task_hmr_measures_what_a_head_finds(tmp_path, networks, photograph, model_file):
    """By an encoder with a head, and once more from the people files that this has left."""
    encoder, head = networks
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors", architecture_metadata(encoder.cfg))
    save_head(head, tmp_path / "head.safetensors")
    data, found, out = tmp_path / "data" / "val", tmp_path / "found", tmp_path / "result.json"
    run([photograph], encoder, head, model_file, found, threshold=0.2)
    people = read_people(found / "two people.npz")
    data.mkdir(parents=True)
    shutil.copy(photograph, data)
    bare = {name: x for name, x in people.items() if name not in ("v3d", "j3d", "j2d", "scores")}
    write_people(data / "two people.npz", bare)
    common = ["evaluate", "--task", "hmr", "--data", str(data.parent), "--body-model", str(model_file)]
    made = [str(tmp_path / "encoder.safetensors"), "--head", str(tmp_path / "head.safetensors"), "--out", str(out)]
    assert cli.main([*common, *made, "--device", "cpu"]) == 0
    result = json.loads(out.read_text())
    assert result["metrics"]["f1"] == 100 and result["metrics"]["pve"] < 0.1 and result["images"] == 1
    predictions = tmp_path / "result.predictions"
    assert [path.name for path in predictions.iterdir()] == ["two people.npz"]
    again = tmp_path / "again.json"
    assert cli.main([*common, "--predictions", str(predictions), "--out", str(again)]) == 0
    assert json.loads(again.read_text())["metrics"] == result["metrics"]
    with pytest.raises(BodyModelError, match="give --body-model FILE; register at"):
        predict_people(data, encoder, head, tmp_path / "p")
    with pytest.raises(ValueError, match="--body-model is not for --task pose with --predictions"):
        run_measured("pose", "", "d", tmp_path, None, None, more={"body_model": model_file})


def test_predictions_are_those_of_the_data_alone(tmp_path, networks, photograph, model_file):
    """People files of an earlier evaluation are taken away; one without an image is not counted as people missed."""
    data, found = tmp_path / "data", tmp_path / "found"
    run([photograph], *networks, model_file, data, threshold=0.4, meshes=False)
    (data / "two people_people.png").unlink()
    shutil.copytree(data, found / "older")
    with pytest.raises(DataError, match="two people.npz has no image beside it"):
        shutil.copy(photograph, data / "another.png")
        write_people(data / "another.npz", read_people(data / "two people.npz"))
        predict_people(data, *networks, found, model_file)
    shutil.copy(photograph, data)
    predict_people(data, *networks, found, model_file)
    assert sorted(path.name for path in found.rglob("*.npz")) == ["another.npz", "two people.npz"]
    assert compare_files(found, data)["recall"] == 100
    with pytest.raises(DataError, match="the truth .*nowhere: there is no such folder"):
        compare_files(found, tmp_path / "nowhere")


def test_earlier_results_go_and_a_data_set_stays(tmp_path, networks, photograph, model_file, capsys):
    """Regression: meshes of people that are not found any more stayed, and a data set's people were written over."""
    out = tmp_path / "out"
    (many,) = run([photograph], *networks, model_file, out, threshold=0.1)
    assert len(list(out.glob("*.obj"))) == many["people"] > 0
    (out / "two people_personal.obj").touch()
    run([photograph], *networks, model_file, out, threshold=1.0)
    assert [path.name for path in out.glob("*.obj")] == ["two people_personal.obj"]
    truth = {name: x for name, x in read_people(out / "two people.npz").items() if name != "scores"}
    write_people(tmp_path / "two people.npz", truth)
    with pytest.raises(ValueError, match="two people.npz is there and is not of this command: choose another --out"):
        run([photograph], *networks, model_file, tmp_path)
    with pytest.raises(ValueError, match="cannot be a folder"):
        run([photograph], *networks, model_file, photograph)


def test_intrinsics_are_those_of_the_image(tmp_path, networks, photograph, model_file):
    k = np.array([[150.0, 0, 50], [0, 150, 40], [0, 0, 1]])
    run([photograph], *networks, model_file, tmp_path / "out", threshold=0.4, intrinsics=k, meshes=False)
    np.testing.assert_allclose(read_people(tmp_path / "out" / "two people.npz")["K"], k, rtol=1e-5)
    assert not list((tmp_path / "out").glob("*.obj"))


def test_bad_input_is_answered_by_a_sentence(tmp_path, networks, photograph, model_file):
    encoder, head = networks
    out = tmp_path / "out"
    with pytest.raises(BodyModelError, match="register at"):
        run([photograph], encoder, head, tmp_path / "none.npz", out)
    with pytest.raises(ValueError, match="threshold 0: give a score"):
        run([photograph], encoder, head, model_file, out, threshold=0)
    with pytest.raises(ValueError, match="fov 200"):
        run([photograph], encoder, head, model_file, out, fov=200)
    with pytest.raises(ValueError, match=r"intrinsics \[\[0.0"):
        run([photograph], encoder, head, model_file, out, intrinsics=np.zeros((3, 3)))
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"text.jpg cannot be read"):
        run([tmp_path / "text.jpg"], encoder, head, model_file, out)
    with pytest.raises(ValueError, match="would write the same files"):
        run([photograph, photograph.with_suffix(".jpg")], encoder, head, model_file, out)
    other = MultiHmrHead(48, 56, heads=2, head_dim=8, dim=24, hidden=24)
    with pytest.raises(HeadError, match="reads 48 channels"):
        run([photograph], encoder, other, model_file, out)


def test_photographs_are_turned_upright(tmp_path, networks, photograph, model_file):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    with Image.open(photograph) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for path in (photograph, tmp_path / "turned.png"):
        run([path], *networks, model_file, tmp_path / "out", threshold=0.4, meshes=False)
    as_is, turned = (read_people(tmp_path / "out" / f"{name}.npz") for name in ("two people", "turned"))
    assert all(np.array_equal(array, turned[name]) for name, array in as_is.items()) and len(as_is["scores"])


def test_scores_stay_inside_the_picture():
    """At the edges as many pixels are written as in the middle, less the dot; larger pictures have larger ones."""
    grey, score = np.full((200, 300, 3), 100, np.uint8), np.array([0.5])
    middle, *edges = (
        (draw_scores(grey, np.array([place]), score) != 100).any(-1).sum()
        for place in ((100.0, 100.0), (290.0, 100.0), (100.0, -20.0), (100.0, 240.0))
    )
    assert min(edges) > 0.75 * middle
    large = draw_scores(np.full((2000, 3000, 3), 100, np.uint8), np.array([[9.0, 9.0]]), score)
    assert (large != 100).any(-1).sum() > 8 * middle


def test_nearer_bodies_hide_farther_ones():
    square = np.array([[[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]])
    faces = np.array([[0, 2, 1], [0, 3, 2]])  # turned towards the camera
    k = np.array([[20.0, 0, 32], [0, 20, 32], [0, 0, 1]])
    grey = np.full((64, 64, 3), 100, np.uint8)
    bodies = np.concatenate([square + (0, 0, 2), square * 0.5 + (0, 0, 1.5), square + (0, 0, -3)])
    drawn = draw_bodies(grey, bodies, faces, k, ((255, 0, 0), (0, 255, 0), (0, 0, 255)), opacity=1.0)
    assert drawn[32, 32, 1] > 50 and drawn[32, 32, 0] == 0  # the nearer one
    assert drawn[24, 32, 0] > 50 and drawn[24, 32, 1] == 0  # the farther one around it
    assert not (drawn[..., 2] > 100).any() and (drawn[0, 0] == 100).all()  # nothing of what is behind
    away = draw_bodies(grey, bodies, faces[:, ::-1], k)
    assert np.array_equal(away, grey)  # seen from inside
    assert np.array_equal(draw_bodies(grey, np.zeros((0, 4, 3)), faces, k), grey)
