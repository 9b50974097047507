"""LAMB for weights that ranks hold in pieces.

DeepSpeed's own (`FusedLamb`) is a CUDA kernel that takes each tensor for a layer. Under ZeRO a tensor is a rank's flat
part of many layers, so it would compute other ratios for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dune_fast.engine.zero_state import Shard, add_squares


class Lamb(torch.optim.AdamW):
    """LAMB ("Large Batch Optimization for Deep Learning", 1904.00962, algorithm 2), phi the identity.

        r = m / (sqrt(v) + eps) + weight_decay * w
        w = w - lr * ratio * r,  ratio = |w| / |r|

    m and v are Adam's moments, corrected for their bias: the state is AdamW's. Norms are of whole parameters, over the
    pieces of all ranks. The ratio is 1 where either norm is 0, and for parameters without weight decay: the common
    choice (the paper adapts all), since a bias that begins at 0 would hardly move.
    """

    found_inf: Tensor
    """float32 scalar on the device, set before every step: 1 where the step is to change nothing, else 0."""

    def follow(self, shards: Sequence[Shard], parameters: int, add_up: Callable[[Tensor], None] | None) -> None:
        """Tells which pieces of parameters there are, once, before the first step.

        Args:
            shards: all that this rank holds.
            parameters: number of trained parameters, on all ranks.
            add_up: sums a tensor over ranks, in place; None where this rank holds everything.
        """
        self._count, self._add_up = parameters, add_up
        self._shards: dict[int, list[Shard]] = {}
        self._indices: dict[int, Tensor] = {}
        for shard in shards:
            self._shards.setdefault(id(shard.master), []).append(shard)
        for key, own in self._shards.items():
            self._indices[key] = torch.tensor([shard.index for shard in own], device=own[0].master.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates the masters in `param_groups`, of the same groups on all ranks; the host reads nothing."""
        groups, parts = self.param_groups, []
        masters = [master for group in groups for master in group["params"]]
        for group in groups:
            if own := [master for master in group["params"] if id(master) in self._shards]:
                moves = [shard.of(master) for master in own for shard in self._shards[id(master)]]
                weights = list(torch._foreach_mul(moves, 1.0))  # copies
                indices = torch.cat([self._indices[id(master)] for master in own])
                parts.append((group["lr"], group["weight_decay"], moves, weights, indices))
        torch._foreach_zero_(masters)
        self.param_groups = [{**group, "lr": 1.0, "weight_decay": 0.0} for group in groups]
        super().step()  # puts -m / (sqrt(v) + eps) into the masters; they stay 0 where the step is skipped
        self.param_groups = groups
        squares = torch.zeros(2 * self._count, device=self.found_inf.device)
        for _, decay, moves, weights, indices in parts:
            if decay:
                torch._foreach_add_(moves, weights, alpha=-decay)
                add_squares(squares, weights + moves, torch.cat([indices, indices + self._count]))
        if self._add_up and any(group["weight_decay"] and group["params"] for group in groups):
            self._add_up(squares)
        of_weights, of_moves = squares.sqrt().view(2, -1)
        ratios = torch.where((of_weights > 0) & (of_moves > 0), of_weights / of_moves, 1.0)
        for rate, _, moves, weights, indices in parts:
            scales = ratios[indices] * (rate * (1.0 - self.found_inf))
            torch._foreach_mul_(moves, list(scales.unbind()))
            torch._foreach_add_(moves, weights)
