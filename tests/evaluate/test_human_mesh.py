"""Metrics of human mesh recovery, and their evaluation from files."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial import procrustes
from scipy.spatial.transform import Rotation

from bench.heads_proof.bodies import body_arrays
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.evaluate.hmr import compare_files
from dune_fast.evaluate.human_mesh import (
    H36M_TO_14,
    Counts,
    MeshErrors,
    boxes_iou,
    fit_similarity,
    match_people,
    mean_distances,
    regress_joints,
)
from dune_fast.heads.multihmr.people_files import write_people
from dune_fast.heads.multihmr.smplx import BodyModel
from dune_fast.heads.multihmr.targets import PARTS


@pytest.fixture(scope="module")
def body() -> BodyModel:
    return BodyModel(body_arrays(20))


def test_boxes_count_pixels_at_both_ends():
    a = torch.tensor([[[0.0, 0.0], [9.0, 4.0]]])
    b = torch.tensor([[[5.0, 0.0], [14.0, 4.0]], [[5.0, 2.0], [5.0, 2.0]], [[10.0, 0.0], [19.0, 4.0]]])
    assert boxes_iou(a, b)[0].tolist() == pytest.approx([25 / 75, 1 / 50, 0.0])


def plain_matching(found: np.ndarray, truth: np.ndarray) -> list[tuple[int, int]]:
    """The rule, pair by pair."""
    costs = {(i, j): np.linalg.svd(found[i] - truth[j])[1][0] for i, j in np.ndindex(len(found), len(truth))}
    pairs, failures = [], 0
    for i, j in sorted(costs, key=costs.get):
        if len(pairs) == len(truth) or len(pairs) + failures >= len(found):
            break
        iou = float(boxes_iou(torch.from_numpy(found[i : i + 1]), torch.from_numpy(truth[j : j + 1])))
        if iou < 0.05:
            failures += 1
        elif all(i != a and j != b for a, b in pairs):
            pairs.append((i, j))
    return pairs


def test_matching_against_the_rule():
    rng = np.random.default_rng(0)
    seen = set()
    for p, t in itertools.product(range(5), range(5)):
        truth = rng.uniform(0, 60, (t, 1, 2)) + rng.uniform(0, 25, (t, 12, 2))
        found = rng.uniform(0, 60, (p, 1, 2)) + rng.uniform(0, 25, (p, 12, 2))
        pairs = match_people(torch.from_numpy(found), torch.from_numpy(truth))
        assert [tuple(x) for x in pairs.tolist()] == plain_matching(found, truth)
        seen.add(len(pairs))
    assert len(seen) > 2


def test_nobody_is_matched_twice():
    truth = torch.rand(2, 10, 2) * 20
    pairs = match_people(torch.cat([truth + 0.1, truth + 0.2]), truth)
    assert sorted(pairs.tolist()) == [[0, 0], [1, 1]]


def test_similarity_is_found_and_agrees_with_scipy():
    target = torch.randn(4, 30, 3, dtype=torch.float64)
    turns = torch.from_numpy(Rotation.random(4, random_state=0).as_matrix())
    moved = 3.0 * target @ turns + torch.randn(4, 1, 3, dtype=torch.float64)
    torch.testing.assert_close(fit_similarity(moved, target), target)
    assert mean_distances(moved, target, aligned=True).max() < 1e-9
    noisy = moved + 0.3 * torch.randn_like(moved)
    ours = (fit_similarity(noisy, target) - target).square().sum((1, 2))
    for k in range(4):  # scipy normalises the target, and its distance with it
        centred = target[k] - target[k].mean(0)
        distance = procrustes(target[k].numpy(), noisy[k].numpy())[2] * float(centred.square().sum())
        assert float(ours[k]) == pytest.approx(distance)


def test_a_mirror_image_is_not_a_similarity():
    target = torch.randn(1, 40, 3)
    assert mean_distances(target * torch.tensor([-1.0, 1, 1]), target, aligned=True) > 100


def test_distances_are_millimetres_and_ignore_the_pelvis():
    errors = MeshErrors()
    v3d, joints = torch.randn(2, 50, 3), torch.rand(2, 20, 2) * 100
    moved = v3d + torch.tensor([[[0.0, 0, 5]], [[1.0, 0, 0]]])
    errors.add((moved, moved[:, 7], joints), (v3d, v3d[:, 7], joints))
    assert errors.result()["pve"] == pytest.approx(0, abs=1e-3)
    assert mean_distances(v3d + 0.003, v3d, aligned=False).tolist() == pytest.approx([3 * 3**0.5] * 2, rel=1e-3)


def test_joints_of_the_regressor():
    regressor, vertices = torch.rand(17, 50), torch.randn(1, 50, 3)
    joints = torch.einsum("jv,pvc->pjc", regressor.double(), vertices.double())
    expected = torch.stack([joints[:, k] - joints[:, 0] for k in H36M_TO_14], 1)
    torch.testing.assert_close(regress_joints(vertices, regressor), expected)


def test_scores_are_rounded_to_whole_percents():
    counts = Counts()
    counts.add(found=4, truth=3, matches=2)
    counts.add(found=0, truth=1, matches=0)
    assert counts.scores() == {"precision": 50.0, "recall": 50.0, "f1": 50.0}
    assert Counts(3, 1, 1).scores()["recall"] == pytest.approx(67.0)
    assert Counts(2, 2, 5).scores() == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def people(n: int, vertices: BodyModel | None = None) -> dict[str, np.ndarray]:
    """A people file's arrays; with a model its vertices and joints, too."""
    given = {name: 0.2 * torch.randn(n, joints, 3) for name, joints in PARTS.items()}
    given |= {"betas": torch.randn(n, 10), "transl": torch.rand(n, 3) + torch.tensor([0.0, 0.0, 3.0])}
    arrays = {name: x.numpy() for name, x in given.items()}
    arrays["K"] = np.array([[100.0, 0, 50], [0, 100, 50], [0, 0, 1]])
    if vertices is not None:
        body = vertices(given["betas"], vertices.matrices(*(given[name] for name in PARTS)))
        arrays["v3d"] = (body.vertices + given["transl"][:, None]).numpy()
        arrays["j3d"] = (body.joints + given["transl"][:, None]).numpy()
        plane = arrays["j3d"] @ arrays["K"].T
        arrays["j2d"] = plane[..., :2] / plane[..., 2:]
    return arrays


