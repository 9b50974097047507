"""Philox-4x32-10 against the published vectors and numpy's 64-bit arithmetic; statistics; independence of layout."""

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


def numpy_philox(key: tuple[int, int], counter: np.ndarray) -> np.ndarray:
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        low = np.uint64(0xFFFFFFFF)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3], -1).astype(np.int64)


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_published_vectors(counter, key, expected):
    found = philox.philox4x32(key[0] | key[1] << 32, torch.tensor(counter, dtype=torch.int64))
    assert found.tolist() == list(expected)


def test_equals_numpy_on_random_counters_and_odd_shapes():
    counter = np.random.default_rng(0).integers(0, 2**32, (7, 3, 4), dtype=np.int64)
    key = (0xDEADBEEF, 0x12345678)
    ours = philox.philox4x32(key[0] | key[1] << 32, torch.from_numpy(counter))
    np.testing.assert_array_equal(ours.numpy(), numpy_philox(key, counter))


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


def test_tritons_philox_gives_the_same_words():
    """The layout of key and counter is the one a kernel uses; runs on a GPU, or where Triton interprets."""
    triton = pytest.importorskip("triton")
    tl = pytest.importorskip("triton.language")
    if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1")

    @triton.jit
    def kernel(out, seed, low, high, b, stream, N: tl.constexpr):
        i = tl.arange(0, N)
        zero = tl.zeros((N,), tl.uint32)
        c0, c1 = i.to(tl.uint32) + low.to(tl.uint32), zero + high.to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + b.to(tl.uint32), zero + stream.to(tl.uint32))
        tl.store(out + i, w0.to(tl.int64))
        tl.store(out + N + i, w1.to(tl.int64))
        tl.store(out + 2 * N + i, w2.to(tl.int64))
        tl.store(out + 3 * N + i, w3.to(tl.int64))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = torch.full((4, 16), -1, dtype=torch.int64, device=device)
    seed = 0x1234567890ABCDEF
    kernel[(1,)](out, seed, 100, 5, 77, philox.AUGMENT, N=16)
    expected = philox.words(seed, philox.AUGMENT, torch.arange(16) + 100 + (5 << 32), 77)
    assert torch.equal(out.cpu().T & 0xFFFFFFFF, expected)
