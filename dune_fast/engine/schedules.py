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
