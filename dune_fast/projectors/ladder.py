"""LP, the ladder of projectors (UNIC): an own MLP per teacher, token type and chosen block, summed over the blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dune_fast.kernels.nn.block import init_linear
from dune_fast.projectors.base import Projection, Projector, StudentShape, TeacherFeatures, Tokens, split_cls
from dune_fast.projectors.config import ProjectorConfig


class LadderMLP(nn.Module):
    """One rung of the ladder: [LN] Linear [LN] GELU Linear (LN eps 1e-5); truncated normal 0.02 and zero bias."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, prenorm: bool, midnorm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(input_dim)] if prenorm else []
        layers.append(nn.Linear(input_dim, hidden_dim))
        layers += [nn.LayerNorm(hidden_dim)] if midnorm else []
        layers += [nn.GELU(), nn.Linear(hidden_dim, output_dim)]
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                init_linear(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class LadderProjector(Projector):
    """LP for one teacher: `cls.<block>` and `patch.<block>` MLPs whose outputs are summed over the blocks."""

    def __init__(
        self, input_dim: int, output_dim: int, blocks: Sequence[int], hidden_dims: Sequence[int],
        prenorm: bool = False, midnorm: bool = False, token_types: Sequence[str] = ("cls", "patch"),
    ) -> None:  # fmt: skip
        super().__init__()
        for token in token_types:
            rungs = {
                str(block): LadderMLP(input_dim, hidden, output_dim, prenorm, midnorm)
                for block, hidden in zip(blocks, hidden_dims, strict=True)
            }
            self.add_module(token, nn.ModuleDict(rungs))
        self.token_types = tuple(token_types)

    def forward(self, tokens: Tokens, kept: Tensor | None = None, grid: tuple[int, int] | None = None) -> Projection:
        parts = {block: split_cls(x, self.has_cls) for block, x in tokens.items()}
        projection = {}
        for token in self.token_types:
            rungs = [rung(parts[int(block)][token]) for block, rung in getattr(self, token).items()]
            projection[token] = torch.stack(rungs).sum(0) if len(rungs) > 1 else rungs[0]
        return projection

    def last_layers(self) -> dict[str, nn.Linear]:
        layers = {}
        for token in self.token_types:
            *others, top = (rung.layers[-1] for rung in getattr(self, token).values())
            layers[token] = top
            for layer in others:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        return layers


def ladder_projector(cfg: ProjectorConfig, student: StudentShape, teacher: TeacherFeatures) -> Projector:
    """See `projectors.base.KINDS`."""
    last = student.depth - 1
    blocks = cfg.which_blocks or list(range(student.depth))
    hidden = [cfg.last_hidden_dim if i == last else cfg.hidden_dim for i in blocks]
    return LadderProjector(
        student.embed_dim, teacher.channels, blocks, hidden, cfg.prenorm, cfg.midnorm, teacher.token_types
    )
