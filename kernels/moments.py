"""Per-channel mean and sum of squared deviations of a teacher's features.

    mean_c = sum_r x[r, c] / R,   m2_c = sum_r (x[r, c] - mean_c)^2

Two passes around the mean, never E[x^2] - E[x]^2: a channel whose mean is far from zero would lose its variance.
Minimal bytes moved: read x once, R * C elements. Shapes: x [..., C] -> mean, m2 float32 [C].
"""

from __future__ import annotations

from torch import Tensor


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations over all dimensions but the last.

    Args:
        x: [..., C], fp32, bf16 or fp16, at least one row.

    Returns:
        (mean, m2), float32 [C] each.

    Raises:
        ValueError: no row or no channel.
    """
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"moments takes [..., C] with at least one row, got {list(x.shape)}")
    rows = x.reshape(-1, x.shape[-1]).float()
    mean = rows.mean(0)
    return mean, (rows - mean).square_().sum(0)
