"""Philox-4x32-10 against the published vectors; statistics; independence of layout. Triton's: test_teacher_drop.py."""

import numpy as np
import pytest
import torch

from dune_fast.kernels import philox

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, expected words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_published_vectors(counter, key, expected):
    found = philox.philox4x32(key[0] | key[1] << 32, torch.tensor(counter, dtype=torch.int64))
    assert found.tolist() == list(expected)


def test_counter_layout_is_the_documented_one():
    seed, a, b = 0xFEDCBA9876543210, 0x0123456789ABCDEF, 0xCAFEBABE
    counter = torch.tensor([0x89ABCDEF, 0x01234567, 0xCAFEBABE, philox.ORDER])
    expected = philox.philox4x32(seed, counter)
    assert torch.equal(philox.words(seed, philox.ORDER, a, b), expected)
    assert torch.equal(philox.words(seed, philox.ORDER, torch.tensor([a]), torch.tensor([b]))[0], expected)


def test_negative_seed_and_64_bit_counter_keep_their_bits():
    assert torch.equal(philox.words(-1, 1, 2**64 - 1), philox.words(2**64 - 1, 1, -1))


def test_broadcasts_and_each_number_is_independent_of_its_neighbours():
    a, b = torch.arange(5)[:, None] + 2**40, torch.arange(3)
    grid = philox.uniform4(3, philox.DROPPING, a, b)
    assert grid.shape == (5, 3, 4) and grid.dtype == torch.float32
    assert torch.equal(grid[4, 2], philox.uniform4(3, philox.DROPPING, 2**40 + 4, 2))


def test_uniform_is_uniform_and_streams_differ():
    from scipy import stats

    a = torch.arange(20_000)
    u = philox.uniform4(7, philox.AUGMENT, a)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    other = philox.uniform4(7, philox.DROPPING, a)[:, 0]
    assert abs(np.corrcoef(u[:, 0].numpy(), other.numpy())[0, 1]) < 0.03
    assert abs(np.corrcoef(u[:-1, 0].numpy(), u[1:, 0].numpy())[0, 1]) < 0.03


def test_largest_word_stays_below_one():
    """float32 rounding of 0xFFFFFFFF * 2^-32 would give exactly 1."""
    assert float(philox.to_uniform(torch.tensor(0xFFFFFFFF))) == 1 - 2.0**-24


@pytest.mark.parametrize(
    "counter", [torch.zeros(4), torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)]
)
def test_wrong_counters_are_refused(counter):
    with pytest.raises(ValueError, match="int64"):
        philox.philox4x32(0, counter)
