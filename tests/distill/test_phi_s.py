"""PHI-S: Hadamard matrices, equal variances, the inverse, and that the parts of a batch do not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dune_fast.distill.phi_s import HadamardError, SecondMoments, hadamard, hadamard_base
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.kernels.distill_loss import standardize

WIDTHS = (1, 2, 4, 12, 20, 24, 28, 36, 64, 96, 192, 256, 384, 512, 768, 1000, 1024, 1152, 1280, 1408, 1536, 1664, 2048)
TEACHERS = {"a": (12, ["cls", "patch"]), "b": (20, ["patch"])}


def correlated(rows: tuple[int, ...], channels: int, seed: int, mean: float = 3.0) -> torch.Tensor:
    """Features with deviations over three orders of magnitude, mixed."""
    shared, own = torch.Generator().manual_seed(channels), torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=shared) * torch.logspace(-2, 1, channels)
    return torch.randn(*rows, channels, generator=own) @ mixing.T + mean


def features(images: int, seed: int) -> dict:
    return {
        "a": {"cls": correlated((images,), 12, seed), "patch": correlated((images, 5), 12, seed + 1)},
        "b": {"patch": correlated((images, 7), 20, seed + 2)},
    }


def halves(whole: dict, at: int) -> list[dict]:
    return [{n: {t: x[s] for t, x in v.items()} for n, v in whole.items()} for s in (slice(at), slice(at, None))]


def estimated(*batches: dict, all_reduce=None) -> TeacherStatistics:
    statistics = TeacherStatistics(TEACHERS, "phi_s")
    statistics.estimate(batches, all_reduce)
    return statistics


def standardized(statistics: TeacherStatistics, x: dict) -> dict:
    rotated = statistics.rotated(x)
    standardizers = statistics.update(rotated, 0.5)
    return {n: {t: standardize(v, *standardizers[n][t]) for t, v in tokens.items()} for n, tokens in rotated.items()}


@pytest.mark.parametrize("width", WIDTHS)
def test_hadamard_matrices_are_orthonormal_with_equal_magnitudes(width):
    matrix = hadamard(width)
    assert matrix.shape == (width, width)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, width**-0.5), rtol=1e-12, atol=0)


def test_hadamard_bases_of_published_widths():
    bases = {384: 12, 768: 12, 1024: 1, 1152: 36, 1280: 20, 1408: 44, 1536: 12, 1664: 104, 28: 28}
    assert {width: hadamard_base(width) for width in bases} == bases


@pytest.mark.parametrize(("width", "words"), [(6, "exists"), (30, "exists"), (92, "is built here")])
def test_widths_without_a_hadamard_matrix_are_named(width, words):
    with pytest.raises(HadamardError, match=f"for {width} none {words}"):
        hadamard(width)
    with pytest.raises(HadamardError):
        TeacherStatistics({"a": (width, ["cls"])}, "phi_s").estimate([{"a": {"cls": torch.randn(200, width)}}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_channel_gets_mean_0_and_variance_1(dtype):
    x = {n: {t: v.to(dtype) for t, v in tokens.items()} for n, tokens in features(400, 0).items()}
    for name, tokens in standardized(estimated(x), x).items():
        for token, y in tokens.items():
            rows = y.double().flatten(0, -2)
            assert rows.mean(0).abs().max() < 1e-4, (name, token)
            torch.testing.assert_close(rows.var(0), torch.ones_like(rows[0]), rtol=1e-4, atol=0)


def test_distances_are_kept_up_to_one_factor():
    x = features(50, 0)
    y = standardized(estimated(x), x)["b"]["patch"].flatten(0, 1)
    before, after = torch.pdist(x["b"]["patch"].flatten(0, 1).double()), torch.pdist(y.double())
    ratio = before / after
    assert (ratio.max() / ratio.min()).item() == pytest.approx(1, abs=1e-4)
    phi = x["b"]["patch"].flatten(0, 1).double().var(0).mean().sqrt()  # the mean eigenvalue is the mean variance
    assert ratio.mean().item() == pytest.approx(phi.item(), rel=1e-5)


def test_the_formula_in_numpy():
    x = features(300, 5)["b"]["patch"]
    statistics = TeacherStatistics({"b": (20, ["patch"])}, "phi_s")
    statistics.estimate([{"b": {"patch": x}}])
    rows = x.double().numpy().reshape(-1, 20)
    eigenvalues, u = np.linalg.eigh(np.cov(rows, rowvar=False))
    u = u * np.sign(u[np.abs(u).argmax(0), np.arange(20)])
    expected = (rows - rows.mean(0)) @ u @ hadamard(20).numpy().T / np.sqrt(eigenvalues.mean())
    ours = standardized(statistics, {"b": {"patch": x}})["b"]["patch"].reshape(-1, 20)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=2e-5)


def test_the_inverse_recovers_the_features():
    x = features(40, 0)
    statistics = estimated(x)
    restored = statistics.restored(standardized(statistics, features(8, 9)))
    for name, tokens in features(8, 9).items():
        for token, expected in tokens.items():
            torch.testing.assert_close(restored[name][token], expected, rtol=1e-4, atol=1e-3)


def test_batches_and_ranks_that_share_the_rows_change_nothing():
    whole = features(30, 0)
    alone = estimated(whole)
    in_batches = estimated(*halves(whole, 11))
    sent: list[list[torch.Tensor]] = []
    for part in halves(whole, 11):  # what each of two ranks would send
        sent.append([])
        estimated(part, all_reduce=lambda sums: sent[-1].append(sums.clone()))
    totals = iter([a + b for a, b in zip(*sent, strict=True)])
    two_ranks = estimated(halves(whole, 11)[0], all_reduce=lambda sums: sums.copy_(next(totals)))
    with_an_empty_one = estimated(*halves(whole, 0))
    for other in (in_batches, two_ranks, with_an_empty_one):
        for ours, expected in zip(other.buffers(), alone.buffers(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_moments_survive_a_mean_far_from_zero():
    x = torch.randn(5000, 8) + 4096
    sums = SecondMoments(8, x.device)
    sums.add(x[:100])
    sums.add(x[100:])
    mean, covariance = sums.mean_and_covariance()
    torch.testing.assert_close(mean, x.double().mean(0), rtol=1e-12, atol=0)
    # of variances of 1; products without a shift would be off by about 1
    torch.testing.assert_close(covariance, x.double().T.cov(), rtol=1e-6, atol=1e-6)


def test_bfloat16_features_stay_near_float32():
    x = features(60, 0)
    statistics = estimated(x)
    low = {n: {t: v.bfloat16() for t, v in tokens.items()} for n, tokens in x.items()}
    exact = standardized(statistics, {n: {t: v.float() for t, v in tokens.items()} for n, tokens in low.items()})
    rounded = standardized(statistics, low)
    for name, tokens in exact.items():
        for token, y in tokens.items():
            assert (rounded[name][token] - y).norm() / y.norm() < 1e-2  # eight bits of mantissa


def test_steps_leave_the_statistics_alone():
    statistics = estimated(features(40, 0))
    before = {key: value.clone() for key, value in statistics.state_dict().items()}
    statistics.update(statistics.rotated(features(8, 1)), 1.0)
    assert before.keys() >= {"a.normalizers.cls.rotation", "b.normalizers.patch.std"}
    assert all(torch.equal(before[key], value) for key, value in statistics.state_dict().items())


def test_statistics_nobody_estimated_show():
    statistics = TeacherStatistics(TEACHERS, "phi_s")
    assert all(v.isnan().all() for tokens in standardized(statistics, features(2, 0)).values() for v in tokens.values())


def test_constant_features_stay_finite():
    x = {"a": {"cls": torch.full((9, 12), 7.0)}}
    statistics = TeacherStatistics({"a": (12, ["cls"])}, "phi_s")
    statistics.estimate([x])
    assert torch.isfinite(standardized(statistics, x)["a"]["cls"]).all()


def test_nothing_to_estimate_from_is_explained():
    with pytest.raises(ValueError, match="no two rows of a's cls"):
        estimated()
    with pytest.raises(ValueError, match="no token type has the convention 'phi_s'"):
        TeacherStatistics(TEACHERS).estimate([features(2, 0)])
