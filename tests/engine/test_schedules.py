"""Schedules; the exact published arrays are in the `train` reference cases."""

from __future__ import annotations

import numpy as np

from dune_fast.engine.schedules import cosine, ema_momenta, iterations, learning_rates


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
