"""Map-free relocalisation and relative poses: metrics against other ways to compute them, files right and wrong."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from dune_fast import cli
from dune_fast.evaluate.pose_files import Pose, PoseFileError, read_intrinsics, read_poses, submission_bytes
from dune_fast.evaluate.pose_metrics import (
    direction_errors,
    matrix_to_quaternion,
    pose_accuracies,
    precision_and_auc,
    quaternion_to_matrix,
    query_points,
    reprojection_errors,
    rotation_errors,
)
from dune_fast.evaluate.relocalisation import measure_mapfree, measure_poses


def random_rotations(count: int) -> Rotation:
    return Rotation.random(count, random_state=0)


def test_quaternions_and_angles_are_scipys():
    first, second = random_rotations(64), Rotation.random(64, random_state=1)
    half_turns = Rotation.from_rotvec(np.pi * np.eye(3))
    for rotation in (first, half_turns, Rotation.identity(1)):
        quaternion = torch.tensor(rotation.as_quat(scalar_first=True))
        matrix = torch.tensor(rotation.as_matrix())
        torch.testing.assert_close(quaternion_to_matrix(3 * quaternion), matrix)
        torch.testing.assert_close(quaternion_to_matrix(matrix_to_quaternion(matrix)), matrix)
    matrices = [torch.tensor(r.as_matrix()) for r in (first, second)]
    expected = np.rad2deg((first.inv() * second).magnitude())
    assert rotation_errors(*matrices).tolist() == pytest.approx(expected.tolist())
    assert rotation_errors(matrices[0], matrices[0]).max() < 1e-5


def test_directions_have_neither_sign_nor_length():
    true = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
    found = torch.tensor([[-5.0, 0, 0], [0, 1, 1], [0, 0, 2], [1, 0, 0]])
    assert direction_errors(found, true).tolist() == pytest.approx([0, 45, 90, 90])


def test_reprojection_is_that_of_a_plain_loop():
    rotations = Rotation.from_rotvec([[0.05, -0.1, 0.02], [0.4, 3.0, 0.1]])  # the second looks away
    true, found = (np.array([[0.1, 0.2, -0.3], [0, 0, 0.5]]), np.array([[0.3, 0.1, -0.2], [0.2, 0, 0.1]]))
    k, size = np.array([[600.0, 580, 270, 360], [500, 500, 260, 350]]), np.array([[540, 720], [520, 700]])
    ours = reprojection_errors(
        (torch.tensor(rotations.as_matrix()), torch.tensor(found)),
        (torch.eye(3).double().expand(2, 3, 3), torch.tensor(true)), torch.tensor(k), torch.tensor(size),
    )  # fmt: skip
    for frame in range(2):
        errors = []
        for point in query_points().numpy():
            moved = rotations[frame].apply(point - true[frame]) + found[frame]
            pixels = [
                np.clip(x[:2] / x[2] * k[frame, :2] + k[frame, 2:], 0, size[frame]) for x in (point, moved)
            ]
            errors.append(np.linalg.norm(pixels[0] - pixels[1]))
        assert len(errors) == 196 and ours[frame].item() == pytest.approx(np.mean(errors))


def test_area_under_the_curve_takes_equal_confidences_together():
    confidence, good = torch.randint(6, (50,)).double(), torch.rand(50) < 0.4  # many ties
    precision, auc = precision_and_auc(confidence, good, 0)
    expected, before = 0.0, 0
    for value in confidence.unique().flip(0):
        chosen = confidence >= value
        expected += (int(chosen.sum()) - before) / 50 * good[chosen].double().mean().item()
        before = int(chosen.sum())
    assert precision == pytest.approx(good.double().mean().item()) and auc == pytest.approx(expected)
    half = precision_and_auc(confidence, good, 50)
    assert half == pytest.approx((precision / 2, auc / 2))
    assert precision_and_auc(confidence[:0], good[:0], 3) == (0.0, 0.0)


def test_maa_is_the_mean_over_whole_degrees():
    rotation, translation = torch.tensor([0.5, 3.0, 20.0, torch.inf]), torch.tensor([1.5, 0.1, 2.0, torch.inf])
    found = pose_accuracies(rotation, translation)
    assert found["RRA@5"] == 0.5 and found["RTA@5"] == 0.75 and found["RRA@30"] == 0.75
    worse = np.array([1.5, 3.0, 20.0, np.inf])
    assert found["mAA(30)"] == pytest.approx(np.mean([(worse < t).mean() for t in range(1, 31)]))
    assert found["mAA(5)"] == pytest.approx(np.mean([(worse < t).mean() for t in range(1, 6)]))


def line(name: str, rotation: Rotation, translation, confidence: float | None = None) -> str:
    values = [*rotation.as_quat(scalar_first=True), *translation, *([] if confidence is None else [confidence])]
    return " ".join([name, *map(repr, map(float, values))])


@pytest.fixture
def scenes(tmp_path):
    """Two scenes of 11 query frames; of each 0, 5 and 10 count."""
    rotations = random_rotations(11)
    for scene in ("s00460", "s00461"):
        folder = tmp_path / "val" / scene
        folder.mkdir(parents=True)
        lines = [line("seq0/frame_00000.jpg", Rotation.identity(), (0, 0, 0))]
        lines += [line(f"seq1/frame_{i:05}.jpg", rotations[i], (0.1 * i, 0, 1)) for i in range(11)]
        (folder / "poses.txt").write_text("\n".join(lines) + "\n")
        cameras = [f"seq{int(i > 0)}/frame_{max(i - 1, 0):05}.jpg 590 590 270 360 540 720" for i in range(12)]
        (folder / "intrinsics.txt").write_text("\n".join(cameras) + "\n")
    return tmp_path / "val"


def estimate(shift: float = 0.0, frames=(0, 5, 10)) -> list[tuple[str, Pose]]:
    rotations = random_rotations(11)
    return [
        (f"seq1/frame_{i:05}.jpg",
         Pose(tuple(rotations[i].as_quat(scalar_first=True)), (0.1 * i + shift, 0.0, 1.0), 100.0 - i))
        for i in frames
    ]  # fmt: skip


def test_a_perfect_submission_is_perfect(scenes, tmp_path):
    """Regression in one: the reference's frame 0 gives way to the query's, and the others do not count."""
    wrong = [(name, pose._replace(translation=(9.0, 9.0, 9.0))) for name, pose in estimate(frames=(1, 2))]
    (tmp_path / "s.zip").write_bytes(submission_bytes({"s00460": estimate() + wrong, "s00461": estimate()}))
    found = measure_mapfree(scenes, tmp_path / "s.zip")
    assert (found["frames"], found["scenes"], found["missing_scenes"]) == (6, 2, [])
    metrics = found["metrics"]
    assert metrics["AUC @ VCRE < 90px"] == metrics["Precision @ VCRE < 45px"] == 1
    assert metrics["Precision @ Pose Error < (25.0cm, 5deg)"] == metrics["Estimates for % of frames"] == 1
    assert metrics["Average Median Rotation Error"] < 1e-4 and metrics["Average Median Reprojection Error"] < 1e-4


def test_what_is_missing_counts(scenes, tmp_path):
    """Of a scene a fifth of the frames, of a scene without a file all of them, as the benchmark's own code."""
    folder = tmp_path / "submission"
    folder.mkdir()
    lines = [" ".join([name, *map(str, (*p.quaternion, *p.translation, p.confidence))]) for name, p in estimate(0.5)]
    lines[1] = lines[1].rpartition(" ")[0]  # frame 5 has no confidence
    lines += ["seq1/frame_00005.jpg nan 0 0 0 0 0 0 1", "seq1/frame_00005.jpg 0 0 0 0 0 0 0 1", "# a remark"]
    (folder / "pose_s00460.txt").write_text("\n".join(lines))
    found = measure_mapfree(scenes, folder)
    assert found["missing_scenes"] == ["s00461"] and (found["frames"], found["missing"]) == (3 + 11, 1 + 11)
    metrics = found["metrics"]
    assert metrics["Average Median Translation Error"] == pytest.approx(0.5)
    assert metrics["Precision @ Pose Error < (25.0cm, 5deg)"] == 0
    assert metrics["Estimates for % of frames"] == pytest.approx(2 / 14)


