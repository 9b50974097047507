"""Random numbers that a student's network takes in training: pure functions of seed, step and image."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dune_fast.kernels.philox import POSITION_CROP, POSITION_DROPOUT, WINDOW, uniform4


class PositionDraws(NamedTuple):
    """Uniform numbers in [0, 1) of every image, float32."""

    scale: Tensor
    """[B]"""
    aspect: Tensor
    """[B]"""
    offset: Tensor
    """[B, 2], x before y."""
    dropout: Tensor
    """[B]"""


class StepDraws(NamedTuple):
    """Where the random numbers of a training step come from: pure functions of seed, step and image."""

    seed: int
    step: int
    positions: Tensor
    """int64 [B], global index of each image in the run."""

    def for_positions(self) -> PositionDraws:
        """Of `training_positions`."""
        crop = uniform4(self.seed, POSITION_CROP, self.positions, self.step)
        dropout = uniform4(self.seed, POSITION_DROPOUT, self.positions, self.step)
        return PositionDraws(crop[:, 0], crop[:, 1], crop[:, 2:], dropout[:, 0])

    def for_window(self) -> tuple[float, float]:
        """Two numbers, the same on all ranks, of `windows.drawn_window`; made on the host."""
        first, second, *_ = uniform4(self.seed, WINDOW, self.step).tolist()
        return first, second
