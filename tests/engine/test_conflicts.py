"""Correlation of loss changes: against numpy's, over ranks, and without a read by the host in between."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dune_fast.engine.conflicts import TeacherConflicts
from dune_fast.engine.devices import peak_tflops

CPU = torch.device("cpu")
FOREVER = 1e12  # a horizon in which nothing is forgotten


def losses(steps: int, seed: int = 0) -> np.ndarray:
    """[steps, 3]; the second opposes the first, the third does what it likes."""
    draw = np.random.default_rng(seed)
    a, noise, c = draw.normal(size=(3, steps))
    return np.stack([a, -a + 0.3 * noise, c], axis=1).cumsum(axis=0) * 0.01 + 1.0


def feed(conflicts: TeacherConflicts, values: np.ndarray) -> None:
    for row in values:
        conflicts.add(list(torch.tensor(row)))


@pytest.mark.parametrize("reads", [[60], [1, 10, 49], [7, 7, 46]])
def test_correlations_are_numpys_however_often_they_are_read(reads):
    values = losses(60)
    conflicts = TeacherConflicts(["a", "b", "c"], 60, CPU, horizon=FOREVER)
    for part in np.split(values, np.cumsum(reads)[:-1]):
        feed(conflicts, part)
        found = conflicts.read()
    changes = np.diff(values.astype(np.float32), axis=0)
    expected = np.corrcoef(changes.T)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        name = f"conflict/{'abc'[i]}_vs_{'abc'[j]}"
        assert found[f"{name}/pearson"] == pytest.approx(expected[i, j], abs=1e-5)
        agree = np.mean(np.sign(changes[:, i]) == np.sign(changes[:, j]))
        assert found[f"{name}/sign_agreement"] == pytest.approx(agree)
    assert found["conflict/a_vs_b/pearson"] < -0.8 and found["conflict/a_vs_b/sign_agreement"] < 0.3


def test_ranks_are_averaged_before_they_are_correlated():
    """Noise that cancels over two ranks must not count: rank 1 is played by `all_reduce`."""
    values, noise = losses(40), np.random.default_rng(1).normal(size=(40, 3))
    alone = TeacherConflicts(["a", "b", "c"], 40, CPU, horizon=FOREVER)
    feed(alone, values)
    rank0 = TeacherConflicts(["a", "b", "c"], 40, CPU, world_size=2, horizon=FOREVER)
    feed(rank0, values + noise)

    def add_rank1(table: torch.Tensor) -> None:
        table += torch.tensor(values - noise)

    together = rank0.read(add_rank1)
    for key, value in alone.read().items():
        assert together[key] == pytest.approx(value, abs=1e-4)


def test_old_steps_are_forgotten():
    """Opposed for 200 steps, then in step: a short horizon sees the second part."""
    draw = np.random.default_rng(2).normal(size=400)
    changes = np.stack([draw, np.concatenate([-draw[:200], draw[200:]])], axis=1)
    results = {}
    for horizon in (20.0, FOREVER):
        conflicts = TeacherConflicts(["a", "b"], 400, CPU, horizon=horizon)
        feed(conflicts, changes.cumsum(axis=0))
        results[horizon] = conflicts.read()["conflict/a_vs_b/pearson"]
    assert results[20.0] > 0.99 and abs(results[FOREVER]) < 0.2


def test_a_step_that_was_not_finite_leaves_no_trace():
    values = losses(40)
    clean = TeacherConflicts(["a", "b", "c"], 41, CPU)
    feed(clean, values)
    spoilt = TeacherConflicts(["a", "b", "c"], 41, CPU)
    feed(spoilt, np.insert(values, 20, [np.nan, 1.0, np.inf], axis=0))
    assert spoilt.read() == clean.read()


def test_steps_beyond_the_capacity_push_the_earlier_ones_out():
    values = losses(50)
    late = TeacherConflicts(["a", "b", "c"], 50, CPU)
    feed(late, values[30:])
    full = TeacherConflicts(["a", "b", "c"], 30, CPU)
    feed(full, values)
    assert full.read() == late.read()


def test_a_step_reads_nothing_on_the_host():
    """Fake tensors have no values: whatever asks for one raises."""
    with FakeTensorMode():
        conflicts = TeacherConflicts(["a", "b"], 4, CPU)
        for _ in range(6):
            conflicts.add([torch.ones(()), torch.ones(())])


def test_too_few_steps_and_constant_losses_give_no_correlation():
    conflicts = TeacherConflicts(["a", "b"], 20, CPU)
    assert conflicts.read() == {}
    feed(conflicts, losses(8)[:, :2])
    assert conflicts.read() == {}  # seven changes
    feed(conflicts, losses(9)[8:, :2])
    assert set(conflicts.read()) == {"conflict/a_vs_b/pearson", "conflict/a_vs_b/sign_agreement"}
    still = TeacherConflicts(["a", "b"], 20, CPU)
    feed(still, np.stack([losses(20)[:, 0], np.ones(20)], axis=1))
    assert set(still.read()) == {"conflict/a_vs_b/sign_agreement"}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA A100-PCIE-40GB", 311.9),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),  # another chip than the A10
        ("NVIDIA A1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),  # has no bf16
        ("cpu", None),
    ],
)
def test_peaks_are_those_of_the_device_or_none(name, tflops):
    assert peak_tflops(name) == tflops
