"""The terms of the loss and their sum; token types, teachers' weights, views and routes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dune_fast.distill.alignment import View
from dune_fast.distill.objective import ObjectiveConfig, TermWeights, teacher_losses, term_states
from dune_fast.distill.standardization import Standardizer
from dune_fast.distill.terms import WIDE
from dune_fast.kernels.distill_loss_kernels import backward_triton, forward_triton
from dune_fast.kernels.nn.routing import make_routes

B, N, C = 3, 16, 8
TEACHERS = {"a": (C, ("cls", "patch")), "b": (C, ("patch",))}


def draw(seed: int, patches: int = N) -> dict[str, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"cls": (B, C), "patch": (B, patches, C)}
    return {n: {t: 2 * torch.randn(shapes[t], generator=g) for t in ts} for n, (_, ts) in TEACHERS.items()}


STUDENT, TEACHER = draw(0), draw(1)
MEAN, INV = torch.linspace(-1, 1, C), torch.linspace(0.5, 2, C)
STANDARD = {name: dict.fromkeys(tokens, Standardizer(MEAN, INV)) for name, (_, tokens) in TEACHERS.items()}


def dampened(d: torch.Tensor) -> torch.Tensor:
    return torch.where(d.abs() < 1, d**2 / 2, 2 * torch.sqrt(d.abs()) - 1.5)


TERMS = {
    "cosine": lambda s, y: 1 - F.cosine_similarity(s, y, dim=-1),
    "smooth_l1": lambda s, y: F.smooth_l1_loss(s, y, reduction="none", beta=2.0).mean(-1),
    "mse": lambda s, y: F.mse_loss(s, y, reduction="none").mean(-1),
    "dampened_mse": lambda s, y: dampened(s - y).mean(-1),
    "map_cosine": lambda s, y: (1 - F.cosine_similarity(s.flatten(1), y.flatten(1)))[:, None],
}


@pytest.mark.parametrize("weights", [dict.fromkeys((term,), 0.7) for term in TERMS] + [dict.fromkeys(TERMS, 0.3)])
def test_a_token_types_loss_is_the_weighted_sum_of_its_terms(weights):
    given = dict.fromkeys(("cosine", "smooth_l1"), 0.0) | weights
    cfg = ObjectiveConfig(TermWeights(1.0, 0.0), TermWeights(**given), beta=2.0)
    student = STUDENT["b"]["patch"].clone().requires_grad_()
    losses, parts = teacher_losses({**STUDENT, "b": {"patch": student}}, TEACHER, STANDARD, cfg)
    again = student.detach().clone().requires_grad_()
    y = (TEACHER["b"]["patch"] - MEAN) * INV
    expected = {term: TERMS[term](again, y).mean(1) for term in weights}
    total = sum(weight * expected[term] for term, weight in weights.items())
    torch.testing.assert_close(losses[1], total)
    for term, value in expected.items():
        torch.testing.assert_close(parts[f"b/patch/{term}"], value.detach())
    assert "b/patch/cosine" in parts and not parts["b/patch/cosine"].requires_grad
    factors = torch.arange(1.0, B + 1)
    (losses[1] * factors).sum().backward()
    (total * factors).sum().backward()
    torch.testing.assert_close(student.grad, again.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("align", ["", "larger"])
def test_tokens_in_bfloat16_are_compared_in_float32(align):
    """What autocast gives: the same numbers as of the rounded tokens in float32, a gradient in their type."""
    cfg = ObjectiveConfig(
        TermWeights(0.1, 0.0, angle=1.0, tangent_sphere=1.0), TermWeights(*[0.3] * 5), align=align, tangent_samples=2
    )
    student, teacher = (
        {n: {t: x.bfloat16() for t, x in tokens.items()} for n, tokens in given.items()}
        for given in (STUDENT, draw(3, 64 if align else N))
    )
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        s, t = (
            {n: {k: x.to(dtype, copy=True) for k, x in tokens.items()} for n, tokens in of.items()}
            for of in (student, teacher)
        )
        for x in (x for tokens in s.values() for x in tokens.values()):
            x.requires_grad_()
        states = term_states(cfg, TEACHERS, B)
        states.update(teacher, STANDARD, torch.arange(B), None, None)
        losses, _ = teacher_losses(s, t, STANDARD, cfg, states=states)
        losses.sum().backward()
        found[dtype] = losses, {(n, k): x.grad for n, tokens in s.items() for k, x in tokens.items()}
    (low, low_gradients), (high, gradients) = found.values()
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, high, rtol=1e-5, atol=1e-6)
    for key, gradient in gradients.items():
        assert low_gradients[key].dtype == torch.bfloat16
        torch.testing.assert_close(low_gradients[key].float(), gradient, rtol=1e-2, atol=1e-3)


def test_the_squared_error_of_the_kernel_has_no_rounding_of_its_own():
    cfg = ObjectiveConfig(patch=TermWeights(0.0, 0.0, mse=1.0))
    _, parts = teacher_losses(STUDENT, TEACHER, None, cfg)
    exact = F.mse_loss(STUDENT["b"]["patch"].double(), TEACHER["b"]["patch"].double(), reduction="none").mean((1, 2))
    torch.testing.assert_close(parts["b/patch/mse"].double(), exact, rtol=1e-6, atol=0)


def test_the_kernels_squared_error_and_its_gradient_are_exact_on_a_gpu_too():
    """The Triton kernel, interpreted: each patch an image of its own, as where patches have weights."""
    s, t, upstream = STUDENT["b"]["patch"].flatten(0, 1), TEACHER["b"]["patch"].flatten(0, 1), torch.ones(B * N)
    terms = 0.0, 2 * WIDE, WIDE
    total, _, _, saved = forward_triton(s, t, MEAN, INV, *terms)
    difference = s - (t - MEAN) * INV
    torch.testing.assert_close(total, difference.square().mean(1), rtol=1e-6, atol=0)
    gradient = backward_triton(s, t, MEAN, INV, saved, upstream, *terms)
    torch.testing.assert_close(gradient, 2 * difference / C, rtol=1e-6, atol=1e-7)


def test_token_types_are_averaged_or_added_with_weights_of_each_teacher():
    _, parts = teacher_losses(STUDENT, TEACHER, STANDARD, ObjectiveConfig())
    cls, patch = parts["a/cls/total"], parts["a/patch/total"]
    for cfg, expected in (
        (ObjectiveConfig(), (cls + patch) / 2),
        (ObjectiveConfig(tokens="sum"), cls + patch),
        (ObjectiveConfig(tokens="sum", weights={"a": {"cls": 0.0, "patch": 2.0}}), 2 * patch),
    ):
        losses, again = teacher_losses(STUDENT, TEACHER, STANDARD, cfg)
        torch.testing.assert_close(losses[0], expected)
        torch.testing.assert_close(again["a/cls/total"], cls)  # the log shows it without its weight


def test_a_view_of_its_own_is_compared_where_both_see_the_same_and_routes_take_their_images():
    """The teacher's crop lies one column further right; patch losses of an image count by their overlap."""
    cfg = ObjectiveConfig(patch=TermWeights(0.0, 0.0, mse=1.0), align="smaller", weights={"a": {"cls": 0.0}})
    transform = torch.eye(3).repeat(B, 1, 1)
    transform[:, 0, 2] = torch.tensor([2 / 3, 0.0, 4 / 3])  # 1, 0 and 2 of 4 columns
    projections, features = ({"b": {"patch": x["b"]["patch"]}} for x in (STUDENT, TEACHER))
    s, t = (x["b"]["patch"].view(B, 4, 4, C) for x in (projections, features))
    squares = [(s[b, :, shift:] - t[b, :, : 4 - shift]).square().mean(-1) for b, shift in enumerate((1, 0, 2))]
    everything = torch.cat([x.flatten() for x in squares])
    losses, parts = teacher_losses(projections, features, None, cfg, views={"b": View(transform)})
    assert losses.mean() == pytest.approx(everything.mean().item(), rel=1e-3)
    assert set(parts) == {"b/patch/cosine", "b/patch/mse", "b/patch/total"}

    routes = make_routes({"b": np.array([0, 2])}, B, torch.device("cpu"))
    taken = [{"b": {"patch": routes["b"].take(x["b"]["patch"])}} for x in (projections, features)]
    view = {"b": View(routes["b"].take(transform))}
    routed, _ = teacher_losses(*taken, None, cfg, routes, views=view)
    some = torch.cat([squares[0].flatten(), squares[2].flatten()])
    assert routed[0, 1] == 0 and routed[0, [0, 2]].mean() == pytest.approx(some.mean().item(), rel=1e-3)

    with pytest.raises(ValueError, match="map_cosine takes whole maps"):
        whole = ObjectiveConfig(patch=TermWeights(0.0, 0.0, map_cosine=1.0), align="smaller")
        teacher_losses(projections, features, None, whole, views={"b": View(transform)})


