"""Per-iteration schedules: learning rate and the momentum of the teachers' running statistics."""

from __future__ import annotations

import math

import numpy as np


def cosine(start: float, end: float, n: int) -> np.ndarray:
    """Half a cosine from start towards end over n iterations; the end point itself is left out. float64 [n]."""
    return end + 0.5 * (start - end) * (1.0 + np.cos(np.pi * np.arange(n) / max(n, 1)))


def learning_rates(n: int, base: float, minimum: float = 1e-6, warmup_fraction: float = 0.2) -> np.ndarray:
    """Linear warm-up over w = int(warmup_fraction * n) iterations, `base * i / (w - 1)`, then a cosine to `minimum`.

    Args:
        n: iterations of the run.
        base: the peak.

    Returns:
        float64 [n].
    """
    warmup = int(warmup_fraction * n)
    return np.concatenate([np.linspace(0.0, base, warmup), cosine(base, minimum, n - warmup)])


SCHEDULES = ("dune", "mast3r", "linear", "cosine", "constant")
"""Of n steps, w of them in the warm-up, i from 0:

    dune      peak i / (w - 1), then a cosine over the other n - w steps to the minimum
    mast3r    peak i / w, then the same cosine
    linear    over all n steps to the minimum, times the warm-up's factor
    cosine    the same by a cosine
    constant  the peak, times the warm-up's factor

    factor = 1 - (1 - i / w) (1 - start)
"""


def scheduled_rates(
    schedule: str, n: int, peak: float, minimum: float, warmup_fraction: float, start: float = 0.0
) -> np.ndarray:
    """The learning rate of every step by one of `SCHEDULES`, float64 [n]."""
    if schedule == "dune":
        return learning_rates(n, peak, minimum, warmup_fraction)
    warmup = round(warmup_fraction * n)
    rising = np.arange(warmup) / max(warmup, 1)
    if schedule == "mast3r":
        return np.concatenate([peak * rising, cosine(peak, minimum, n - warmup)])
    falls = {"linear": minimum + (peak - minimum) * (1 - np.arange(n) / n), "cosine": cosine(peak, minimum, n)}
    rates = falls.get(schedule, np.full(n, peak))
    rates[:warmup] *= 1 - (1 - rising) * (1 - start)
    return rates


def cycled_beta(n: int, high: float, low: float) -> np.ndarray:
    """Adam's first beta in one cycle: high to low over 30 % of the steps and back, by cosines. float64 [n]."""
    turn = max(1.0, 0.3 * n - 1)
    i = np.arange(n)
    down, up = np.minimum(1.0, i / turn), np.clip((i - turn) / max(1.0, n - 1 - turn), 0.0, 1.0)
    falling, rising = (a + (b - a) * (1 - np.cos(np.pi * x)) / 2 for a, b, x in ((high, low, down), (low, high, up)))
    return np.where(i <= turn, falling, rising)


def ema_momenta(n: int, start: float = 1.0, end: float = 0.001) -> np.ndarray:
    """Momentum of the teachers' running statistics: a cosine from start to end. float64 [n]."""
    return cosine(start, end, n)


def average_decay(decay: float, step: int) -> float:
    """Decay of the average of the weights after a step, from 0: min(decay, (1 + step) / (10 + step)), so that the first
    weights are forgotten in a short run, too."""
    return min(decay, (1 + step) / (10 + step))


def iterations(images: int, global_batch: int) -> int:
    """Iterations that see `images` images: rounded up, then up to an even number."""
    count = math.ceil(images / global_batch)
    return count + count % 2


def scaled_learning_rate(per_256: float, global_batch: int) -> float:
    """The linear scaling rule: the peak is `per_256 * global_batch / 256`."""
    return per_256 * global_batch / 256
