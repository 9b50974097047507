"""TP, the transformer projector (DUNE): one block over [cls, patches], then a linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from dune_fast.kernels.nn.block import Block, product_dtype, run_blocks
from dune_fast.projectors.base import Projection, Projector, StudentShape, TeacherFeatures, Tokens, split_cls
from dune_fast.projectors.config import ProjectorConfig


class TransformerProjector(Projector):
    """Transformer blocks, then Linear(D -> C). The linear layers keep PyTorch's default initialisation."""

    reads_all_tokens = True

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        num_heads: int,
        num_blocks: int = 1,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-4,
        token_types: tuple[str, ...] = ("cls", "patch"),
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(input_dim, num_heads, mlp_ratio, layer_scale) for _ in range(num_blocks))
        self.linear = nn.Linear(input_dim, output_dim)
        self.token_types = token_types

    def project(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """[B, 1 + N, D] -> [B, 1 + N, C]; of the tokens `kept`, [n] or [B, n], which read all of them, [B, n, C]."""
        *_, tokens = x, *run_blocks(self.blocks, x, last_dtype=product_dtype(x), last_kept=kept)
        return self.linear(tokens)

    def forward(self, tokens: Tokens, kept: Tensor | None = None, grid: tuple[int, int] | None = None) -> Projection:
        both = split_cls(self.project(tokens[max(tokens)], kept), self.has_cls)
        return {token: both[token] for token in self.token_types}

    def last_layers(self) -> dict[str, nn.Linear]:
        return dict.fromkeys(("cls", "patch") if self.has_cls else ("patch",), self.linear)


def transformer_projector(cfg: ProjectorConfig, student: StudentShape, teacher: TeacherFeatures) -> Projector:
    """See `projectors.base.KINDS`."""
    return TransformerProjector(
        student.embed_dim, teacher.channels, cfg.num_heads or student.num_heads, cfg.num_blocks, cfg.mlp_ratio,
        cfg.layer_scale, tuple(teacher.token_types),
    )  # fmt: skip
