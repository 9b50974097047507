"""The order of the images as a pure function of (seed, global batch size, position): any step at once, no state.

The global position of an image is p = step * batch + slot. Every batch holds each group's share; groups are mixed
evenly along the slots, so a contiguous block of a batch (a rank's part) holds about the same mix. A group counts its
draws: draw d is image permutation(d mod n) of pass d div n, and every pass has a new permutation, so each image is seen
exactly once a pass. The number of ranks is nowhere in it: rank r of w takes slots [r batch / w, (r + 1) batch / w), and
the ranks' parts joined are the batch of a single process.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.kernels import philox

_FEISTEL_ROUNDS = 8
_MAX_PERIOD = 10_000  # steps after which the division of remainders repeats; shares are exact to 1 / 10,000 of an image
_MASK32 = np.uint64(0xFFFFFFFF)


class Permutation:
    """A permutation of 0 ... n - 1 with random access: a Feistel network, walked until it lands below n.

    A Feistel network is a bijection whatever its round function is; applying it again to values of n and above (cycle
    walking: Black and Rogaway, CT-RSA 2002) restricts it to 0 ... n - 1. The domain is the next power of two, so that
    takes fewer than two walks on average.
    """

    def __init__(self, n: int, seed: int, group: int = 0, pass_index: int = 0) -> None:
        assert n >= 1
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low = np.uint64(bits // 2)
        self._high = np.uint64(bits - bits // 2)
        self._keys = _round_keys(seed, group, pass_index)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """int64 indices in [0, n), any shape -> int64 of that shape."""
        index = np.asarray(index, dtype=np.int64)
        assert index.size == 0 or (index.min() >= 0 and index.max() < self.n)
        x = self._encrypt(index.astype(np.uint64).reshape(-1))
        while (outside := x >= self.n).any():
            x = np.where(outside, self._encrypt(x), x)
        return x.astype(np.int64).reshape(index.shape)

    def _encrypt(self, x: np.ndarray) -> np.ndarray:
        wide, narrow = self._high, self._low
        left, right = x >> narrow, x & _ones(narrow)
        for key in self._keys:
            # the halves swap places and widths, so an odd number of bits works too
            left, right = right, (left ^ _mix(right, key)) & _ones(wide)
            wide, narrow = narrow, wide
        return (left << narrow) | right


def _ones(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 64-bit finaliser (SplitMix64's) of x and the key: each bit of the result depends on every bit of both."""
    x = x * np.uint64(0x9E3779B97F4A7C15) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=256)
def _round_keys(seed: int, group: int, pass_index: int) -> np.ndarray:
    """One 64-bit key a round, from Philox with the counter (pass, group, round)."""
    b = (group << 8) + torch.arange(_FEISTEL_ROUNDS)
    words = philox.words(seed, philox.ORDER, pass_index, b).numpy().astype(np.uint64)  # [rounds, 4]
    return (words[:, 0] << np.uint64(32)) | (words[:, 1] & _MASK32)


