"""SP, the simple projector: one MLP on every token, cls and patches alike."""

from __future__ import annotations

from torch import Tensor, nn

from dune_fast.projectors.base import Projection, Projector, StudentShape, TeacherFeatures, Tokens, split_cls
from dune_fast.projectors.config import ProjectorConfig


class SimpleProjector(Projector):
    """A token-wise MLP (Ranzinger et al., AM-RADIO, CVPR 2024). [B, 1 + N, D] -> [B, 1 + N, C]."""

    def __init__(
        self, input_dim: int, hidden_dim: int, output_dim: int, version: int = 2, num_inner: int = 0,
        token_types: tuple[str, ...] = ("cls", "patch"),
    ) -> None:  # fmt: skip
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"simple projector version {version}; choose 1 or 2")
        self.inner = num_inner if version == 2 else 0
        self.token_types = token_types
        layers: list[nn.Module] = [nn.Linear(input_dim, hidden_dim)]
        if version == 1:
            layers += [nn.LayerNorm(hidden_dim), nn.ReLU()]
            for _ in range(num_inner):
                layers += [nn.Linear(hidden_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.ReLU()]
        else:
            for _ in range(num_inner):
                layers += [nn.LayerNorm(hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim)]
            layers += [nn.LayerNorm(hidden_dim), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden_dim, output_dim))

    def project(self, x: Tensor) -> Tensor:
        """[B, 1 + N, D] -> [B, 1 + N, C]."""
        x = self.layers[0](x)
        for i in range(1, 1 + 3 * self.inner, 3):  # version 2: a residual around each
            x = x + self.layers[i : i + 3](x)
        return self.layers[1 + 3 * self.inner :](x)

    def forward(self, tokens: Tokens, kept: Tensor | None = None, grid: tuple[int, int] | None = None) -> Projection:
        both = split_cls(self.project(tokens[max(tokens)]), self.has_cls)
        return {token: both[token] for token in self.token_types}

    def last_layers(self) -> dict[str, nn.Linear]:
        return dict.fromkeys(("cls", "patch") if self.has_cls else ("patch",), self.layers[-1])


def simple_projector(cfg: ProjectorConfig, student: StudentShape, teacher: TeacherFeatures) -> Projector:
    """See `projectors.base.KINDS`."""
    return SimpleProjector(
        student.embed_dim, cfg.hidden_dim, teacher.channels, cfg.version, cfg.num_inner, tuple(teacher.token_types)
    )
