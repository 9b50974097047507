"""Teachers dropped before they run, and the loss on some patches: against the whole computation in plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dune_fast.distill.objective import ObjectiveConfig, drawn_teachers, presampled
from dune_fast.kernels.distill_loss import distill_loss_reference
from dune_fast.kernels.moments import moments
from dune_fast.kernels.nn.routing import PatchSubset, patches_of_views, select
from dune_fast.kernels.teacher_drop import drop_uniforms
from tests.distill.test_routing import TEACHERS, Distillation

PROJECTORS = ("tp", "lp", "sp")
CPU = torch.device("cpu")


@pytest.fixture
def images():
    return torch.randn(9, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def draw(positions, teachers=3, step=0, seed=0, p=0.5) -> np.ndarray:
    return presampled(np.asarray(positions), teachers, step, seed, ObjectiveConfig(presample=True, drop_probability=p))


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("teachers", [1, 3, 5])
def test_every_image_keeps_a_teacher_and_every_teacher_its_share(teachers, p):
    kept = draw(np.arange(20_000) + 2**40, teachers, p=p)
    assert kept.any(0).all()
    np.testing.assert_allclose(kept.mean(1), 1 - p + p**teachers / teachers, atol=0.015)
    if p == 1:
        assert (kept.sum(0) == 1).all()


def test_the_draw_is_of_seed_step_and_position_alone():
    whole = draw(np.arange(64))
    assert np.array_equal(draw(np.arange(64)[1::2]), whole[:, 1::2])  # whatever part of a batch a rank has
    assert not np.array_equal(draw(np.arange(64), step=1), whole)
    assert not np.array_equal(draw(np.arange(64), seed=1), whole)
    u = drop_uniforms(0, 0, torch.arange(64), 3)
    expected = (u >= 0.5) | (u == u.max(0, keepdim=True).values)
    assert np.array_equal(whole, expected.numpy())


@pytest.mark.parametrize("projector", PROJECTORS)
def test_presampled_teachers_give_what_masking_them_would(projector, images):
    """By running statistics: losses and gradients of the whole computation, where the mask is applied at its end."""
    whole = Distillation(False, "full", projector=projector, drop_probability=0.0)
    economical = Distillation(False, "full", projector=projector, presample=True)
    kept = torch.from_numpy(draw(np.arange(9)))
    every, _ = whole(images)
    found, gradients = economical(images)
    assert list(economical.seen.values()) == kept.sum(1).tolist() and 9 in whole.seen.values()
    assert 0 < kept.sum() < 27
    losses = torch.where(kept, every.images.losses, 0.0)
    torch.testing.assert_close(found.images.losses, losses)
    torch.testing.assert_close(found.loss, losses.sum() / kept.sum())
    for i, name in enumerate(TEACHERS):
        assert found.metrics[f"kept/{name}"] == pytest.approx(kept[i].float().mean().item())

    def masked(losses, *_):
        return kept.to(losses.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dune_fast.distill.step.coefficients", masked)
        _, expected = whole(images)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_so_many_teachers_are_drawn_for_a_whole_step(images):
    """By running statistics: the mean of the drawn ones' losses, whose teachers alone run; all are drawn as often."""
    whole = Distillation(False, "full", drop_probability=0.0)
    economical = Distillation(False, "full", teachers_per_step=2)
    kept = drawn_teachers(3, 2, 0, 0)
    every, (found, _) = whole(images)[0], economical(images)
    torch.testing.assert_close(found.loss, every.images.losses[torch.from_numpy(kept)].mean())
    assert sorted(economical.seen) == sorted(np.array(list(TEACHERS))[kept])
    often = np.mean([drawn_teachers(5, 2, step, 7) for step in range(4000)], axis=0)
    np.testing.assert_allclose(often, 0.4, atol=0.04)
    with pytest.raises(ValueError, match="choose one of them"):
        ObjectiveConfig(teachers_per_step=2, presample=True)