def test_files_against_files(tmp_path: Path, body: BodyModel):
    """Vertices of the files and those computed from their parameters are the same; names decide what is compared."""
    for folder in ("truth/a", "found/a"):
        (tmp_path / folder).mkdir(parents=True)
    for name, n in (("a/one", 2), ("two", 1), ("nobody", 0)):
        arrays = people(n, body)
        write_people(tmp_path / "truth" / f"{name}.npz", arrays)
        bare = {k: x for k, x in arrays.items() if k not in ("v3d", "j3d", "j2d")}
        if name != "two":  # there nobody was found
            write_people(tmp_path / "found" / f"{name}.npz", bare)
    result = compare_files(tmp_path / "found", tmp_path / "truth", body)
    assert result["images"] == 3 and result["recall"] == 67 and result["precision"] == 100
    assert result["pve"] < 0.01 and result["pa_pve"] < 0.01
    with pytest.raises(DataError, match="give the body model"):
        compare_files(tmp_path / "found", tmp_path / "truth")
    write_people(tmp_path / "found" / "three.npz", people(1, body))
    with pytest.raises(DataError, match="has predictions of three"):
        compare_files(tmp_path / "found", tmp_path / "truth", body)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no people file"):
        compare_files(tmp_path / "found", tmp_path / "empty", body)


def test_meshes_of_different_models_are_refused(tmp_path: Path, body: BodyModel):
    for folder in ("truth", "found"):
        (tmp_path / folder).mkdir()
    arrays = people(1, body)
    write_people(tmp_path / "truth" / "a.npz", arrays)
    write_people(tmp_path / "found" / "a.npz", {**arrays, "v3d": arrays["v3d"][:, :-1]})
    with pytest.raises(DataError, match="they must be of one body model"):
        compare_files(tmp_path / "found", tmp_path / "truth")
