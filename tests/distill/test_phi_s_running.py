"""PHI-S as published: running sums, a rotation every period, frozen in the end; ranks, masks, folds, undone steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dune_fast.distill import phi_s_running
from dune_fast.distill.phi_s import phi_s
from dune_fast.distill.phi_s_running import RunningPhiS, fold
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.kernels.distill_loss import standardize
from tests.distill.threads import on_ranks

C = 8
MIX = torch.randn(C, C, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def draw(seed: int, images: int = 4) -> torch.Tensor:
    x = torch.randn(images, 5, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x @ MIX + 3).float()


def seen_by(steps: int, period: int) -> RunningPhiS:
    module = RunningPhiS(C, period)
    for i in range(steps):
        module.update(draw(i))
    return module


def test_the_mean_moves_at_every_step_and_the_rotation_at_every_period():
    rows = [draw(i).double().flatten(0, 1).numpy() for i in range(4)]
    module, whitens = RunningPhiS(C, 2), []
    for i in range(4):
        module.update(draw(i))
        whitens.append(module.whiten.clone())
        np.testing.assert_allclose(module.mean, np.concatenate(rows[: i + 1]).mean(0), rtol=1e-12)
    assert torch.equal(whitens[0], whitens[1]) and not torch.equal(whitens[1], whitens[2])
    covariance = np.cov(np.concatenate(rows[:3]).T)  # of the step at which the second period began
    np.testing.assert_allclose(module.alpha, 1 / np.sqrt(np.trace(covariance) / C), rtol=1e-9)
    y = module.whiten.numpy() @ covariance @ module.whiten.numpy().T
    np.testing.assert_allclose(np.diag(y), np.ones(C), rtol=1e-9)
    assert (module.whiten.diagonal() >= 0).all()
    x = draw(9)
    np.testing.assert_allclose(module.rotate(x), (x.double() - module.mean) @ module.whiten.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.restore(module.rotate(x)), x, rtol=1e-4, atol=1e-4)


def test_after_thirty_periods_it_stays_until_a_stage_begins():
    module = seen_by(31, 1)
    kept = {name: x.clone() for name, x in module.named_buffers()}
    for i in range(31, 34):
        module.update(draw(i))
    assert all(torch.equal(x, kept[name]) for name, x in module.named_buffers() if name != "steps")
    module.restart()
    module.update(draw(50))
    fresh = RunningPhiS(C, 1)
    fresh.update(draw(50))
    assert all(torch.equal(x, y) for x, y in zip(module.buffers(), fresh.buffers(), strict=True))


def test_rows_that_are_not_valid_do_not_count_whatever_is_in_them():
    x, valid = draw(0), torch.ones(4, 5, dtype=torch.bool)
    x[1, 2:], valid[1, 2:] = torch.nan, False
    module, plain = RunningPhiS(C), RunningPhiS(C)
    module.update(x, valid)
    plain.update(x.flatten(0, 1)[valid.flatten()])
    for ours, theirs in zip(module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    module.update(x, torch.zeros_like(valid))  # none is: the step is not counted
    assert module.steps == 1 and module.count == 17


def test_a_rotation_is_made_once_of_the_same_rows(monkeypatch):
    """A teacher that gets no image, or none in a stage, stays where it is: it must not cost a decomposition a step."""
    made = []
    monkeypatch.setattr(phi_s_running, "phi_s", lambda covariance: (made.append(1), phi_s(covariance))[1])
    module, nothing = RunningPhiS(C, 2), draw(0)[:0]
    for x in (nothing, draw(0), nothing, draw(1), nothing, nothing, draw(2), nothing):
        module.update(x)
    # of batch 0; of 0 and 1, in the first step without rows after them, and with 2, still in the same period
    assert len(made) == 3 and module.steps == 3 and module.rotated == 60


def test_the_host_reads_the_device_about_twice_a_period_and_misses_none(monkeypatch):
    """Steps without rows and steps that are undone (their loss was not finite) move the end of a period."""
    reads, made, plain_int, plain_list = [], [], torch.Tensor.__int__, torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "__int__", lambda x: (reads.append(1), plain_int(x))[1])
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (reads.append(1), plain_list(x))[1])
    module, undone, empty = RunningPhiS(C, 10), {3, 12, 13, 24}, {5, 17, 35}
    counted, due = 0, []
    for i in range(60):
        before = [x.clone() for x in module.buffers()]
        rotation = module.whiten.clone()
        module.update(draw(i)[: 0 if i in empty else 4])
        made += [i] * (not torch.equal(module.whiten, rotation))
        due += [i] * (counted % 10 == 0 and i not in empty)
        if i in undone:
            for x, then in zip(module.buffers(), before, strict=True):
                x.copy_(then)
        counted += i not in undone | empty
        assert plain_int(module.steps) == counted
    assert made == due == [0, 12, 13, 14, 26, 37, 47, 57] and len(reads) < 60 / 2


def test_ranks_are_one_and_take_one_ranks_eigenvectors():
    alone = seen_by(3, 2)

    def rank(i: int, all_reduce):
        module = RunningPhiS(C, 2)
        for step in range(3):
            mine = slice(3 * i, 3 + i)  # 3 images and 1
            module.update(draw(step)[mine], None, all_reduce, leads=i == 0)
        return module

    one, other = on_ranks(2, rank)
    for name, value in alone.named_buffers():
        assert torch.equal(getattr(one, name), getattr(other, name))
        torch.testing.assert_close(getattr(one, name), value, rtol=1e-8, atol=1e-8)


def test_a_batch_that_is_not_finite_gives_nan_not_an_error():
    module = RunningPhiS(C)
    x = draw(0)
    x[0, 0, 0] = torch.inf
    module.update(x)
    assert not module.rotate(draw(1)).isfinite().any()


@pytest.mark.parametrize("groups", [1, 4])
def test_a_folded_layer_gives_raw_features(groups):
    module, layer, x = seen_by(1, 1), nn.Linear(6, groups * C), torch.randn(3, 6)
    expected = module.restore(layer(x).unflatten(1, (groups, C))).flatten(1)
    weight, bias = fold(layer.weight, layer.bias, *module.inverse())
    torch.testing.assert_close(x @ weight.T + bias, expected, rtol=1e-4, atol=1e-4)
    _, without = fold(layer.weight, None, *module.inverse())
    torch.testing.assert_close(without, module.mean.float().repeat(groups))
    with pytest.raises(ValueError, match="a layer of 6 outputs"):
        fold(torch.zeros(6, 3), None, *module.inverse())


@pytest.mark.parametrize("convention", ["dune", "unic", "phi_s", "phi_s_running", "none"])
def test_token_types_have_conventions_of_their_own_and_every_one_can_be_undone(convention):
    teachers = {"a": (C, ("cls", "patch"))}
    statistics = TeacherStatistics(teachers, "dune", cls="none", patch=convention)
    features = {"a": {"cls": draw(0)[:, 0], "patch": draw(1)}}
    if convention == "phi_s":
        statistics.estimate([features])
    standardizers = statistics.update(features, 1.0)
    if convention != "dune":  # which standardizes by the batch
        standardizers = statistics.running()
    rotated = statistics.rotated(features)
    y = {t: standardize(x, *standardizers["a"][t]) for t, x in rotated["a"].items()}
    assert torch.equal(y["cls"], features["a"]["cls"])
    if convention != "none":
        flat = y["patch"].flatten(0, 1)
        assert flat.mean(0).abs().max() < 1e-4 and flat.var(0).mean() == pytest.approx(1, rel=1e-3)
    restored = statistics.restored({"a": y})["a"]["patch"]
    torch.testing.assert_close(restored, features["a"]["patch"], rtol=1e-3, atol=1e-3)
    matrix, vector = statistics.a.normalizers["patch"].inverse()
    torch.testing.assert_close(y["patch"].double() @ matrix.T + vector, restored.double(), rtol=1e-3, atol=1e-3)


def test_an_unknown_convention_of_a_token_type_is_explained():
    with pytest.raises(ValueError, match="'phi'; choose one of dune, unic, phi_s, fixed, none, phi_s_running"):
        TeacherStatistics({"a": (C, ("cls",))}, cls="phi")