def test_presampling_without_dropping_is_the_whole_step(images):
    whole = Distillation(False, "full", drop_probability=0.0)
    economical = Distillation(False, "full", drop_probability=0.0, presample=True)
    (expected, gradients), (found, ours) = whole(images, momentum=0.5), economical(images, momentum=0.5)
    assert torch.equal(found.loss, expected.loss) and found.metrics.keys() == expected.metrics.keys()
    for name, gradient in gradients.items():  # sums over teachers are taken in another order
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    state = economical.statistics.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in whole.statistics.state_dict().items())


def test_presampling_takes_statistics_over_what_a_teacher_saw(images):
    economical = Distillation(False, "full", presample=True)
    economical(images, momentum=1.0)
    for name, kept in zip(TEACHERS, draw(np.arange(9)), strict=True):
        x = economical.teachers(images)[name]["patch"][torch.from_numpy(kept)]
        mean, m2 = moments(x)
        normalizer = economical.statistics.get_submodule(f"{name}.normalizers.patch")
        torch.testing.assert_close(normalizer.mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(normalizer.std, (m2 / (x[..., 0].numel() - 1)).sqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharing", ["none", "generic"])
def test_presampling_is_for_full_sharing(sharing):
    with pytest.raises(ValueError, match=f"sharing={sharing} drops no teacher at random: set the sharing to full"):
        ObjectiveConfig(presample=True, sharing=sharing)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.1, float("nan")])
def test_a_share_of_patches_that_cannot_be_is_explained(share):
    with pytest.raises(ValueError, match=r"objective.patch_share is .*; it must lie above 0, up to 1"):
        ObjectiveConfig(patch_share=share)


def test_a_subset_has_its_share_of_patches_and_all_take_turns():
    counts = torch.zeros(64)
    for step in range(400):
        index = PatchSubset(0.25, 3, step).index(64, CPU)
        assert index.dtype == torch.int64 and len(index) == 16
        assert torch.equal(index, index.unique())  # ascending, each once
        counts[index] += 1
    assert counts.min() > 60 and counts.max() < 145  # 100 on average, deviation 8.7
    assert not torch.equal(PatchSubset(0.25, 4, 0).index(64, CPU), PatchSubset(0.25, 3, 0).index(64, CPU))
    assert len(PatchSubset(0.001, 0, 0).index(64, CPU)) == 1  # at least one
    assert PatchSubset(0.999, 0, 0).index(64, CPU) is None  # all
    assert PatchSubset(0.5, 0, 7).with_cls(64, CPU).tolist() == [
        0, *(1 + i for i in PatchSubset(0.5, 0, 7).index(64, CPU).tolist())
    ]  # fmt: skip


@pytest.mark.parametrize("projector", PROJECTORS)
def test_the_loss_on_a_subset_is_that_of_whole_projections_there(projector, images):
    economical = Distillation(False, "full", projector=projector, drop_probability=0.0, patch_share=0.5)
    found, gradients = economical(images)
    index = PatchSubset(0.5, 0, 0).index(16, CPU)
    economical.student.zero_grad(set_to_none=True)
    projections, features = economical.student(images), economical.teachers(images)
    per_teacher = []
    for name, tokens in features.items():
        losses = []
        for token, x in tokens.items():
            y, standardizer = projections[name][token], economical.statistics.running()[name][token]
            x, y = (x, y) if token == "cls" else (x[:, index], y[:, index])
            losses.append(distill_loss_reference(y, x, *standardizer).total)
        per_teacher.append(torch.stack(losses).mean(0))
    expected = torch.stack(per_teacher)
    torch.testing.assert_close(found.images.losses, expected.detach())
    expected.mean().backward()
    for name, p in economical.student.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize(
    "objective", [{}, {"patch_share": 0.5}, {"presample": True, "drop_probability": 0.5}], ids=["all", "some", "routed"]
)
def test_every_image_may_have_patches_of_its_own(projector, objective, images):
    """Those that a cache has kept: the loss is that of whole projections there."""
    economical = Distillation(False, "full", projector=projector, **{"drop_probability": 0.0} | objective)
    kept = patches_of_views(0.5, 3, torch.arange(9), 16)
    every = economical.teachers(images)
    features = {
        name: {kind: select(x, kept) if kind == "patch" else x for kind, x in kinds.items()}
        for name, kinds in every.items()
    }
    on_device = torch.zeros(9, dtype=torch.long), torch.arange(9)
    found = economical.step(images, *on_device, 0, 0.0, None, features, np.arange(9), kept)
    found.loss.backward()
    index = kept[:, PatchSubset(0.5, 0, 0).index(8, CPU)] if "patch_share" in objective else kept
    projections, standardizers = economical.student(images), economical.statistics.running()
    mask = torch.ones(3, 9)
    if "presample" in objective:
        drawn = presampled(np.arange(9), 3, 0, 0, ObjectiveConfig(**objective))
        mask = torch.from_numpy(drawn).float()
    for i, (name, tokens) in enumerate(every.items()):
        losses = []
        for token, x in tokens.items():
            y = projections[name][token]
            x, y = (x, y) if token == "cls" else (select(x, index), select(y, index))
            losses.append(distill_loss_reference(y, x, *standardizers[name][token]).total)
        expected = torch.stack(losses).mean(0) * mask[i]
        torch.testing.assert_close(found.images.losses[i], expected.detach())
    assert all(p.grad.isfinite().all() for p in economical.student.parameters() if p.requires_grad)


