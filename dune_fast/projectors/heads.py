"""Heads: a network of its own for the cls token and one for the patches, as RADIO's adaptors and EUPE's heads.

    v1    Linear, LN, ReLU, [Linear, LN, ReLU] x n, Linear
    v2    [LN, GELU], Linear, x + Linear(GELU(LN(x))) n times, LN, GELU, Linear
    attn  two transformer blocks without bias of qkv, then v2 with n = 0

A v2 head with `upsample` u gives u x u tokens for each patch: its last layer has C u^2 channels (u rows, u columns, C).
Names of the weights are those of RADIO's containers.
"""

from __future__ import annotations

from torch import Tensor, nn

from dune_fast.kernels.nn.block import Block, LayerNorm, Linear, run_blocks
from dune_fast.projectors.base import Projector, SeparateTokens, StudentShape, TeacherFeatures
from dune_fast.projectors.config import HeadShape, ProjectorConfig

ATTENTION_HEADS = 16
"""Of a block of version "attn"."""
LAYER_SCALE = 1e-5
"""Initial LayerScale of these blocks."""
_EPS = 1e-5


def unfolded(x: Tensor, factor: int, grid: tuple[int, int]) -> Tensor:
    """[B, h w, u u C], of a grid h x w, as tokens of the finer one, row-major: [B, (h u) (w u), C]."""
    if factor == 1:
        return x
    rows, columns = grid
    x = x.unflatten(-1, (factor, factor, -1)).unflatten(1, (rows, columns))  # [B, h, w, u, u, C]
    return x.transpose(2, 3).flatten(1, 4)


class HeadV1(nn.Module):
    """See the head of this file. [..., D] -> [..., C]."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.norm = LayerNorm(hidden_dim, eps=_EPS)
        layers: list[nn.Module] = []
        for _ in range(num_inner):
            layers += [nn.Linear(hidden_dim, hidden_dim), LayerNorm(hidden_dim, eps=_EPS), nn.ReLU()]
        self.inner = nn.Sequential(*layers)
        self.fc2 = nn.Linear(hidden_dim, output_dim)

    upsample = 1
    last = property(lambda self: self.fc2, doc="The last linear layer.")

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return self.fc2(self.inner(self.norm(self.fc1(x)).relu()))


class HeadV2(nn.Module):
    """See the head of this file. [..., D] -> [..., C], or [B, h w, D] -> [B, (h u) (w u), C]."""

    def __init__(
        self, input_dim: int, hidden_dim: int, output_dim: int, num_inner: int = 0, prenorm: bool = False,
        bias: bool = True, upsample: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.upsample = upsample
        if prenorm:
            self.pre_norm = nn.Sequential(LayerNorm(input_dim, eps=_EPS), nn.GELU())
        self.fc1 = nn.Linear(input_dim, hidden_dim, bias=bias)
        self.blocks = nn.ModuleList(
            nn.Sequential(LayerNorm(hidden_dim, eps=_EPS), nn.GELU(), nn.Linear(hidden_dim, hidden_dim))
            for _ in range(num_inner)
        )
        last = nn.Linear(hidden_dim, output_dim * upsample**2, bias=bias)
        if bias and upsample > 1:
            nn.init.zeros_(last.bias)
        self.final = nn.Sequential(LayerNorm(hidden_dim, eps=_EPS), nn.GELU(), last)

    last = property(lambda self: self.final[2], doc="The last linear layer.")

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        x = self.fc1(self.pre_norm(x) if hasattr(self, "pre_norm") else x)
        for block in self.blocks:
            x = x + block(x)
        x = self.final(x)
        return x if self.upsample == 1 else unfolded(x, self.upsample, grid or _square(x.shape[1]))


class AttentionHead(nn.Module):
    """See the head of this file. [B, N, D] -> [B, N', C]."""

    def __init__(self, input_dim: int, mlp: HeadV2, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(input_dim, ATTENTION_HEADS, layer_scale=LAYER_SCALE, norm_eps=norm_eps) for _ in range(2)
        )
        for block in self.blocks:
            block.attn.qkv = Linear(input_dim, 3 * input_dim, bias=False)
        self.mlp = mlp

    upsample = property(lambda self: self.mlp.upsample, doc="See `HeadV2`.")
    last = property(lambda self: self.mlp.last, doc="The last linear layer.")

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None, kept: Tensor | None = None) -> Tensor:
        """`kept`: of the tokens, [n] or [B, n], those that are asked for."""
        *_, x = run_blocks(self.blocks, x, last_kept=kept)
        return self.mlp(x, grid)


def _square(tokens: int) -> tuple[int, int]:
    """The grid of a square image's patches."""
    side = round(tokens**0.5)
    if side**2 != tokens:
        raise ValueError(f"a head with upsample got {tokens} patches of an image that is no square: give its grid")
    return side, side


def build_head(shape: HeadShape, input_dim: int, output_dim: int) -> HeadV1 | HeadV2 | AttentionHead:
    """One head with drawn weights."""
    hidden = shape.hidden_dim * shape.upsample
    hidden = min(hidden, max(shape.upsample_rank, shape.hidden_dim)) if shape.upsample_rank else hidden
    if shape.version == "v1":
        return HeadV1(input_dim, hidden, output_dim, shape.num_inner)
    attn = shape.version == "attn"
    inner = 0 if attn else shape.num_inner
    mlp = HeadV2(input_dim, hidden, output_dim, inner, shape.prenorm, shape.bias, shape.upsample)
    return AttentionHead(input_dim, mlp) if attn else mlp


class SeparateHeads(SeparateTokens):
    """`cls` and `patch`: a head for each of the teacher's token types."""

    def __init__(self, cfg: ProjectorConfig, student: StudentShape, teacher: TeacherFeatures) -> None:
        super().__init__(student, teacher)
        if cfg.cls_head.version == "attn" or cfg.cls_head.upsample > 1:
            raise ValueError("projector.cls_head reads one token: choose version v1 or v2, and upsample=1")
        if student.embed_dim % ATTENTION_HEADS and cfg.patch_head.version == "attn":
            raise ValueError(
                f"projector.patch_head.version=attn has {ATTENTION_HEADS} attention heads, and the student's "
                f"{student.embed_dim} channels are no multiple of them"
            )
        shapes = {"cls": cfg.cls_head, "patch": cfg.patch_head}
        for token in teacher.token_types:
            self.add_module(token, build_head(shapes[token], student.embed_dim, teacher.channels))

    @property
    def reads_all_tokens(self) -> bool:
        return isinstance(getattr(self, "patch", None), AttentionHead)

    def patches(self, x: Tensor, kept: Tensor | None, grid: tuple[int, int] | None) -> Tensor:
        return self.patch(x, grid) if kept is None else self.patch(x, grid, kept)

    def last_layers(self) -> dict[str, nn.Linear]:
        if "patch" in self.token_types and self.patch.upsample > 1:
            raise ValueError(
                "start.fit_projectors fits one output for each patch, and a head with upsample gives several: set it "
                "to false"
            )
        return {token: getattr(self, token).last for token in self.token_types}


def separate_heads(cfg: ProjectorConfig, student: StudentShape, teacher: TeacherFeatures) -> Projector:
    """See `projectors.base.KINDS`."""
    return SeparateHeads(cfg, student, teacher)
