"""The terms of a token's loss: a weighted sum of what the fused kernel gives and of losses in plain torch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def dampened(d: Tensor) -> Tensor:
    """d^2 / 2 within 1, 2 sqrt(|d| + 1e-8) - 1.5 beyond: the pull of a large difference falls."""
    size = d.abs()
    return (0.5 * d.square()).where(size < 1, 2 * (size + 1e-8).sqrt() - 1.5)


ELEMENTS: dict[str, Callable[[Tensor], Tensor]] = {"mse": Tensor.square, "dampened_mse": dampened}
"""Term -> loss of a difference, element by element; the mean over channels is a position's."""