def test_patches_of_a_view_are_of_its_number_and_the_seed():
    views = torch.arange(400) + 2**33
    kept = patches_of_views(0.5, 3, views, 16)
    assert kept.shape == (400, 8) and torch.equal(kept, kept.sort(-1).values)
    assert torch.equal(patches_of_views(0.5, 3, views[7:9], 16), kept[7:9])
    assert not torch.equal(patches_of_views(0.5, 4, views, 16), kept)
    counts = kept.flatten().bincount(minlength=16)
    assert (counts - 200).abs().max() < 50  # all take turns: five deviations


@pytest.mark.parametrize(("projector", "tokens"), [("tp", (17, 9, 9)), ("sp", (9, 9)), ("lp", (8, 8))])
def test_projectors_compute_on_the_subset_alone(projector, tokens, images):
    """TP: attention reads all 17 tokens, its MLP and the last layer 9."""
    economical = Distillation(False, "full", projector=projector, drop_probability=0.0, patch_share=0.5)
    own, seen = economical.student.projectors["mast3r"], []
    if projector == "tp":
        layers = [own.blocks[0].attn.qkv, own.blocks[0].mlp.fc1, own.linear]
    else:
        rung = own.patch["1"] if projector == "lp" else own
        layers = [rung.layers[0], rung.layers[-1]]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    economical(images)
    assert tuple(seen) == tokens


def test_a_subset_takes_statistics_of_its_patches(images):
    economical = Distillation(False, "full", patch_share=0.5)
    economical(images, momentum=1.0)
    index = PatchSubset(0.5, 0, 0).index(16, CPU)
    for name, tokens in economical.teachers(images).items():
        for token, x in tokens.items():
            mean, _ = moments(x if token == "cls" else x[:, index].contiguous())
            normalizer = economical.statistics.get_submodule(f"{name}.normalizers.{token}")
            torch.testing.assert_close(normalizer.mean, mean, rtol=1e-4, atol=1e-5)


def test_a_subset_of_all_patches_is_the_whole_step(images):
    whole, economical = Distillation(False, "full"), Distillation(False, "full", patch_share=0.99)
    (expected, gradients), (found, ours) = whole(images, momentum=0.5), economical(images, momentum=0.5)
    assert torch.equal(found.loss, expected.loss)
    assert all(torch.equal(ours[name], gradient) for name, gradient in gradients.items())


def test_presampling_and_a_subset_go_together(images):
    both = Distillation(False, "full", presample=True, patch_share=0.25)
    output, gradients = both(images, momentum=0.5)
    assert list(both.seen.values()) == draw(np.arange(9)).sum(1).tolist()
    assert torch.isfinite(output.loss) and all(torch.isfinite(g).all() for g in gradients.values())
    one, _ = both(images[:1], np.array([1]), momentum=0.5)  # two of the teachers may have no image
    assert torch.isfinite(one.loss)
