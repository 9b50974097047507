"""Multi-HMR's targets and losses."""

from __future__ import annotations

import math

import pytest
import torch

from bench.heads_proof.bodies import body_arrays
from dune_fast.heads.multihmr.camera import default_intrinsics
from dune_fast.heads.multihmr.head import MultiHmrHead, place_bodies
from dune_fast.heads.multihmr.loss import LossWeights, detection_loss, if_finite, losses
from dune_fast.heads.multihmr.smplx import BodyModel
from dune_fast.heads.multihmr.targets import PARTS, Targets, make_targets
from dune_fast.heads.tokens import EncoderTokens
from tests.heads.test_mast3r_loss import HostReads

SMALL = {"width": 12, "image_size": 84, "depth": 1, "heads": 2, "head_dim": 8, "dim": 24, "hidden": 20}


@pytest.fixture(scope="module")
def body() -> BodyModel:
    return BodyModel(body_arrays(20))


@pytest.fixture
def head() -> MultiHmrHead:
    return MultiHmrHead(**SMALL)


def people(places: list[tuple[float, float, float]]) -> dict[str, torch.Tensor]:
    """Upright people (y points down) at these places."""
    truth = {name: 0.1 * torch.randn(len(places), n, 3) for name, n in PARTS.items()}
    truth["root"] = truth["root"] + torch.tensor([math.pi, 0.0, 0.0])
    truth |= {name: torch.zeros(len(places), 1, 3) for name in ("leye", "reye")}  # which the head does not predict
    return truth | {"betas": 0.3 * torch.randn(len(places), 11), "transl": torch.tensor(places).view(-1, 3)}


def targets_of(head: MultiHmrHead, body: BodyModel, places: list, image: list[int], images: int = 2) -> Targets:
    image = torch.tensor(image, dtype=torch.int64)
    slot = torch.cat([torch.arange(int((image == i).sum())) for i in range(images)])
    k = default_intrinsics(head.image_size)[None].expand(images, 3, 3)
    return make_targets(people(places), image, slot, 4, k, body, head)


def test_cells_offsets_and_dropped_people(head, body):
    places = [(0.0, 0.0, 4.0), (0.02, 0.0, 4.1), (1.0, 0.0, 5.0), (30.0, 0.5, 4.0)]
    targets = targets_of(head, body, places, [0, 0, 0, 1])
    assert targets.cells.kept.tolist() == [True, False, True, True]  # the second stands in the first one's cell
    middle = torch.stack([targets.cells.column, targets.cells.row], 1) + 0.5
    torch.testing.assert_close((middle + targets.offset) * 14, targets.location)
    assert targets.cells.column[3] == 5 and targets.offset[3, 0] > 5  # outside the image: only the cell is clamped
    assert targets.scores.sum() == 3 and targets.scores[0, targets.cells.row[0], targets.cells.column[0]] == 1
    ratio = 1.0  # a field of view of 60 degrees
    torch.testing.assert_close(targets.depth_value * ratio, targets.body.pelvis[:, 2].log())
    assert targets.translation[0, 1] < targets.body.pelvis[0, 1]  # the head is above, which is a smaller y


def test_a_head_that_says_the_truth_has_no_loss(head, body):
    """Predictions made of the targets are put through the placement of bodies, and every L1 term is zero."""
    targets = targets_of(head, body, [(0.0, 0.0, 4.0), (1.0, 0.0, 5.0), (0.3, 0.2, 3.0)], [0, 0, 1])
    found = head.decode(torch.randn(2, 36, 12), default_intrinsics(84)[None].expand(2, 3, 3), targets.cells)
    exact = found._replace(
        offset=targets.offset, rotations=targets.rotations, betas=targets.betas, expression=torch.zeros(3, 10),
        depth_value=targets.depth_value, translation=targets.translation, score_map=targets.scores.clamp(1e-4, 0.9999),
    )  # fmt: skip
    terms = losses(exact, place_bodies(exact, body), targets, 84, True, LossWeights())
    for name in ("offset", "rotmat", "shape", "dist", "transl"):
        assert terms[name] == 0, name
    assert terms["j3d"] < 1e-5 and terms["v3d"] < 1e-5 and terms["bce"] < 1e-3
    assert terms["j2d"] < 1e-3 and terms["v2d"] < 1e-3


