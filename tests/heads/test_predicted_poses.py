"""A head that says what is true gets a perfect score: scenes to a submission, pairs to a file of poses."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dune_fast import cli
from dune_fast.evaluate.pose_files import PoseFileError
from dune_fast.evaluate.pose_metrics import matrix_to_quaternion
from dune_fast.evaluate.relocalisation import measure_mapfree, measure_poses
from dune_fast.heads.files import save_head
from dune_fast.heads.head import HeadError
from dune_fast.heads.linear.depth import DepthHead
from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.infer.files import InferenceError
from dune_fast.infer.relocalisation import predict_mapfree, predict_poses, queries
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.teachers.architecture import architecture_metadata
from tests.heads.test_mast3r_infer import OPTIONS, SIDE, ExactHead, K, R, T, encoder, photographs, prepared

__all__ = ["encoder", "photographs"]  # fixtures
IDENTITY, FOUND = "1 0 0 0 0 0 0", " ".join(map(repr, [*matrix_to_quaternion(torch.tensor(R)).tolist(), *T.tolist()]))
CAMERA = f"{K[0, 0]} {K[1, 1]} {K[0, 2]} {K[1, 2]} 224 168"


@pytest.fixture
def head(photographs) -> ExactHead:
    return ExactHead(prepared(photographs), [K, K])


@pytest.fixture
def scenes(photographs, tmp_path) -> Path:
    """A scene of 6 query frames, of which 0 and 5 count."""
    scene = tmp_path / "val" / "s1"
    names = ["seq0/frame_00000.jpg", *(f"seq1/frame_{i:05}.jpg" for i in range(6))]
    for i, name in enumerate(names):
        (scene / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(photographs[min(i, 1)]).save(scene / name)
    (scene / "poses.txt").write_text("".join(f"{n} {FOUND if i else IDENTITY}\n" for i, n in enumerate(names)))
    (scene / "intrinsics.txt").write_text("".join(f"{name} {CAMERA}\n" for name in names))
    return tmp_path / "val"


def test_a_submission_by_a_head(scenes, encoder, head, tmp_path):
    assert queries(scenes / "s1") == ["seq1/frame_00000.jpg", "seq1/frame_00005.jpg"]
    predict_mapfree(scenes, encoder, head, tmp_path / "s.zip", long_side=SIDE)
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        lines = archive.read("pose_s1.txt").decode().splitlines()
    assert [line.split()[0] for line in lines] == ["seq1/frame_00000.jpg", "seq1/frame_00005.jpg"]
    assert all(len(line.split()) == 9 and float(line.split()[-1]) > 50 for line in lines)  # inliers
    metrics = measure_mapfree(scenes, tmp_path / "s.zip")["metrics"]
    assert metrics["AUC @ VCRE < 45px"] == metrics["Precision @ Pose Error < (25.0cm, 5deg)"] == 1
    assert metrics["Average Median Translation Error"] < 0.1 and metrics["Average Median Reprojection Error"] < 5


def test_queries_are_those_that_are_measured(scenes):
    """Regression: a line that the metric ignores shifted which frames are every fifth."""
    path = scenes / "s1" / "poses.txt"
    lines = path.read_text().splitlines()
    lines[2] = "seq1/frame_00001.jpg nan 0 0 0 0 0 0"
    path.write_text("\n".join(["#frame qw qx qy qz tx ty tz", *lines]))
    assert queries(scenes / "s1") == ["seq1/frame_00000.jpg"]


def test_a_head_that_finds_no_pose_is_measured(photographs, encoder, tmp_path, caplog):
    """Regression: the empty file was taken for one of other images, and no result was written."""
    head = ExactHead(prepared(photographs), [K, K], desc_conf=0.5)
    (tmp_path / "pairs.txt").write_text(f"a.png b.png {FOUND}\n")
    predict_poses(tmp_path / "pairs.txt", encoder, head, tmp_path / "found.txt", long_side=SIDE)
    assert "1 of 1 pairs have no pose; the first is a.png b.png: 0 matches; a pose needs 4" in caplog.text
    result = measure_poses(tmp_path / "pairs.txt", tmp_path / "found.txt")
    assert result["missing"] == result["pairs"] == 1 and set(result["metrics"].values()) == {0.0}


def test_poses_of_pairs_by_a_head(photographs, encoder, head, tmp_path):
    (tmp_path / "pairs.txt").write_text(f"a.png b.png {FOUND}\n")
    for known in (False, True):  # focal lengths read off the points, then given
        if known:
            (tmp_path / "intrinsics.txt").write_text(f"a.png {CAMERA}\nb.png {CAMERA}\n")
        predict_poses(tmp_path / "pairs.txt", encoder, head, tmp_path / "found.txt", long_side=SIDE)
        metrics = measure_poses(tmp_path / "pairs.txt", tmp_path / "found.txt")["metrics"]
        assert metrics["RRA@5"] == metrics["RTA@5"] == 1
    (tmp_path / "intrinsics.txt").write_text(f"a.png {CAMERA}\n")
    with pytest.raises(PoseFileError, match="intrinsics.txt lacks the image b.png"):
        predict_poses(tmp_path / "pairs.txt", encoder, head, tmp_path / "found.txt", long_side=SIDE)


def test_what_does_not_go_together_is_said_before_the_work(scenes, encoder, head, tmp_path):
    with pytest.raises(HeadError, match="this is a linear_depth head; poses need a mast3r head"):
        predict_mapfree(scenes, encoder, DepthHead(8), tmp_path / "s.zip")
    with pytest.raises(InferenceError, match="a long side of 100 pixels is not a multiple of the patch size 14"):
        predict_mapfree(scenes, encoder, head, tmp_path / "s.zip", long_side=100)
    with pytest.raises(InferenceError, match="pose method 'guess' is unknown"):
        predict_poses(tmp_path / "pairs.txt", encoder, head, tmp_path / "found.txt", pose_method="guess")
    path = scenes / "s1" / "intrinsics.txt"
    whole = path.read_text()
    path.write_text(whole.replace("224 168", "540 720"))
    with pytest.raises(PoseFileError, match="with 540 x 720 pixels, and the image has 224 x 168"):
        predict_mapfree(scenes, encoder, head, tmp_path / "s.zip")
    path.write_text(whole)
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if "00005" not in line))
    with pytest.raises(PoseFileError, match="intrinsics.txt lacks the image seq1/frame_00005.jpg"):
        predict_mapfree(scenes, encoder, head, tmp_path / "s.zip")
    (scenes / "s1" / "seq1" / "frame_00005.jpg").unlink()
    calls = head.calls
    with pytest.raises(PoseFileError, match="no image .*s1/seq1/frame_00005.jpg; 1 of 3 are missing"):
        predict_mapfree(scenes, encoder, head, tmp_path / "s.zip")
    assert head.calls == calls


def test_the_command_makes_measures_and_keeps(scenes, encoder, tmp_path, capsys):
    save_file(VisionTransformer(encoder.cfg).init_weights().state_dict(), tmp_path / "encoder.safetensors",
              architecture_metadata(encoder.cfg))  # fmt: skip
    save_head(Mast3rHead(**OPTIONS), tmp_path / "mast3r.safetensors")
    out = tmp_path / "results" / "mapfree.json"
    arguments = ["evaluate", str(tmp_path / "encoder.safetensors"), "--task", "mapfree", "--data", str(scenes)]
    arguments += ["--head", str(tmp_path / "mast3r.safetensors"), "--out", str(out), "--long-side", "56"]
    assert cli.main(arguments) == 0
    result = json.loads(out.read_text())
    assert result["frames"] == 2 and result["metrics"]["Precision @ VCRE < 45px"] in (0, 0.5, 1)
    assert Path(result["predictions"]) == tmp_path / "results" / "mapfree.predictions.zip"
    assert zipfile.ZipFile(result["predictions"]).namelist() == ["pose_s1.txt"]
    capsys.readouterr()
    for more, words in (
        (["--head", str(tmp_path / "encoder.safetensors")], "holds an encoder and no head"),
        (["--pose-method", "guess"], "pose method 'guess' is unknown"),
        (["--size", "336"], "--size is for the tasks knn, linear, segmentation, depth: leave it out"),
        (["--no-figures"], "--no-figures is for the evaluation of a run: leave it out with --task"),
        (["--out", str(tmp_path)], "is a folder, and the result is a file: give a name in it"),
        (["--out", str(out / "x.json")], "cannot be a folder"),
    ):
        assert cli.main([*arguments, *more]) == 2
        assert words in capsys.readouterr().err


def test_options_of_a_head_need_one(scenes, tmp_path, capsys):
    arguments = ["evaluate", "--task", "mapfree", "--data", str(scenes), "--predictions", "s.zip", "--long-side", "56"]
    assert cli.main(arguments) == 2
    assert "--long-side is not for --task mapfree with --predictions: leave it out" in capsys.readouterr().err