def test_grids_of_their_own_are_aligned_before_standardization():
    cfg = ObjectiveConfig(patch=TermWeights(0.0, 0.0, mse=1.0), align="larger", weights={"a": {"cls": 0.0}})
    finer = draw(2, 64)
    losses, _ = teacher_losses(STUDENT, finer, STANDARD, cfg)
    s = F.interpolate(STUDENT["b"]["patch"].mT.unflatten(2, (4, 4)), (8, 8), mode="bilinear").flatten(2).mT
    expected = (s - (finer["b"]["patch"] - MEAN) * INV).square().mean((1, 2))
    torch.testing.assert_close(losses[1], expected)
    with pytest.raises(ValueError, match=r"'a' gives 64 patches of an image, the student 16 for it: choose objective"):
        teacher_losses(STUDENT, finer, STANDARD, ObjectiveConfig())


def test_summaries_with_statistics_have_them_for_each_teacher_that_has_a_summary():
    weights = TermWeights(0.0, 0.0, angle=1.0, tangent_sphere=0.5)
    cfg = ObjectiveConfig(cls=weights, tokens="sum", weights={"a": {"patch": 0.0}}, tangent_samples=2)
    states = term_states(cfg, TEACHERS, B)
    assert [name for name, _ in states.named_children()] == ["a"]
    states.update(TEACHER, STANDARD, torch.arange(B), None, None)
    losses, parts = teacher_losses(STUDENT, TEACHER, STANDARD, cfg, states=states)
    y = (TEACHER["a"]["cls"] - MEAN) * INV
    angle, sphere = (states.a[term](STUDENT["a"]["cls"], y) for term in ("angle", "tangent_sphere"))
    torch.testing.assert_close(losses[0], angle + 0.5 * sphere)
    assert "a/cls/angle" in parts and "a/cls/cosine" in parts
    assert not list(term_states(ObjectiveConfig(), TEACHERS, B).buffers())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "max"}, "choose mean or sum"),
        ({"align": "both"}, "smaller, teacher, partitioned, larger"),
        ({"patch": TermWeights(angle=1.0)}, r"put it on objective.cls.angle"),
        ({"align": "smaller", "patch_share": 0.5}, "objective.align=smaller takes whole maps"),
        ({"patch": TermWeights(map_cosine=1.0), "patch_share": 0.5}, "map_cosine takes whole maps"),
        ({"cls": TermWeights(0.0, 0.0), "patch": TermWeights(0.0, 0.0)}, "no term"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**changes)
