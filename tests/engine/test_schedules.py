"""Schedules; the exact published arrays are in the `train` reference cases."""

from __future__ import annotations

import numpy as np

from dune_fast.engine.schedules import (
    SCHEDULES,
    cosine,
    cycled_beta,
    ema_momenta,
    iterations,
    learning_rates,
    scheduled_rates,
)


def test_learning_rate_has_the_published_shape():
    lr = learning_rates(100, base=1.0, minimum=0.01, warmup_fraction=0.2)
    assert len(lr) == 100 and lr[0] == 0 and lr[19] == 1.0 and lr[20] == 1.0
    assert np.all(np.diff(lr[:20]) > 0) and np.all(np.diff(lr[20:]) < 0)
    assert 0.01 < lr[-1] < 0.011  # the end point itself is left out
    assert lr[60] == np.float64(0.01 + 0.99 * 0.5)  # half-way down


def test_short_runs_have_no_gap():
    for n in (2, 3, 4, 5, 9, 11):
        lr, m = learning_rates(n, 1.0), ema_momenta(n)
        assert len(lr) == len(m) == n and np.isfinite(lr).all() and m[0] == 1.0


def test_cosine_of_nothing_is_empty():
    assert cosine(1.0, 0.0, 0).shape == (0,)


def test_iterations_are_even_and_cover_all_images():
    assert iterations(1000, 100) == 10 and iterations(1001, 100) == 12 and iterations(901, 100) == 10
    assert iterations(100 * 1_281_167, 1024) == 125_114


def test_mast3rs_schedule_by_epochs():
    """lr t / 8, then min + (lr - min) (1 + cos(pi (t - 8) / 42)) / 2, t the fractional epoch of 50."""
    each, n = 20, 1000
    t = np.arange(n) / each
    wanted = np.where(t < 8, 1e-4 * t / 8, 1e-6 + (1e-4 - 1e-6) * 0.5 * (1 + np.cos(np.pi * (t - 8) / 42)))
    np.testing.assert_allclose(scheduled_rates("mast3r", n, 1e-4, 1e-6, 0.16), wanted, rtol=1e-12)


def test_warm_ups_multiply_the_other_schedules():
    linear = scheduled_rates("linear", 10, 2.0, 0.0, 0.2, start=0.5)
    np.testing.assert_allclose(linear, 2 * (1 - np.arange(10) / 10) * [0.5, 0.75, *[1] * 8])
    np.testing.assert_allclose(scheduled_rates("constant", 4, 3.0, 0.0, 0.5), [0.0, 1.5, 3.0, 3.0])
    assert np.array_equal(scheduled_rates("dune", 50, 1.0, 0.1, 0.2), learning_rates(50, 1.0, 0.1, 0.2))
    for name in SCHEDULES:
        for n in (2, 3, 5):
            rates = scheduled_rates(name, n, 1.0, 0.1, 0.4)
            assert len(rates) == n and np.isfinite(rates).all() and (rates >= 0).all() and (rates <= 1).all(), name


def test_the_first_beta_goes_down_and_comes_back():
    betas = cycled_beta(100, 0.95, 0.85)
    assert betas[0] == 0.95 and betas.argmin() == 29 and abs(betas[29] - 0.85) < 1e-12 and abs(betas[-1] - 0.95) < 1e-12
    assert np.all(np.diff(betas[:30]) < 0) and np.all(np.diff(betas[29:]) > 0)
