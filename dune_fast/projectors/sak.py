"""SAK's student side of one teacher: a chain of adapters along the trunk, read at some blocks (Lu et al., "Swiss Army
Knife", ICLR 2025).

    r_0 = A_0(x_0),   r_{i+1} = A_{i+1}(r_i + x_{i+1}),   A(x) = x + scale * up(GELU(down(x)))
    f_i = LN_i(r_{i+1}),   y_i = aligner_i(f_i)

x_0 is the embedding and x_{i+1} the output of block i. At each level i there is a norm of its own and, where student
and teacher differ in width, a linear layer. Everything is token-wise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.kernels.nn.block import init_linear
from dune_fast.projectors.base import Projection, Projector, StudentShape, TeacherFeatures, Tokens
from dune_fast.projectors.config import ProjectorConfig


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


class AdapterChain(nn.Module):
    """The adapters of one teacher, from the embedding to the deepest level.

    Args:
        dim: channels of the student, D.
        levels: blocks of the student, from 0, whose r is wanted.
        down_ratio: D over the adapters' hidden channels.
    """

    def __init__(self, dim: int, levels: Sequence[int], down_ratio: int = 4) -> None:
        super().__init__()
        self.levels = tuple(sorted(levels))
        self.adapters = nn.ModuleList(Adapter(dim, down_ratio) for _ in range(self.levels[-1] + 2))

    def forward(self, tokens: Tokens) -> dict[int, Tensor]:
        """r of every level, [B, N, D], from the tokens before the first block (-1) and after each, [B, N, D]."""
        found = {}
        r = self.adapters[0](tokens[-1])
        for block, adapter in enumerate(self.adapters[1:]):
            r = adapter(r + tokens[block])
            if block in self.levels:
                found[block] = r
        return found


class Level(Projector):
    """Norm and, where the widths differ, aligner of one teacher at one level, `block`.

    Args:
        dim, channels: of the student, D, and of the teacher, C.
        block: of the student, from 0.
        prefix: tokens before the patches.
    """

    def __init__(self, dim: int, channels: int, block: int = 0, prefix: int = 0) -> None:
        super().__init__()
        self.block, self.prefix = block, prefix
        self.norm = nn.LayerNorm(dim)
        if channels != dim:
            self.aligner = nn.Linear(dim, channels)
            init_linear(self.aligner)

    def forward(self, tokens: Tokens, kept: Tensor | None = None, grid: tuple[int, int] | None = None) -> Projection:
        """r of the levels -> {"patch": [B, N, C]}."""
        return {"patch": self.aligned(self.norm(tokens[self.block][:, self.prefix :]))}

    def aligned(self, f: Tensor) -> Tensor:
        """The normed tokens, which routers mix, in the teacher's width. [B, N, D] -> [B, N, C]."""
        return self.aligner(f) if hasattr(self, "aligner") else f

    def last_layers(self) -> dict[str, nn.Linear]:
        raise ValueError(
            "projectors of the kind sak end in a norm, so that nothing can be fitted: set start.fit_projectors to false"
        )


def adapter_chain(cfg: ProjectorConfig, student: StudentShape) -> AdapterChain:
    """See `projectors.base.SHARED`."""
    return AdapterChain(student.embed_dim, cfg.which_blocks, cfg.down_ratio)


def level_projector(cfg: ProjectorConfig, student: StudentShape, teacher: TeacherFeatures) -> Level:
    """See `projectors.base.KINDS`. The teachers of a source belong to `which_blocks` in their order."""
    return Level(student.embed_dim, teacher.channels, cfg.which_blocks[teacher.place], int(student.cls))


def check_levels(cfg: ProjectorConfig, dim: int, teachers: Mapping[str, TeacherFeatures]) -> None:
    """ValueError unless every source has a teacher for each of `which_blocks`, all of them give patches alone, and a
    student of `dim` channels has some for the adapters."""
    if cfg.down_ratio > dim:
        raise ValueError(f"projector.down_ratio={cfg.down_ratio} leaves none of the student's {dim} channels: lower it")
    sources: dict[str, list[str]] = {}
    for name, features in teachers.items():
        sources.setdefault(features.source, []).append(name)
        if tuple(features.token_types) != ("patch",):
            raise ValueError(
                f"teachers.{name}.token_types is {list(features.token_types)}; SAK compares patches: give [patch]"
            )
    if not cfg.which_blocks:
        raise ValueError("projector.which_blocks is empty; name the student's blocks that SAK's teachers belong to")
    for source, names in sources.items():
        if len(names) != len(cfg.which_blocks):
            raise ValueError(
                f"{len(names)} teachers have the source {source!r} ({', '.join(names)}), but projector.which_blocks "
                f"names {len(cfg.which_blocks)} levels: give one entry of `teachers` for each, with the same `source`"
            )