class Shares:
    """How many images of a batch each group gives, step by step.

    batch * weight is rarely whole. The whole part is fixed; the rest rotates with a period: at phase t of T an offset u
    = t / T is laid over the groups' fractions placed end to end, and each group whose stretch holds a point u + integer
    gives one image more (systematic sampling). Over a period every group gets its exact share, in each step the counts
    add up to the batch.
    """

    def __init__(self, weights: Sequence[Fraction], batch: int) -> None:
        assert sum(weights) == 1
        shares = [weight * batch for weight in weights]
        self.period = math.lcm(*(share.denominator for share in shares))
        stride = _coprime_near_golden(self.period)  # neighbouring steps use distant offsets
        offsets = np.arange(self.period, dtype=np.int64) * stride % self.period
        edges = np.cumsum([0] + [int(share % 1 * self.period) for share in shares])  # in units of 1 / period
        # points u + integer below an edge e: ceil(e - u), in those units
        below = -((offsets[:, None] - edges[None, :]) // self.period)
        counts = np.diff(below, axis=1) + np.array([int(share) for share in shares])
        assert (counts.sum(1) == batch).all() and (counts >= 0).all()
        self.counts = counts  # [period, groups]
        self._before = np.concatenate([np.zeros((1, len(weights)), np.int64), counts.cumsum(0)])

    def at(self, step: int) -> np.ndarray:
        """int64 [groups]: how many images of each group step `step` holds."""
        return self.counts[step % self.period]

    def before(self, step: int) -> np.ndarray:
        """int64 [groups]: how many images of each group the steps before `step` held."""
        periods, phase = divmod(step, self.period)
        return periods * self._before[-1] + self._before[phase]


def _coprime_near_golden(period: int) -> int:
    candidate = max(1, round(period * 0.618))
    while math.gcd(candidate, period) != 1:
        candidate += 1
    return candidate


def exact_weights(weights: Sequence[float], batch: int) -> list[Fraction]:
    """Weights as fractions that add up to 1, such that the division of a batch repeats within 10,000 steps.

    They are exact where that is possible, else to 1 / 10,000 of an image a step, and never 0 where the weight is not.
    """
    if any(not (weight >= 0 and math.isfinite(weight)) for weight in weights) or sum(weights) <= 0:
        raise DataError(f"data.group_weights are {list(weights)}: they must not be negative, and one must be above 0")
    # relative to the largest, so that the unit does not matter
    raw = [Fraction(weight / max(weights)).limit_denominator(1_000_000) for weight in weights]
    raw = [max(share, Fraction(int(weight > 0), 1_000_000)) for share, weight in zip(raw, weights, strict=True)]
    exact = [weight / sum(raw) for weight in raw]
    if math.lcm(*((weight * batch).denominator for weight in exact)) <= _MAX_PERIOD:
        return exact
    parts = batch * _MAX_PERIOD
    rounded = [max(round(weight * parts), int(weight > 0)) for weight in exact]
    rounded[int(np.argmax(rounded))] += parts - sum(rounded)
    return [Fraction(weight, parts) for weight in rounded]


class SampleOrder:
    """Maps global positions to images.

    Args:
        group_sizes: images in each group (repeats counted), all at least 1.
        weights: one for each group, in any unit.
        seed: of the permutations.
        batch: images over all ranks.

    Raises:
        DataError: negative weights, or a batch below 1.
    """

    def __init__(self, group_sizes: Sequence[int], weights: Sequence[float], seed: int, batch: int) -> None:
        assert len(group_sizes) == len(weights) and all(size >= 1 for size in group_sizes)
        if batch < 1:
            raise DataError(f"the global batch size is {batch}: at least 1 is needed")
        self.group_sizes = np.asarray(group_sizes, dtype=np.int64)
        self.seed, self.batch = seed, batch
        self.shares = Shares(exact_weights(weights, batch), batch)
        self._pattern = functools.lru_cache(maxsize=64)(self._mix_groups)

    def step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(group, draw), int64 [batch] each, of the slots of one batch; `image` says which image a draw is."""
        group, nth = self._pattern(step % self.shares.period)
        return group, self.shares.before(step)[group] + nth

    def image(self, group: np.ndarray, draw: np.ndarray, skip: int = 0) -> np.ndarray:
        """The index within its group of every draw, int64.

        Args:
            group: int64 [M].
            draw: int64 [M], counted from the start of the run.
            skip: go this many images on in the order of the same pass (around its end), to replace a broken image.
        """
        group, draw = np.asarray(group, np.int64), np.asarray(draw, np.int64)
        passes, index = np.divmod(draw, self.group_sizes[group])
        index = (index + skip) % self.group_sizes[group]
        result = np.empty_like(index)
        for g, p in set(zip(group.tolist(), passes.tolist(), strict=True)):
            chosen = (group == g) & (passes == p)
            permutation = Permutation(int(self.group_sizes[g]), self.seed, g, p)
            result[chosen] = permutation(index[chosen])
        return result

    def _mix_groups(self, phase: int) -> tuple[np.ndarray, np.ndarray]:
        """(group, how many of that group come before) for each slot: every group spread evenly over the batch."""
        counts = self.shares.counts[phase]
        group = np.repeat(np.arange(len(counts)), counts)
        nth = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort((nth + 0.5) / counts[group], kind="stable")
        return group[order], nth[order]


def rank_slots(batch: int, rank: int, world_size: int) -> slice:
    """The slots of a global batch that a rank takes: a contiguous block. DataError if ranks cannot share it evenly."""
    if batch % world_size:
        raise DataError(
            f"a global batch of {batch} images cannot be shared by {world_size} processes; "
            f"use a multiple of {world_size}"
        )
    share = batch // world_size
    return slice(rank * share, (rank + 1) * share)