def test_files_that_cannot_be_measured_are_named(scenes, tmp_path, caplog):
    bad = tmp_path / "bad.zip"
    for content, words in (
        (b"PK no zip", "is no zip file that can be read"),
        (None, "there is no submission"),
    ):
        bad.unlink(missing_ok=True)
        if content:
            bad.write_bytes(content)
        with pytest.raises(PoseFileError, match=words):
            measure_mapfree(scenes, bad)
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("../pose_s00460.txt", "")
    with pytest.raises(PoseFileError, match="it is not read"):
        measure_mapfree(scenes, bad)
    whole = submission_bytes({"s00460": estimate()})
    for wrong in (whole[:45] + bytes(20) + whole[65:], whole[:-30]):  # the stream, then the table of members
        bad.write_bytes(wrong)
        with pytest.raises(PoseFileError, match="is no zip file that can be read"):
            measure_mapfree(scenes, bad)
    with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pose_s00460.txt", bytes(65 << 20))
    with pytest.raises(PoseFileError, match="would have more than 64 MiB of poses; it is not read"):
        measure_mapfree(scenes, bad)
    bad.write_bytes(submission_bytes({"s00999": estimate()}))
    with pytest.raises(PoseFileError, match="has no pose_SCENE.txt of the scenes of .*such as s00460"):
        measure_mapfree(scenes, bad)
    bad.write_bytes(submission_bytes({"s00460": estimate(), "s00999": estimate()}))
    measure_mapfree(scenes, bad)
    assert "there is no scene s00999" in caplog.text
    with pytest.raises(PoseFileError, match="has no scene: folders with poses.txt"):
        measure_mapfree(tmp_path, bad)
    path = scenes / "s00460" / "intrinsics.txt"
    path.write_text(path.read_text().replace("590", "-590"))
    with pytest.raises(PoseFileError, match=r"intrinsics.txt, line 1, is not `frame fx fy cx cy W H`"):
        measure_mapfree(scenes, bad)
    path.write_text("seq1/frame_00000.jpg 590 590 270 360 540 720\n")
    with pytest.raises(PoseFileError, match="intrinsics.txt lacks the frame 5"):
        measure_mapfree(scenes, bad)


