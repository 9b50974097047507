"""SAK's student side of one teacher: a chain of adapters along the trunk, read at some blocks (Lu et al., "Swiss Army
Knife", ICLR 2025).

    r_0 = A_0(x_0),   r_{i+1} = A_{i+1}(r_i + x_{i+1}),   A(x) = x + scale * up(GELU(down(x)))
    f_i = LN_i(r_{i+1}),   y_i = aligner_i(f_i)

x_0 is the embedding and x_{i+1} the output of block i. At each level i there is a norm of its own and, where student
and teacher differ in width, a linear layer. Everything is token-wise.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.kernels.nn.block import init_linear


class Adapter(nn.Module):
    """x + scale * up(GELU(down(x))). x: [..., D]; `scale` [1] starts at 1."""

    def __init__(self, dim: int, down_ratio: int = 4) -> None:
        super().__init__()
        self.down = nn.Linear(dim, dim // down_ratio)
        self.up = nn.Linear(dim // down_ratio, dim)
        self.scale = nn.Parameter(self.down.weight.new_ones(1))
        for layer in (self.down, self.up):
            init_linear(layer)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.up(F.gelu(self.down(x)))


class TeacherPath(nn.Module):
    """The adapters of one teacher, and what it gives at each level.

    Args:
        dim: channels of the student, D.
        channels: level, a block of the student from 0 -> channels of what the teacher gives there.
        down_ratio: D over the adapters' hidden channels.

    Raises:
        ValueError: no level, or a negative one.
    """

    def __init__(self, dim: int, channels: Mapping[int, int], down_ratio: int = 4) -> None:
        super().__init__()
        if not channels or min(channels) < 0:
            raise ValueError(f"levels {sorted(channels)}: give blocks of the student, from 0")
        self.levels = tuple(sorted(channels))
        self.adapters = nn.ModuleList(Adapter(dim, down_ratio) for _ in range(self.levels[-1] + 2))
        self.out_norms = nn.ModuleDict({str(level): nn.LayerNorm(dim) for level in self.levels})
        wider = {level: width for level, width in sorted(channels.items()) if width != dim}
        self.aligners = nn.ModuleDict({str(level): nn.Linear(dim, width) for level, width in wider.items()})
        for aligner in self.aligners.values():
            init_linear(aligner)

    def experts(self, tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """f of every level, [B, N, D], from the tokens before the first block (-1) and after each: [B, N, D]."""
        found = {}
        r = self.adapters[0](tokens[-1])
        for block, adapter in enumerate(self.adapters[1:]):
            r = adapter(r + tokens[block])
            if block in self.levels:
                found[block] = self.out_norms[str(block)](r)
        return found

    def forward(self, tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """What stands against the teacher's features at every level, [B, N, C]."""
        return {level: self.aligned(level, f) for level, f in self.experts(tokens).items()}

    def aligned(self, level: int, f: Tensor) -> Tensor:
        """`experts` of a level in the teacher's width, [B, N, D] -> [B, N, C]."""
        return self.aligners[str(level)](f) if str(level) in self.aligners else f
