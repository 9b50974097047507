"""Moments over ranks, conventions, numerical safety."""

from __future__ import annotations

import pytest
import torch

from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.kernels.distill_loss import standardize

TEACHERS = {"a": (8, ["cls", "patch"]), "b": (12, ["patch"])}


def features(rows: int, seed: int = 0, mean: float = 0.0, std: float = 1.0) -> dict:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g) * std + mean

    return {"a": {"cls": draw(rows, 8), "patch": draw(rows, 5, 8)}, "b": {"patch": draw(rows, 7, 12)}}


def join(parts: list[dict]) -> dict:
    return {n: {t: torch.cat([p[n][t] for p in parts]) for t in parts[0][n]} for n in parts[0]}


class Ranks:
    """All-reduce over simulated ranks: the first pass records what each would send, the second returns the sum."""

    def __init__(self, statistics: list[TeacherStatistics]):
        self.statistics, self.sent = statistics, []

    def update(self, parts: list[dict], momentum: float):
        import copy

        self.sent = []
        for s, part in zip(self.statistics, parts, strict=True):
            copy.deepcopy(s).update(part, momentum, lambda x: self.sent.append(x.clone()))
        total = torch.stack(self.sent).sum(0)
        return [s.update(p, momentum, lambda x: x.copy_(total)) for s, p in zip(self.statistics, parts, strict=True)]


@pytest.mark.parametrize("convention", ["dune", "unic"])
@pytest.mark.parametrize("rows", [(6, 6), (9, 2, 1), (5, 0)])
def test_ranks_with_different_numbers_of_rows_equal_one_process(convention, rows):
    alone = TeacherStatistics(TEACHERS, convention)
    ranks = Ranks([TeacherStatistics(TEACHERS, convention) for _ in rows])
    for step, momentum in enumerate((1.0, 0.4)):
        parts = [features(n, 10 * step + i, mean=3.0, std=0.5) for i, n in enumerate(rows)]
        expected = alone.update(join(parts), momentum)
        for result in ranks.update(parts, momentum):
            for name, token, _ in alone.items():
                torch.testing.assert_close(result[name][token].mean, expected[name][token].mean)
                torch.testing.assert_close(result[name][token].inv_std, expected[name][token].inv_std)
    for statistics in ranks.statistics:
        for ours, theirs in zip(statistics.state_dict().values(), alone.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_one_packed_all_reduce_of_16_bytes_a_channel():
    sizes = []
    TeacherStatistics(TEACHERS).update(features(4), 1.0, lambda x: sizes.append(x.numel() * x.element_size()))
    channels = 8 + 8 + 12
    assert sizes == [16 * channels + 3 * 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variance_survives_a_mean_far_from_zero_at_the_first_step(dtype):
    """E[x^2] - E[x]^2 in float32 would lose every digit here."""
    x = features(64, mean=4096.0, std=1.0 if dtype == torch.float32 else 64.0)
    x = {n: {t: v.to(dtype) for t, v in tokens.items()} for n, tokens in x.items()}
    statistics = TeacherStatistics(TEACHERS)
    result = statistics.update(x, 1.0, lambda sums: None)
    exact = x["a"]["patch"].double().flatten(0, 1)
    torch.testing.assert_close(1 / result["a"]["patch"].inv_std.double(), exact.std(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(statistics.a.normalizers["patch"].mean.double(), exact.mean(0), rtol=1e-6, atol=0)


def test_constant_channels_stay_finite():
    x = features(4)
    x["a"]["patch"][..., 0] = 7.0
    result = TeacherStatistics(TEACHERS).update(x, 1.0)
    out = standardize(x["a"]["patch"], *result["a"]["patch"])
    assert torch.isfinite(out).all() and out[..., 0].abs().max() < 1e-3


def test_a_single_row_has_no_variance_but_stays_finite():
    result = TeacherStatistics({"a": (8, ["cls"])}).update({"a": {"cls": torch.randn(1, 8)}}, 1.0)
    assert torch.isfinite(result["a"]["cls"].inv_std).all()


def test_momentum_zero_freezes_and_uses_the_running_values():
    statistics = TeacherStatistics(TEACHERS)
    statistics.update(features(8, 1), 1.0)
    before = {k: v.clone() for k, v in statistics.state_dict().items()}
    result = statistics.update(features(8, 2, mean=9.0), 0.0)
    assert all(torch.equal(before[k], v) for k, v in statistics.state_dict().items())
    torch.testing.assert_close(result["b"]["patch"].mean, before["b.normalizers.patch.mean"])


def test_standardizers_do_not_change_when_running_values_do():
    statistics = TeacherStatistics(TEACHERS, "unic")
    first = statistics.update(features(8, 1, mean=5.0), 1.0)
    assert torch.all(first["a"]["cls"].mean == 0)  # from before the update


def test_unknown_convention_is_explained():
    with pytest.raises(ValueError, match="dune, unic"):
        TeacherStatistics(TEACHERS, "phis")
