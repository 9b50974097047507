"""The order of the samples: permutations, shares of the groups, independence of ranks and of where one starts."""

import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from dune_fast.dali_pipelines.datasets import DataError
from dune_fast.dali_pipelines.order import Permutation, SampleOrder, Shares, exact_weights, rank_slots


def images_of_step(order: SampleOrder, step: int) -> list[tuple[int, int]]:
    group, draw = order.step(step)
    return list(zip(group.tolist(), order.image(group, draw).tolist(), strict=True))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 47, 64, 65, 1000, 4097, 476_608])  # the last: DUNE's human group
def test_permutation_is_a_bijection(n):
    values = Permutation(n, seed=3, group=2, pass_index=90)(np.arange(n))
    np.testing.assert_array_equal(np.sort(values), np.arange(n))


def test_permutation_has_random_access_beyond_32_bits():
    n = 20_000_000_000
    permutation = Permutation(n, seed=1)
    index = np.array([0, n // 2, n - 1])
    values = permutation(index)
    assert ((values >= 0) & (values < n)).all()
    assert int(permutation(index[1:2])[0]) == values[1]


def test_random_access_to_twenty_million_images_needs_no_memory_and_no_time():
    """DUNE's groups, anywhere in the run: nothing may be as long as a dataset, nothing may be walked up to a step."""
    sizes, batch = [18_492_301, 1_748_558, 476_608], 1024  # 20,717,467 images
    tracemalloc.start()
    began = time.perf_counter()
    order = SampleOrder(sizes, [1, 1, 1], seed=0, batch=batch)
    for step in (0, 125_000, 10**9):
        group, draw = order.step(step)
        index = order.image(group, draw)
        assert (index >= 0).all() and (index < np.array(sizes)[group]).all()
        assert order.image(group[777:778], draw[777:778]).tolist() == [index[777]]
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20 and seconds < 10  # measured: 0.15 MiB, 0.2 s on a busy machine


def random_order(seed: int) -> SampleOrder:
    """Any number of groups of any size, with any weights and batch; some groups may be left out."""
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(1, 8))
    weights = np.where(rng.random(groups) < 0.2, 0, rng.choice([1, 2, 0.3, 1.7, 5], groups))
    weights[rng.integers(groups)] = 1
    return SampleOrder(rng.integers(1, 60, groups).tolist(), weights.tolist(), seed, int(rng.integers(1, 70)))


@pytest.mark.parametrize("seed", range(40))
def test_for_any_groups_every_pass_holds_every_image_exactly_once(seed):
    order = random_order(seed)
    steps = -(-400 // order.batch)
    group, draw = (np.concatenate(parts) for parts in zip(*(order.step(step) for step in range(steps)), strict=True))
    image = order.image(group, draw)
    before = order.shares.before(steps)
    for g, size in enumerate(order.group_sizes.tolist()):
        own = np.argsort(draw[group == g])
        assert draw[group == g][own].tolist() == list(range(before[g])), "draws are counted without gaps"
        images = image[group == g][own]
        for start in range(0, len(images), size):
            part = images[start : start + size].tolist()
            assert len(set(part)) == len(part) and set(part) <= set(range(size))
        passes = [tuple(images[start : start + size].tolist()) for start in range(0, len(images) - size + 1, size)]
        if size > 8:
            assert len(set(passes)) == len(passes), "each pass has a new order"


@pytest.mark.parametrize("seed", range(40))
def test_for_any_groups_positions_do_not_depend_on_ranks_or_on_where_one_starts(seed):
    order, rng = random_order(seed), np.random.default_rng(1000 + seed)
    divisors = [d for d in range(1, order.batch + 1) if order.batch % d == 0]
    for step in rng.integers(0, 10**6, 3).tolist():
        whole = images_of_step(order, step)
        fresh, world = random_order(seed), int(rng.choice(divisors))
        joined = []
        for rank in range(world):
            group, draw = (values[rank_slots(order.batch, rank, world)] for values in fresh.step(step))
            joined += zip(group.tolist(), fresh.image(group, draw).tolist(), strict=True)
        assert joined == whole


@pytest.mark.parametrize("n", [5, 47, 300])
def test_every_image_is_equally_likely_everywhere(n):
    """Chi-square of where image i lands, over passes."""
    passes = 400
    values = np.stack([Permutation(n, 7, 0, p)(np.arange(n)) for p in range(passes)])
    for position in (0, n // 2, n - 1):
        counts = np.bincount(values[:, position], minlength=n)
        assert stats.chisquare(counts).pvalue > 1e-3
    # neighbours in the folder should not stay neighbours
    together = (np.abs(np.diff(values, axis=1)) == 1).mean()
    assert together == pytest.approx(2 / n, rel=0.15)


def test_permutations_differ_by_seed_group_and_pass():
    index = np.arange(1000)
    base = Permutation(1000, 0, 0, 0)(index)
    for other in (Permutation(1000, 1, 0, 0), Permutation(1000, 0, 1, 0), Permutation(1000, 0, 0, 1)):
        assert (other(index) == base).mean() < 0.01


def test_thirds_with_a_remainder_that_no_group_always_gets():
    order = SampleOrder([100, 1000, 10], [1, 1, 1], seed=0, batch=64)
    counts = np.array([np.bincount(order.step(step)[0], minlength=3) for step in range(9)])
    assert (counts.sum(1) == 64).all() and counts.min() == 21 and counts.max() == 22
    assert counts.sum(0).tolist() == [192, 192, 192]


@pytest.mark.parametrize(
    "weights, batch", [([0.5, 0.3, 0.2], 7), ([1, 2], 1), ([13153480, 4132914, 1205907], 1024), ([1, 0, 1], 5)]
)
def test_shares_are_exact_over_a_period_and_never_off_by_more_than_one(weights, batch):
    exact = exact_weights(weights, batch)
    shares = Shares(exact, batch)
    counts = np.stack([shares.at(step) for step in range(shares.period)])
    expected = np.array([float(weight * batch) for weight in exact])
    assert (counts.sum(1) == batch).all() and (np.abs(counts - expected) < 1).all()
    assert counts.sum(0).tolist() == [int(weight * batch * shares.period) for weight in exact]
    np.testing.assert_allclose([float(weight) for weight in exact], np.array(weights) / sum(weights), atol=1e-4)
    for step in (0, 1, shares.period, 2 * shares.period + 3):
        whole, rest = divmod(step, shares.period)
        assert shares.before(step).tolist() == (whole * counts.sum(0) + counts[:rest].sum(0)).tolist()


def test_weights_become_fractions_that_add_up():
    assert exact_weights([1.0, 1.0, 1.0], 64) == [Fraction(1, 3)] * 3
    for bad in ([-1, 2], [0, 0], [float("nan"), 1]):
        with pytest.raises(DataError, match="group_weights"):
            exact_weights(bad, 8)


@pytest.mark.parametrize("weights", [[1, 1e-5], [100_000, 1], [1e-8, 3e-8], [1, 1e-12], [0.123456789, 0.5, 0]])
def test_weights_in_any_unit_leave_no_group_out(weights):
    """To 1 / 10,000 of an image a step; a group with a weight is seen at least that often."""
    exact = exact_weights(weights, 64)
    assert sum(exact) == 1 and Shares(exact, 64).period <= 10_000
    for share, weight in zip(exact, weights, strict=True):
        assert (share > 0) == (weight > 0)
        assert float(share * 64) == pytest.approx(64 * weight / sum(weights), abs=1.01e-4)


def test_batch_that_the_ranks_cannot_share_is_refused():
    with pytest.raises(DataError, match="multiple of 5"):
        rank_slots(24, 0, 5)


def test_every_rank_gets_all_groups():
    order = SampleOrder([50, 50, 50], [1, 1, 1], seed=0, batch=64)
    for step in range(3):
        group, _ = order.step(step)
        for rank in range(8):
            counts = np.bincount(group[rank_slots(64, rank, 8)], minlength=3)
            assert counts.min() >= 2 and counts.max() <= 3


def test_skip_walks_through_the_rest_of_the_pass():
    """Replacements of a broken image: distinct ones, all of them within n - 1 steps."""
    order = SampleOrder([9], [1], seed=2, batch=4)
    group, draw = np.array([0]), np.array([31])
    met = [int(order.image(group, draw, skip)[0]) for skip in range(9)]
    assert sorted(met) == list(range(9))
