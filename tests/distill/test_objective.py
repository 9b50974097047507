"""Losses and which of them count."""

from __future__ import annotations

import pytest
import torch

from dune_fast.distill.objective import ObjectiveConfig, TermWeights, coefficients, combine, ownership, teacher_losses
from dune_fast.kernels.teacher_drop import drop_uniforms, teacher_drop

GROUPS = ["3d", "generic", "human"]
OWN = {"dino": ["generic"], "mast3r": ["3d"], "hmr": ["human"]}


def loop_coefficients(losses, groups, sharing, p, uniforms):
    """The rules of the paper, one image and teacher at a time."""
    c = torch.zeros_like(losses)
    for b in range(losses.shape[1]):
        for t, own in enumerate(OWN.values()):
            if sharing == "full":
                c[t, b] = float(losses[t, b] == losses[:, b].max() or uniforms[t, b] >= p)
            else:
                allowed = [*own, "generic"] if sharing == "generic" else own
                c[t, b] = float(GROUPS[groups[b]] in allowed)
    return c


@pytest.mark.parametrize("sharing", ["full", "none", "generic"])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_coefficients_follow_the_rules(sharing, p):
    torch.manual_seed(0)
    losses, groups, positions = torch.rand(3, 32), torch.randint(3, (32,)), torch.arange(1000, 1032)
    cfg = ObjectiveConfig(sharing=sharing, drop_probability=p)
    own = ownership(OWN, GROUPS, cfg)
    c = coefficients(losses, own, groups, positions, 7, 3, cfg)
    uniforms = drop_uniforms(3, 7, positions, 3)
    assert torch.equal(c, loop_coefficients(losses, groups, sharing, p, uniforms))


def test_dropping_does_not_depend_on_how_images_are_spread():
    torch.manual_seed(0)
    losses, positions = torch.rand(5, 64), torch.arange(64) + (1 << 33)
    whole = teacher_drop(losses, positions, 11, 42, 0.5)
    parts = [teacher_drop(losses[:, s], positions[s], 11, 42, 0.5) for s in (slice(0, 7), slice(7, 64))]
    assert torch.equal(whole, torch.cat(parts, 1))
    shuffled = torch.randperm(64)
    assert torch.equal(whole[:, shuffled], teacher_drop(losses[:, shuffled], positions[shuffled], 11, 42, 0.5))


def test_dropping_probability_and_independence():
    positions = torch.arange(20_000)
    losses = torch.zeros(6, len(positions))
    losses[0] = 1.0  # the hardest of every image
    c = teacher_drop(losses, positions, 5, 0, 0.3)
    assert torch.all(c[0] == 1)
    torch.testing.assert_close(c[1:].mean(1), torch.full((5,), 0.7), rtol=0, atol=0.015)
    assert torch.corrcoef(c[1:]).fill_diagonal_(0).abs().max() < 0.03
    other_step = teacher_drop(losses, positions, 6, 0, 0.3)
    other_seed = teacher_drop(losses, positions, 5, 1, 0.3)
    for other in (other_step, other_seed):
        agreement = (c[1:] == other[1:]).float().mean()
        assert agreement.item() == pytest.approx(0.7**2 + 0.3**2, abs=0.02)


def test_gradients_do_not_flow_through_the_choice():
    losses = torch.rand(3, 8, requires_grad=True)
    assert not teacher_drop(losses, torch.arange(8), 0, 0, 0.5).requires_grad


def test_a_rank_without_any_counting_loss_gives_zero_not_nan():
    losses = torch.rand(2, 4, requires_grad=True)
    loss = combine(losses, torch.zeros(2, 4))
    loss.backward()
    assert loss.item() == 0 and torch.all(losses.grad == 0)


def test_am_radio_weights_leave_smooth_l1_off_the_cls_token():
    cfg = ObjectiveConfig(cls=TermWeights(1.0, 0.0), patch=TermWeights(0.9, 0.1))
    student = {"a": {"cls": torch.randn(2, 8), "patch": torch.randn(2, 3, 8)}}
    teacher = {"a": {"cls": torch.randn(2, 8), "patch": torch.randn(2, 3, 8)}}
    losses, parts = teacher_losses(student, teacher, None, cfg)
    expected = (parts["a/cls/cosine"] + 0.9 * parts["a/patch/cosine"] + 0.1 * parts["a/patch/smooth_l1"]) / 2
    torch.testing.assert_close(losses[0], expected)


def test_a_teacher_that_would_never_get_an_image_is_named():
    cfg = ObjectiveConfig(sharing="none")
    with pytest.raises(ValueError, match="'hmr' never gets an image"):
        ownership(OWN, ["3d", "generic"], cfg)


@pytest.mark.parametrize("changes", [{"sharing": "some"}, {"drop_probability": 1.5}])
def test_wrong_settings_are_explained(changes):
    with pytest.raises(ValueError, match="objective"):
        ObjectiveConfig(**changes)
