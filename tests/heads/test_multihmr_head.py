"""Multi-HMR's head: rotations, detection, camera, attention among people, its released files."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from bench.heads_proof.bodies import body_arrays
from dune_fast.heads.files import load_head
from dune_fast.heads.head import HeadError
from dune_fast.heads.multihmr import official
from dune_fast.heads.multihmr.camera import (
    camera_embedding,
    default_intrinsics,
    depth_of,
    focal_ratio,
    inverse,
    project,
    unproject,
    value_of,
)
from dune_fast.heads.multihmr.detection import Cells, detect, slots_of, suppress
from dune_fast.heads.multihmr.head import MultiHmrHead, place_bodies
from dune_fast.heads.multihmr.rotations import (
    axis_angle_from_matrix,
    matrix_from_axis_angle,
    matrix_from_six,
)
from dune_fast.heads.multihmr.smplx import BodyModel
from dune_fast.heads.tokens import EncoderTokens
from dune_fast.teachers.containers import read_container

SMALL = {"width": 12, "image_size": 70, "depth": 2, "heads": 2, "head_dim": 8, "dim": 24, "hidden": 20}


@pytest.fixture
def head() -> MultiHmrHead:
    return MultiHmrHead(**SMALL)


@pytest.fixture(scope="module")
def body() -> BodyModel:
    return BodyModel(body_arrays(20))


def tokens(patch: torch.Tensor) -> EncoderTokens:
    grid = math.isqrt(patch.shape[1])
    return EncoderTokens(None, patch, None, patch, (grid, grid))


def cells_at(image: list[int], row: list[int], column: list[int]) -> Cells:
    image = torch.tensor(image)
    return Cells(image, torch.tensor(row), torch.tensor(column), *slots_of(image))


def test_rotations_against_scipy():
    vectors = torch.cat([torch.randn(50, 3), 1e-5 * torch.randn(5, 3), torch.zeros(1, 3)])
    matrices = matrix_from_axis_angle(vectors.double())
    np.testing.assert_allclose(matrices.numpy(), Rotation.from_rotvec(vectors.numpy()).as_matrix(), atol=1e-12)
    back = axis_angle_from_matrix(matrices.float())
    expected = Rotation.from_matrix(matrices.numpy()).as_rotvec()
    np.testing.assert_allclose(back.numpy(), expected, atol=1e-5)
    axes = torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64), dim=-1)
    half = axis_angle_from_matrix(matrix_from_axis_angle(math.pi * axes))  # at pi the sign is free
    torch.testing.assert_close(half.abs(), (math.pi * axes).abs(), atol=1e-6, rtol=1e-6)
    assert (torch.linalg.vector_norm(back, dim=-1) <= math.pi + 1e-6).all()


def test_six_numbers_make_rotations_whose_first_column_is_the_first_three():
    six = torch.randn(30, 6)
    matrix = matrix_from_six(six)
    torch.testing.assert_close(matrix.transpose(1, 2) @ matrix, torch.eye(3).expand(30, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(30))
    torch.testing.assert_close(matrix[..., 0], torch.nn.functional.normalize(six[:, :3], dim=-1))
    assert ((matrix[..., 1] * six[:, 3:]).sum(-1) > 0).all()


def test_the_gradient_of_a_rotation_exists_at_zero():
    r = torch.zeros(2, 3, requires_grad=True)
    matrix_from_axis_angle(r)[:, 0, 1].sum().backward()
    assert torch.equal(r.grad, torch.tensor([[0.0, 0.0, -1.0]]).expand(2, 3))


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
def test_suppression_against_brute_force(kernel):
    scores = torch.randint(0, 12, (2, 7, 9)) / 12  # with ties, which survive
    ours = suppress(scores, kernel)
    low, high = kernel // 2, kernel - kernel // 2
    for b, r, c in np.ndindex(2, 7, 9):
        around = scores[b, max(r - low, 0) : r + high, max(c - low, 0) : c + high]
        kept = scores[b, r, c] >= around.max()
        assert ours[b, r, c] == (scores[b, r, c] if kept else 0), (b, r, c)


def test_detections_come_by_image_row_column_with_their_slots():
    scores = torch.zeros(3, 4, 4)
    scores[0, 2, 1] = scores[0, 1, 3] = scores[2, 0, 0] = scores[0, 1, 1] = 0.9
    cells = detect(scores, 0.9)
    assert list(zip(*(x.tolist() for x in cells[:3]), strict=True)) == [(0, 1, 1), (0, 1, 3), (0, 2, 1), (2, 0, 0)]
    assert cells.slot.tolist() == [0, 1, 2, 0] and cells.slots == 3
    with pytest.raises(ValueError, match="nms 0: give an odd number"):
        suppress(scores, 0)


def test_camera_embedding_takes_rows_for_columns():
    k = torch.tensor([[[100.0, 0, 30], [0, 50, 20], [0, 0, 1]]])
    found = camera_embedding(k, 3, 14, 16, 64)
    assert found.shape == (1, 3, 3, 99)
    row, column = 2, 1
    ray = np.array([(row * 14 + 7 - 30) / 100, (column * 14 + 7 - 20) / 50, 1.0])
    angles = math.pi * (ray[:, None] * np.linspace(1, 32, 16)).reshape(-1)
    expected = np.concatenate([ray, np.sin(angles), np.cos(angles)])
    np.testing.assert_allclose(found[0, row, column].numpy(), expected, atol=1e-4)


def test_depth_and_projection_are_undone():
    k = default_intrinsics(84, 50.0)[None].expand(4, 3, 3)
    ratio, depth = focal_ratio(k, 84), torch.tensor([0.5, 2.0, 10.0, 49.0])
    assert torch.allclose(ratio, torch.full((4,), math.tan(math.pi / 6) / math.tan(math.radians(25))))
    for nearness in (True, False):
        torch.testing.assert_close(depth_of(value_of(depth, ratio, nearness), ratio, nearness), depth)
    pixels = torch.rand(4, 2) * 84
    points = unproject(pixels, depth, inverse(k))
    torch.testing.assert_close(points[:, 2], depth)
    torch.testing.assert_close(project(points[:, None], k)[:, 0], pixels, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="fov 180"):
        default_intrinsics(84, 180)


def test_far_depths_are_clamped_and_have_finite_gradients():
    value = torch.tensor([200.0, -200.0, 1.0], requires_grad=True)
    depth = depth_of(value, torch.ones(3), True)
    depth.sum().backward()
    assert depth.tolist()[:2] == [50.0, 0.0] and value.grad.isfinite().all() and value.grad[0] == 0


def test_people_are_independent_of_other_images_and_of_free_slots(head):
    """In a batch, with others of other images in between, everybody gets what they get alone."""
    patch, k = torch.randn(3, 25, 12), default_intrinsics(70)[None].expand(3, 3, 3).clone()
    k[1, 0, 0] = 50.0
    cells = cells_at([0, 2, 0, 2, 2, 1], [1, 1, 3, 0, 4, 2], [0, 4, 3, 2, 2, 2])
    together = head.decode(patch, k, cells)
    for b in range(3):
        mine = cells.image == b
        alone = cells_at([0] * int(mine.sum()), cells.row[mine].tolist(), cells.column[mine].tolist())
        apart = head.decode(patch[b : b + 1], k[b : b + 1], alone)
        for name in ("rotations", "betas", "expression", "translation", "location", "scores"):
            torch.testing.assert_close(getattr(together, name)[mine], getattr(apart, name), atol=2e-6, rtol=1e-4)


def test_people_of_an_image_see_each_other(head):
    patch, k = torch.randn(1, 25, 12), default_intrinsics(70)[None]
    alone = head.decode(patch, k, cells_at([0], [1], [1]))
    both = head.decode(patch, k, cells_at([0, 0], [1, 3], [1, 3]))
    assert (alone.betas[0] - both.betas[0]).abs().max() > 1e-6


def test_dropped_people_take_no_part(head):
    patch, k = torch.randn(2, 25, 12, requires_grad=True), default_intrinsics(70)[None].expand(2, 3, 3)
    cells = cells_at([0, 0, 1, 1], [1, 1, 0, 3], [2, 2, 0, 4])
    kept = torch.tensor([True, False, True, False])
    some = head.decode(patch, k, cells._replace(kept=kept))
    fewer = head.decode(patch, k, cells_at([0, 1], [1, 0], [2, 0]))
    torch.testing.assert_close(some.rotations[kept], fewer.rotations)
    torch.testing.assert_close(some.translation[kept], fewer.translation)
    some.rotations[kept].sum().backward()
    assert patch.grad.isfinite().all()


def test_images_without_people(head, body):
    people = head(tokens(torch.randn(2, 25, 12)), threshold=1.0)
    assert people.rotations.shape == (0, 53, 3, 3)
    assert place_bodies(people, body).v3d.shape == (0, body.num_vertices, 3)


@pytest.mark.parametrize("center", ["head", "pelvis", "nose"])
def test_the_primary_keypoint_lies_where_it_was_found(body, center):
    head = MultiHmrHead(**SMALL, center=center)
    people = head(tokens(torch.randn(2, 25, 12)), default_intrinsics(70)[None].expand(2, 3, 3), threshold=0.4, nms=1)
    assert len(people.scores) > 3
    placed = place_bodies(people, body, center)
    joint = {"head": 15, "pelvis": 0, "nose": 55}[center]
    torch.testing.assert_close(placed.j3d[:, joint], people.translation, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(placed.j2d[:, joint], people.location, atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(people.translation[:, 2], people.depth)


def test_gradient_reaches_every_parameter(head, body):
    patch = torch.randn(2, 25, 12, requires_grad=True)
    people = head.decode(patch, default_intrinsics(70)[None].expand(2, 3, 3), cells_at([0, 0, 1], [1, 2, 3], [1, 4, 0]))
    placed = place_bodies(people, body)
    (placed.v3d.square().sum() + people.score_map.sum()).backward()
    without = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without and patch.grad.abs().sum() > 0


def test_options_rebuild_the_head_and_other_sizes_resize_its_tables(head):
    again = MultiHmrHead(**head.options())
    again.load_state_dict(head.state_dict())
    assert again.options() == head.options()
    larger = head.resized(98)
    assert larger.grid == 7 and larger.x_attention_head.cross_queries_x.shape[0] == 7
    assert torch.equal(larger.mlp_offset[0].weight, head.mlp_offset[0].weight)
    same = head.resized(70).state_dict()
    assert all(torch.allclose(x, same[name]) for name, x in head.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 75}, "image_size 75 is no multiple of the patch size 14: take 70 or 84"),
        ({"center": "knee"}, "center 'knee' is unknown; choose one of head, pelvis, nose"),
        ({"num_betas": 12}, "num_betas 12"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(HeadError, match=message):
        MultiHmrHead(**{**SMALL, **options})


def test_tokens_of_another_size_are_refused(head):
    with pytest.raises(HeadError, match=r"reads \[B, 25, 12\] patch tokens.*got \[1, 36, 12\].*resized"):
        head(tokens(torch.randn(1, 36, 12)))


def released(head: MultiHmrHead, path: Path, args: dict | None = None, **extra: torch.Tensor) -> Path:
    """A file in the released container."""
    state = {name: x.half() for name, x in head.state_dict().items()}
    state |= {"x_attention_head.init_betas_kid": torch.zeros(1, 11), "smpl_layer.x": torch.zeros(3), **extra}
    state["backbone.encoder.cls_token"] = torch.zeros(1, 1, 12)
    given = {"img_size": [70], "xat_num_heads": 2, "num_betas": 10, "backbone": "dinov2_vits14", **(args or {})}
    torch.save({"epoch": 1, "iter": 2, "model_state_dict": state, "args": Namespace(**given)}, path)
    return path


def test_released_files_round_trip(tmp_path, head):
    path = released(head, tmp_path / "multiHMR.pt", None, **{"x_attention_head.unheard_of": torch.zeros(2)})
    content = read_container(path)
    assert official.recognize(content)
    loaded = official.read(content, path)
    assert loaded.options() == head.options()
    for name, x in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x.half().float()), name
    assert not official.recognize({"model_state_dict": {"decoder.weight": torch.zeros(1)}})


@pytest.mark.parametrize(
    ("name", "args", "extra", "message"),
    [
        ("multiHMR_anny.pt", {}, {}, "body model Anny, another architecture"),
        ("a.pt", {"train_return_type": "smpl"}, {}, "predicts 'smpl' bodies"),
        ("a.pt", {"xat_num_heads": 3}, {}, "xat_num_heads 3 does not divide 16"),
        ("a.pt", {"img_size": [84]}, {}, "img_size 84 has not the 5 patches"),
        ("a.pt", {"camera_embedding_num_bands": 10**9}, {}, "are not for 12 and 1000000000 bands"),
        ("a.pt", {"person_center": "knee"}, {}, "center 'knee' is unknown"),
        ("a.pt", {}, {"x_attention_head.decshape.weight": torch.zeros(7, 24)}, "num_betas 7"),
        ("a.pt", {"camera_embedding_num_bands": math.inf}, {}, "is not a Multi-HMR head as published: cannot convert"),
        ("a.pt", {}, {f"{official._LAYER}1000000000.0.x": torch.zeros(1)}, "a layer 1000000000 .* not all before it"),
        ("a.pt", {}, {"mlp_offset.0.weight": torch.zeros(3, 3)}, r"mlp_offset.0.weight has shape \[3, 3\] instead"),
        ("a.pt", {}, {"mlp_offset.2.bias": torch.tensor([math.nan, 0])}, "mlp_offset.2.bias has values that are not"),
    ],
)
def test_other_files_are_refused_by_a_sentence(tmp_path, head, name, args, extra, message):
    path = released(head, tmp_path / name, args, **extra)
    with pytest.raises(HeadError, match=message):
        load_head(path)
