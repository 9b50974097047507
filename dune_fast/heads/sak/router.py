"""SAK's mixture of representations: for each task and level a router weighs the trunk's tokens and every teacher's.

    y = sum_e w_e f_e,   w = softmax(logits),   f = [x, f_teacher1, f_teacher2, ...]

Logits are means over an image's tokens. With noise, training adds a standard normal number times a learned deviation at
every position:

    logits = clean + eps * (softplus(raw) + 0.01)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.kernels.nn.block import init_linear

LEAST_DEVIATION = 0.01


class Router(nn.Module):
    """Of one task and level. `experts` counts the trunk; `noisy` gives each logit a deviation in training."""

    def __init__(self, dim: int, experts: int, noisy: bool = True) -> None:
        super().__init__()
        hidden = dim // 2
        outputs = experts * (1 + noisy)
        self.num_experts, self.noisy = experts, noisy
        self.module = nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, outputs))
        for layer in (self.module[0], self.module[3]):
            init_linear(layer)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """The experts' weights, [B, E, N] with noise in training, else [B, E, 1].

        Args:
            x: the trunk's patch tokens without a norm, [B, N, D].
            noise: [B, E, N]; drawn where it is needed and None.
        """
        logits = self.module(x).mean(1)[..., None].float()  # [B, E, 1], or twice as many
        if self.noisy:
            logits, raw = logits.chunk(2, dim=1)
            if self.training:
                if noise is None:
                    noise = torch.randn(len(x), self.num_experts, x.shape[1], device=x.device)
                logits = logits + noise * (F.softplus(raw) + LEAST_DEVIATION)
        return logits.softmax(1)


class TaskRouters(nn.Module):
    """Routers of every task at every level, or the plain sum of all experts in their place.

    Args:
        dim: channels, D.
        levels: blocks whose tokens are mixed.
        tasks: their names.
        experts: teachers and the trunk.
        routed: False gives the plain sum, one tensor for all tasks.
        noisy: see `Router`.
    """

    def __init__(
        self, dim: int, levels: Sequence[int], tasks: Sequence[str], experts: int, routed: bool = True,
        noisy: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.levels, self.tasks = tuple(levels), tuple(tasks)
        names = [router_name(level, task) for level in levels for task in tasks] if routed else []
        self.routers = nn.ModuleDict({name: Router(dim, experts, noisy) for name in names})

    def forward(
        self, experts: Mapping[int, Sequence[Tensor]], noise: Mapping[str, Tensor] | None = None
    ) -> dict[str, dict[int, Tensor]]:
        """Mixed tokens, task -> level -> [B, N, D].

        Args:
            experts: level -> the trunk's patch tokens, then each teacher's, [B, N, D] each.
            noise: "<level>_<task>" -> [B, E, N]. None draws it, level by level and inside a level task by task.
        """
        mixed: dict[str, dict[int, Tensor]] = {task: {} for task in self.tasks}
        for level in self.levels:
            stacked = torch.stack(list(experts[level]), dim=1)  # [B, E, N, D]
            total = None if self.routers else stacked.sum(1)
            for task in self.tasks:
                if total is not None:
                    mixed[task][level] = total
                    continue
                name = router_name(level, task)
                weights = self.routers[name](experts[level][0], None if noise is None else noise[name])
                mixed[task][level] = (weights[..., None] * stacked).sum(1)
        return mixed


def router_name(level: int, task: str) -> str:
    """The router's name among `TaskRouters.routers`."""
    return f"{level}_{task}"
