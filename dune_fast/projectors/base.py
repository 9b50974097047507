"""What all projectors have in common.

A projector maps {block index: tokens [B, 1 + N, D]} to {"cls": [B, C], "patch": [B, N', C]} or one of them. Tokens are
the teacher's cls token, then the patches; registers are left out. A student without a cls token gives [B, N, D]. N' is
N, but for projectors that give the teacher's own grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from dune_fast.projectors.config import ProjectorConfig

Tokens = Mapping[int, Tensor]
"""Block index -> tokens; -1 is the embedding before the first block."""
Projection = dict[str, Tensor]

KINDS = {
    "tp": "dune_fast.projectors.transformer:transformer_projector",
    "lp": "dune_fast.projectors.ladder:ladder_projector",
    "sp": "dune_fast.projectors.simple:simple_projector",
    "heads": "dune_fast.projectors.heads:separate_heads",
    "sak": "dune_fast.projectors.sak:level_projector",
    "theia": "dune_fast.projectors.theia:theia_translator",
}
"""Kind -> module and function (cfg, student, teacher) -> `Projector`, imported when asked for."""

SHARED = {"sak": "dune_fast.projectors.sak:adapter_chain"}
"""Kind whose teachers of one source have layers in common -> module and function (cfg, student) -> these: they make
tokens {block: [B, K + N, D]} for the projectors of that source, of the student's tokens."""


class TeacherFeatures(NamedTuple):
    """What one teacher gives."""

    channels: int
    token_types: Sequence[str]
    source: str = ""
    """Teachers of one source belong together: they read one summary token. Empty for a teacher by itself."""
    grid: int = 0
    """Rows and columns of its patches, where they stay on the teacher's own grid; 0 for the student's."""
    place: int = 0
    """Which of its source's teachers it is, in their order, see `placed`."""


@dataclass(frozen=True)
class StudentShape:
    """What projectors have to know of the student."""

    embed_dim: int
    depth: int
    num_heads: int
    cls: bool = True
    """Whether a cls token leads the tokens."""
    grid: int = 0
    """Rows and columns of patches of the images that it is made for; 0 where nobody needs it."""


class Projector(nn.Module):
    """One teacher's projector."""

    reads_all_tokens: ClassVar[bool] = False
    """Whether an output depends on other tokens than its own, so that a subset is taken inside."""
    has_cls = True
    """Whether a cls token leads the student's tokens; set by `build_projector`."""

    def forward(self, tokens: Tokens, kept: Tensor | None = None, grid: tuple[int, int] | None = None) -> Projection:
        """See the head of this file.

        Args:
            kept: of the tokens, int64 [n] or [B, n], those that are asked for; only where it `reads_all_tokens`.
            grid: rows and columns of the patches; None where the images are squares.
        """
        raise NotImplementedError

    def share(self, first: Projector) -> None:
        """Takes what all teachers' projectors have in common of the first teacher's, which owns it."""

    def last_layers(self) -> dict[str, nn.Linear]:
        """Token type -> the linear layer whose output is the projection, to be fitted in closed form.

        What else is added to a projection is set to 0. ValueError where there is no such layer.
        """
        raise NotImplementedError


class SeparateTokens(Projector):
    """Reads the last block: `cls` is a network of the cls token, `patch` one of the patches, where a teacher has them.
    """

    def __init__(self, student: StudentShape, teacher: TeacherFeatures) -> None:
        super().__init__()
        if "cls" in teacher.token_types and not student.cls:
            raise ValueError("a teacher's cls tokens are asked for, but the student has no cls token")
        self.token_types = tuple(teacher.token_types)

    def forward(self, tokens: Tokens, kept: Tensor | None = None, grid: tuple[int, int] | None = None) -> Projection:
        x, first = tokens[max(tokens)], int(self.has_cls)
        projection = {"cls": self.cls(x[:, 0])} if "cls" in self.token_types else {}
        if "patch" in self.token_types:
            kept = None if kept is None else kept[..., first:] - first
            projection["patch"] = self.patches(x[:, first:], kept, grid)
        return projection

    def patches(self, x: Tensor, kept: Tensor | None, grid: tuple[int, int] | None) -> Tensor:
        """Of the patches [B, N, D], or of those `kept` that read all of them."""
        raise NotImplementedError


def split_cls(x: Tensor, has_cls: bool = True) -> Projection:
    """[B, 1 + N, C] -> cls [B, C] and patch [B, N, C], views; without a cls token all are patches."""
    if not has_cls:
        return {"patch": x}
    cls, patch = x.split([1, x.shape[1] - 1], dim=1)  # one cat in the backward, where two slices fill and add
    return {"cls": cls.squeeze(1), "patch": patch}


def placed(teachers: Mapping[str, Sequence[Any]]) -> dict[str, TeacherFeatures]:
    """Features with their sources, each its own teacher's name by default, and their places."""
    found: dict[str, TeacherFeatures] = {}
    for name, given in teachers.items():
        features = TeacherFeatures(*given)
        source = features.source or name
        found[name] = features._replace(source=source, place=sum(other.source == source for other in found.values()))
    return found


def blocks_read(cfg: ProjectorConfig, depth: int) -> list[int]:
    """Blocks of a student whose tokens the projectors read, -1 for the embedding; ValueError for one that there is not.
    """
    chosen = list(cfg.which_blocks or range(depth))
    if cfg.kind not in ("lp", "sak"):
        return [depth - 1]
    if any(not 0 <= i < depth for i in chosen):
        raise ValueError(f"projector.which_blocks {chosen}: the student's blocks are 0 to {depth - 1}")
    return chosen if cfg.kind == "lp" else list(range(-1, max(chosen) + 1))


def shared_layers(cfg: ProjectorConfig, student: StudentShape, sources: Iterable[str]) -> nn.ModuleDict:
    """Source -> what its projectors have in common, see `SHARED`; empty for most kinds."""
    if cfg.kind not in SHARED:
        return nn.ModuleDict()
    build = _imported(SHARED[cfg.kind])
    return nn.ModuleDict({source: build(cfg, student) for source in dict.fromkeys(sources)})


def build_projector(cfg: ProjectorConfig, student: StudentShape, teacher: TeacherFeatures) -> Projector:
    """One teacher's projector with drawn weights. ValueError for a kind that there is not."""
    if cfg.kind not in KINDS:
        raise ValueError(f"projector kind {cfg.kind!r}; choose one of {', '.join(KINDS)}")
    projector = _imported(KINDS[cfg.kind])(cfg, student, teacher)
    projector.has_cls = student.cls
    return projector


def _imported(address: str) -> Callable[..., Any]:
    module, _, name = address.partition(":")
    return getattr(import_module(module), name)
