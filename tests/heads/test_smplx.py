"""The SMPL-X layer against formulas and invariants, and its file against everything that can be wrong with it."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.heads_proof.bodies import PARENTS, body_arrays, joints
from dune_fast.heads.multihmr import npz
from dune_fast.heads.multihmr.body_file import BodyModelError, read_body_file
from dune_fast.heads.multihmr.rotations import matrix_from_axis_angle
from dune_fast.heads.multihmr.smplx import VERTEX_JOINTS, BodyModel, load_body_model


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return body_arrays(20)


@pytest.fixture(scope="module")
def model(arrays) -> BodyModel:
    return BodyModel(arrays)


def write(path: Path, arrays: dict) -> Path:
    np.savez(path, **arrays)
    return path


def drawn(p: int, scale: float = 0.5) -> torch.Tensor:
    return matrix_from_axis_angle(scale * torch.randn(p, 55, 3))


def test_zero_pose_is_template_plus_shape(model, arrays):
    betas, still = torch.randn(3, 10), torch.eye(3).expand(3, 55, 3, 3)
    body = model(betas, still)
    shaped = arrays["v_template"] + np.einsum("pl,vcl->pvc", betas.numpy(), arrays["shapedirs"][..., :10])
    torch.testing.assert_close(body.vertices, torch.tensor(shaped, dtype=torch.float32), atol=2e-6, rtol=1e-5)
    places = np.einsum("jv,pvc->pjc", arrays["J_regressor"], shaped)
    torch.testing.assert_close(body.joints[:, :55], torch.tensor(places, dtype=torch.float32), atol=1e-5, rtol=1e-5)
    assert body.joints.shape == (3, 127, 3)
    torch.testing.assert_close(model.pelvis(betas), body.joints[:, 0])
    named = body.vertices[:, arrays["vertex_ids"].astype(int)]
    assert torch.equal(body.joints[:, 55 : 55 + len(VERTEX_JOINTS)], named)


def test_skinning_against_a_walk_down_the_tree(model, arrays):
    """One joint and one vertex at a time, in float64, by 4 x 4 matrices."""
    betas, rotations = torch.randn(1, 10), drawn(1)
    body = model(betas, rotations)
    a = {name: x.astype(np.float64) for name, x in arrays.items()}
    r = rotations[0].double().numpy()
    shaped = a["v_template"] + a["shapedirs"][..., :10] @ betas[0].double().numpy()
    rest = a["J_regressor"] @ shaped
    posed = shaped + a["posedirs"] @ (r[1:] - np.eye(3)).reshape(-1)
    chain = []
    for i, parent in enumerate(PARENTS):
        own = np.eye(4)
        own[:3, :3], own[:3, 3] = r[i], rest[i] - (rest[parent] if i else 0)
        chain.append(own if i == 0 else chain[parent] @ own)
    for i in range(55):
        np.testing.assert_allclose(body.joints[0, i].numpy(), chain[i][:3, 3], atol=2e-5)
    for v in range(0, len(shaped), 97):
        blended = np.zeros(3)
        for i in range(55):
            local = np.append(posed[v] - rest[i], 1.0)
            blended += a["weights"][v, i] * (chain[i] @ local)[:3]
        np.testing.assert_allclose(body.vertices[0, v].numpy(), blended, atol=2e-5)


def test_turning_the_root_turns_the_body_about_its_pelvis(model):
    betas, rotations = torch.randn(2, 10), drawn(2)
    turn = matrix_from_axis_angle(torch.randn(2, 3))
    before = model(betas, rotations)
    turned = rotations.clone()
    turned[:, 0] = turn @ rotations[:, 0]
    after = model(betas, turned)
    for x, y in zip(before, after, strict=True):
        pelvis = before.joints[:, :1]
        torch.testing.assert_close(y - pelvis, (x - pelvis) @ turn.transpose(1, 2), atol=3e-6, rtol=1e-4)


def test_shape_and_expression_take_their_own_columns(arrays):
    many = {**body_arrays(400)}
    model, still = BodyModel(many), torch.eye(3).expand(1, 55, 3, 3)
    plain = model(torch.zeros(1, 10), still).vertices
    smile = model(torch.zeros(1, 10), still, torch.tensor([[0.0, 2.0]])).vertices - plain
    torch.testing.assert_close(smile[0], 2 * torch.from_numpy(many["shapedirs"][..., 301]), atol=1e-6, rtol=1e-4)
    old = BodyModel(arrays)  # 10 + 10 columns: the eleventh shape is the first expression
    eleventh = torch.zeros(1, 11)
    eleventh[0, 10] = 1.0
    torch.testing.assert_close(
        old(eleventh, still).vertices, old(torch.zeros(1, 10), still, torch.ones(1, 1)).vertices
    )
    with pytest.raises(BodyModelError, match="20 shape directions, 21 are asked"):
        old(torch.zeros(1, 21), still)


def test_hand_means_are_added_to_axis_angles(model, arrays):
    zeros = [torch.zeros(1, n, 3) for n in (1, 21, 1, 1, 1, 15, 15)]
    assert torch.equal(model.matrices(*zeros), torch.eye(3).expand(1, 55, 3, 3))
    rotations = model.matrices(*zeros, flat_hand_mean=False)
    left = matrix_from_axis_angle(torch.tensor(arrays["hands_meanl"], dtype=torch.float32).view(15, 3))
    torch.testing.assert_close(rotations[0, 25:40], left)
    assert torch.equal(rotations[0, :25], torch.eye(3).expand(25, 3, 3))


def test_gradient_reaches_every_input(model):
    betas, angles = torch.randn(1, 10, requires_grad=True), torch.zeros(1, 55, 3, requires_grad=True)
    expression = torch.zeros(1, 10, requires_grad=True)
    body = model(betas, matrix_from_axis_angle(angles), expression)
    (body.vertices.square().sum() + body.joints.square().sum()).backward()
    for x in (betas, angles, expression):
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_the_model_is_in_no_state_dict(model):
    assert not model.state_dict()


def test_skeleton_of_the_synthetic_model(model):
    body = model(torch.zeros(1, 10), torch.eye(3).expand(1, 55, 3, 3))
    np.testing.assert_allclose(body.joints[0, :55].numpy(), joints(), atol=1e-5)
    assert len(model.levels) == 10 and sorted(sum(model.levels, [])) == list(range(1, 55))


def test_file_round_trip(tmp_path, arrays):
    loaded = read_body_file(write(tmp_path / "model.npz", {**arrays, "joint2num": np.array({}, dtype=object)}))
    assert loaded.keys() == arrays.keys()  # the pickled object was not touched
    for name, array in arrays.items():
        assert np.array_equal(loaded[name], array), name
    (tmp_path / "model.npz").rename(tmp_path / "SMPLX_NEUTRAL.npz")
    assert load_body_model(tmp_path).num_vertices == len(arrays["v_template"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": None}, "lacks the arrays weights"),
        ({"weights": np.zeros((3, 55), np.float32)}, r"weights is \[3, 55\]"),
        ({"posedirs": np.zeros((5, 3, 207), np.float32)}, "posedirs is .*expected"),
        ({"f": np.full((4, 3), 10**6)}, "f points past the last"),
        ({"lmk_faces_idx": np.full(51, -1)}, "lmk_faces_idx is not a list of indices"),
        ({"hands_meanl": np.full(45, np.nan)}, "hands_meanl has values that are not finite"),
        ({"hands_meanl": np.array(["a"] * 45)}, "hands_meanl holds <U1, not numbers"),
        ({"J_regressor": np.array([{}] * 55, dtype=object)}, "J_regressor .*"),
        ({"kintree_table": np.stack([np.arange(55), np.arange(55)])}, "a joint before its parent"),
    ],
)
def test_wrong_files_are_refused_by_a_sentence(tmp_path, arrays, change, message):
    wrong = {name: x for name, x in {**arrays, **change}.items() if x is not None}
    with pytest.raises(BodyModelError, match=message) as error:
        load_body_model(write(tmp_path / "model.npz", wrong))
    assert "register at https://smpl-x.is.tue.mpg.de" in str(error.value)


def test_missing_file_says_where_to_register(tmp_path):
    for path in (tmp_path / "SMPLX_NEUTRAL.npz", tmp_path):
        with pytest.raises(BodyModelError, match="smpl-x.is.tue.mpg.de.*SMPLX_NEUTRAL.npz"):
            load_body_model(path)


def test_pickles_and_other_bytes_are_refused(tmp_path):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"v_template": 1}))
    with pytest.raises(BodyModelError, match="is a pickle, which is not read"):
        load_body_model(tmp_path / "model.pkl")
    (tmp_path / "model.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(BodyModelError, match="is no SMPL-X body model"):
        load_body_model(tmp_path / "model.npz")


def header_of(shape: tuple[int, ...]) -> bytes:
    """The header of a float32 array of this shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def test_claims_beyond_the_files_bytes_are_refused(tmp_path, arrays):
    """A header may say anything: nothing is made that the file does not hold."""
    for shape, message in (((100_000, 3), "claims 300000 values"), ((10**15, 3), r"v_template is \[1000000000000000")):
        path = write(tmp_path / "plain.npz", arrays)
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "model.npz", "w") as new:
            for member in old.namelist():
                data = header_of(shape) + bytes(64) if member == "v_template.npy" else old.read(member)
                new.writestr(member, data)
        with pytest.raises(BodyModelError, match=message):
            load_body_model(tmp_path / "model.npz")


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path, arrays, monkeypatch):
    """Zeros compress without end; nothing of them is unpacked."""
    np.savez_compressed(tmp_path / "model.npz", **arrays | {"posedirs": np.zeros((9000, 3, 486), np.float32)})
    monkeypatch.setattr(npz, "_UNPACKED_FLOOR", 1 << 20)
    with pytest.raises(BodyModelError, match="bytes are said to unpack to 5[0-9]{7}"):
        load_body_model(tmp_path / "model.npz")


def test_vertices_that_are_joints(arrays):
    bare = {name: x for name, x in arrays.items() if name != "vertex_ids"}
    with pytest.raises(BodyModelError, match="say which vertices are joints"):
        BodyModel(bare)
    ids = dict.fromkeys(VERTEX_JOINTS, 3)
    assert BodyModel(bare, ids).vertex_joints.tolist() == [3] * 21
    with pytest.raises(BodyModelError, match="not all among"):
        BodyModel(bare, {**ids, "nose": 10**6})
    with pytest.raises(BodyModelError, match="lacks nose"):
        BodyModel(bare, {name: 3 for name in ids if name != "nose"})
    with pytest.raises(BodyModelError, match="30 shape directions"):
        BodyModel({**arrays, "shapedirs": np.zeros((len(arrays["v_template"]), 3, 30), np.float32)})
