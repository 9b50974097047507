"""Losses of summaries with statistics of the teacher: formulas in numpy, ranks, batches without rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dune_fast.distill.summary import AngleDispersion, TangentSphere, summary_cosine
from tests.distill.threads import on_ranks

C, BATCH = 6, 8


def draw(seed: int, rows: int = BATCH) -> torch.Tensor:
    return torch.randn(rows, C, generator=torch.Generator().manual_seed(seed)) + 0.7


def angles(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    return np.arccos(np.clip(cosine, -1 + 1e-6, 1 - 1e-6))


def made(kind: type, **limits):
    return kind(C, **limits) if kind is AngleDispersion else kind(C, batch=BATCH, **limits)


def fed(module, batches, slots=None, all_reduce=None):
    for x in batches:
        module.update(x, torch.arange(len(x)) if slots is None else slots, all_reduce)
    return module


def test_the_angle_is_divided_by_the_dispersion_about_each_steps_mean_direction():
    batches = [draw(i) for i in range(3)]
    seen = np.concatenate([x.double().numpy() for x in batches])
    squares = sum((angles(seen[8 * i : 8 * i + 8], seen[: 8 * i + 8].mean(0)) ** 2).sum() for i in range(3))
    student, teacher = draw(9), draw(10)
    expected = angles(student.numpy(), teacher.numpy()) ** 2 / (squares / 24)
    loss = fed(made(AngleDispersion), batches)
    np.testing.assert_allclose(loss(student, teacher).numpy(), expected, rtol=1e-5)
    unseen = made(AngleDispersion)(student, teacher)  # held-out images before the teacher's turn: no division by 1e-8
    np.testing.assert_allclose(unseen.numpy(), angles(student.numpy(), teacher.numpy()) ** 2, rtol=1e-5)
    stays = fed(made(AngleDispersion, max_samples=16), [*batches, *batches])
    assert stays.count == 16
    same = student.clone().requires_grad_()
    loss(same, student).sum().backward()  # angle 0
    assert same.grad.isfinite().all()


def test_the_tangent_sphere_is_the_cosine_until_its_samples_are_there():
    batches, student, teacher = [draw(i) for i in range(3)], draw(9), draw(10)
    loss = fed(made(TangentSphere, max_samples=12), batches[:1])
    torch.testing.assert_close(loss(student, teacher), summary_cosine(student, teacher))
    fed(loss, batches[1:])  # settles at the second batch, takes no third
    assert loss.samples.shape == (0, C)
    read = made(TangentSphere, max_samples=12)
    read.load_state_dict(loss.state_dict())
    torch.testing.assert_close(fed(read, batches)(student, teacher), loss(student, teacher))
    unit = np.concatenate([x.double().numpy() for x in batches[:2]])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    pole = unit.mean(0) / np.linalg.norm(unit.mean(0))

    def logs(x: np.ndarray) -> np.ndarray:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        theta = np.arccos(np.clip(x @ pole, -1 + 1e-6, 1 - 1e-6))[:, None]
        return theta / np.sin(theta) * (x - pole * np.cos(theta))

    # PHI-S's own matrix would rotate both; here any rotation of the same scale
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(C, C)))[0]
    whiten = rotation / np.sqrt(np.trace(np.cov(logs(unit).T)) / C)
    away = (logs(student.double().numpy()) - logs(teacher.double().numpy())) @ whiten.T
    np.testing.assert_allclose(loss(student, teacher).numpy(), (away**2).mean(1), rtol=1e-4)


@pytest.mark.parametrize(("kind", "limits"), [(AngleDispersion, {}), (TangentSphere, {"max_samples": 12})])
def test_two_ranks_with_different_numbers_of_rows_are_one(kind, limits):
    """Ranks may get 5 and 3, or 0, of the batch's images; the order of the samples is that of the batch."""
    batches = [draw(i) for i in range(3)]
    alone = fed(made(kind, **limits), batches)

    def rank(i: int, all_reduce):
        module = made(kind, **limits)
        for step, x in enumerate(batches):
            mine = torch.arange(8)[(torch.arange(8) >= (5, 8, 3)[step]) == bool(i)]
            module.update(x[mine], mine, all_reduce)
        return module

    for module in on_ranks(2, rank):
        for name, value in alone.named_buffers():
            pair = getattr(module, name), value
            torch.testing.assert_close(*(x[:-1] if name == "samples" else x for x in pair))  # its last row is nobody's


@pytest.mark.parametrize(("kind", "limits"), [(AngleDispersion, {}), (TangentSphere, {"max_samples": 12})])
def test_what_a_step_that_is_undone_has_changed_is_in_live(kind, limits):
    """The batch that is not finite would settle the sphere; given back, the next batch does, with the same numbers."""
    broken = draw(5)
    broken[3] = torch.nan
    module, undone = (fed(made(kind, **limits), [draw(0)]) for _ in range(2))
    before = [x.clone() for x in undone.live()]
    fed(undone, [broken])
    assert not undone(draw(1), draw(2)).isfinite().all()
    for x, old in zip(undone.live(), before, strict=True):
        x.copy_(old)
    torch.testing.assert_close(fed(undone, [draw(3)])(draw(1), draw(2)), fed(module, [draw(3)])(draw(1), draw(2)))