def test_terms_by_hand(head, body):
    """Means over the kept people of sums over components; points outside the image do not count in 2D."""
    targets = targets_of(head, body, [(0.0, 0.0, 4.0), (0.01, 0.0, 4.1), (1.4, 0.0, 3.0)], [0, 0, 1])
    kept = targets.cells.kept
    found = head.decode(torch.randn(2, 36, 12), default_intrinsics(84)[None].expand(2, 3, 3), targets.cells)
    placed = place_bodies(found, body)
    weights = LossWeights()
    terms = losses(found, placed, targets, 84, False, weights)
    assert kept.tolist() == [True, False, True]
    pairs = {
        "offset": (found.offset, targets.offset), "rotmat": (found.rotations, targets.rotations),
        "shape": (found.betas, targets.betas[:, :10]), "transl": (found.translation, targets.translation),
    }  # fmt: skip
    for name, (ours, wanted) in pairs.items():
        expected = sum((ours[i] - wanted[i]).abs().sum() for i in (0, 2)) / 2
        torch.testing.assert_close(terms[name], expected)
    ours, wanted = (x.j3d - x.pelvis[:, None] for x in (placed, targets.body))
    torch.testing.assert_close(terms["j3d"], (ours - wanted)[kept].abs().sum(-1).mean())
    inside = ((targets.body.v2d > 0) & (targets.body.v2d < 84)).all(-1)[kept]
    assert 0 < inside.sum() < inside.numel()
    torch.testing.assert_close(terms["v2d"], (placed.v2d - targets.body.v2d)[kept].abs().sum(-1)[inside].mean())
    counted = [n for n in terms if n not in ("total", "j2d", "v2d")]
    torch.testing.assert_close(terms["total"], sum(getattr(weights, n) * terms[n] for n in counted))
    later = losses(found, placed, targets, 84, True, weights)
    torch.testing.assert_close(later["total"], terms["total"] + terms["j2d"] + terms["v2d"])


def test_detection_loss_by_hand():
    scores, target = torch.rand(2, 3, 3) * 0.8 + 0.1, torch.zeros(2, 3, 3)
    target[0, 1, 1] = target[1, 0, 2] = 1
    total = 0.0
    for s, t in zip(scores.flatten().tolist(), target.flatten().tolist(), strict=True):
        total -= math.log(s + 1e-7) * (1 - s) ** 2 if t else math.log(1 - s + 1e-7) * s**2
    torch.testing.assert_close(detection_loss(scores, target), torch.tensor(total / 2))
    nobody = -((1 - scores + 1e-7).log() * scores**2).sum()
    torch.testing.assert_close(detection_loss(scores, torch.zeros_like(target)), nobody)


def test_a_batch_without_people_has_a_finite_loss(head, body):
    targets = targets_of(head, body, [], [])
    found = head.decode(torch.randn(2, 36, 12), default_intrinsics(84)[None].expand(2, 3, 3), targets.cells)
    terms = losses(found, place_bodies(found, body), targets, 84, True, LossWeights())
    terms["total"].backward()
    assert terms["bce"] > 0 and terms["v3d"] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


def test_a_term_that_is_not_finite_counts_nothing_and_sends_no_gradient():
    x = torch.tensor([1.0, 0.0], requires_grad=True)
    value = if_finite(lambda x: (x / torch.zeros(2)).sum(), x) + if_finite(lambda x: (3 * x).sum(), x)
    value.backward()
    assert value == 3 and x.grad.tolist() == [3.0, 3.0]


def test_dropped_people_send_no_gradient_even_where_they_are_nan(head, body):
    targets = targets_of(head, body, [(0.0, 0.0, 4.0), (0.01, 0.0, 4.1)], [0, 0])
    assert targets.cells.kept.tolist() == [True, False]
    found = head.decode(torch.randn(2, 36, 12), default_intrinsics(84)[None].expand(2, 3, 3), targets.cells)
    offset = found.offset.detach().clone()
    offset[1] = float("nan")
    offset.requires_grad_()
    terms = losses(found._replace(offset=offset), place_bodies(found, body), targets, 84, True, LossWeights())
    terms["offset"].backward()
    assert terms["offset"] > 0 and torch.equal(offset.grad[1], torch.zeros(2)) and offset.grad[0].abs().sum() > 0


def test_wrong_weights_are_refused():
    with pytest.raises(ValueError, match="the weight j3d=-1.0"):
        LossWeights(j3d=-1.0)


def test_nothing_in_a_step_waits_for_the_device(head, body):
    """Targets, head, bodies, losses and the backward pass; how many people an image has is known before."""
    patch, k = torch.randn(2, 36, 12, requires_grad=True), default_intrinsics(84)[None].expand(2, 3, 3)
    truth = people([(0.0, 0.0, 4.0), (0.01, 0.0, 4.1), (1.4, 0.0, 3.0)])
    image, slot = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    with HostReads() as reads:
        targets = make_targets(truth, image, slot, 2, k, body, head)
        found = head.decode(patch, k, targets.cells)
        terms = losses(found, place_bodies(found, body), targets, 84, True, LossWeights())
        terms["total"].backward()
    assert reads.found == [] and patch.grad.abs().sum() > 0
    with HostReads() as reads:  # it would see them
        head(EncoderTokens(None, patch, None, patch, (6, 6)), k)
    assert reads.found