def test_a_submission_is_read_as_it_was_written(tmp_path):
    written = estimate(0.25)
    (tmp_path / "s.zip").write_bytes(submission_bytes({"s1": written}))
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        assert archive.namelist() == ["pose_s1.txt"]
        found = read_poses(archive.read("pose_s1.txt").decode(), tmp_path / "pose_s1.txt", 9)
    assert list(found) == [0, 5, 10]
    for (_, pose), other in zip(written, found.values(), strict=True):
        assert np.allclose([*pose.quaternion, *pose.translation, pose.confidence],
                           [*other.quaternion, *other.translation, other.confidence], rtol=1e-8)  # fmt: skip


def test_pairs_without_an_estimate_are_wrong(tmp_path):
    rotations = random_rotations(4)
    truth = [line(f"a{i}.jpg b.jpg", rotations[i], (1, 0, i)) for i in range(4)]
    found = [line(f"a{i}.jpg b.jpg", rotations[i], (-2, 0, -2 * i)) for i in range(3)] + ["a3.jpg b.jpg what"]
    (tmp_path / "true.txt").write_text("\n".join(truth))
    (tmp_path / "found.txt").write_text("\n".join(found))
    result = measure_poses(tmp_path / "true.txt", tmp_path / "found.txt")
    assert (result["pairs"], result["missing"]) == (4, 1)
    assert set(result["metrics"].values()) == {0.75}
    with pytest.raises(PoseFileError, match="has no pair of .*one of them is a0.jpg b.jpg"):
        (tmp_path / "other.txt").write_text(truth[0].replace("a0", "z0"))
        measure_poses(tmp_path / "true.txt", tmp_path / "other.txt")
    with pytest.raises(PoseFileError, match="line 4, is not `first second qw"):
        measure_poses(tmp_path / "found.txt", tmp_path / "true.txt")


def test_intrinsics_are_by_name(scenes):
    found = read_intrinsics(scenes / "s00460" / "intrinsics.txt")
    assert list(found)[:2] == ["seq0/frame_00000.jpg", "seq1/frame_00000.jpg"] and len(found) == 12
    assert found["seq1/frame_00005.jpg"] == (590, 590, 270, 360, 540, 720)


def test_the_command(scenes, tmp_path, capsys):
    (tmp_path / "s.zip").write_bytes(submission_bytes({"s00460": estimate(), "s00461": estimate(0.1, (0, 5))}))
    out = tmp_path / "result.json"
    command = ["evaluate", "--task", "mapfree", "--data", str(scenes), "--predictions", str(tmp_path / "s.zip")]
    assert cli.main([*command, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["task"] == "mapfree" and result["metrics"]["Estimates for % of frames"] == pytest.approx(5 / 6)
    assert "AUC @ VCRE < 90px" in capsys.readouterr().out
    (tmp_path / "s.zip").write_bytes(submission_bytes({"s00460": []}))  # without an estimate there is no median
    assert cli.main([*command, "--out", str(out)]) == 0
    strict = json.loads(out.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert strict["metrics"]["Average Median Rotation Error"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "mapfree", "--predictions", "s.zip"], "--task mapfree needs the truth: give --data"),
        (["--task", "mapfree", "--data", "d"], "give --predictions FILE, or an encoder and its --head FILE"),
        (["runs/demo", "--task", "pose", "--data", "d", "--predictions", "p"], "give --predictions or an encoder with"),
        (["--task", "knn", "--data", "d"], "--task knn evaluates an encoder: give it first"),
        (["runs/demo", "--task", "knn", "--data", "d", "--head", "h"], "--head is for the tasks mapfree, pose, hmr"),
        ([], "give a run"),
    ],
)
def test_errors_of_the_command_line(arguments, words, capsys):
    assert cli.main(["evaluate", *arguments]) == 2
    assert words in capsys.readouterr().err
