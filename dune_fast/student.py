"""The student: an encoder, and one projector a teacher, which is thrown away after distillation.

    TP  transformer projector (DUNE): one block over [cls, patches], then a linear layer
    LP  ladder of projectors (UNIC): an own MLP per teacher, token type and chosen block, summed over the blocks
    SP  simple projector (AM-RADIO): an MLP on every token, version 1 or 2

A projector maps {block index: tokens [B, 1 + N, D]} (cls first, registers left out) to {"cls": [B, C], "patch":
[B, N, C]}; `blocks` says which block outputs it reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dune_fast.kernels.nn.block import Block, init_linear, product_dtype, run_blocks
from dune_fast.kernels.nn.patches import SharedPatches
from dune_fast.kernels.nn.routing import OwnPatches, PatchSubset, Routes, select
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig

Tokens = Mapping[int, Tensor]
Projection = dict[str, Tensor]


@dataclass
class ProjectorConfig:
    """Which projector stands between the student and every teacher."""

    kind: str = "tp"
    """"tp", "lp" or "sp"."""
    num_blocks: int = 1
    """TP: transformer blocks before the linear layer."""
    num_heads: int | None = None
    """TP: attention heads; as many as the student's by default."""
    mlp_ratio: float = 4.0
    """TP: hidden channels of the block's MLP over the student's channels."""
    layer_scale: float | None = 1e-4
    """TP: initial LayerScale."""
    which_blocks: list[int] = field(default_factory=list)
    """LP: encoder blocks that carry a projector, from 0; empty for all."""
    hidden_dim: int = 768
    """LP and SP: hidden channels (LP: of every block but the last)."""
    last_hidden_dim: int = 3072
    """LP: hidden channels at the encoder's last block."""
    prenorm: bool = False
    """LP: LayerNorm before the first linear layer."""
    midnorm: bool = False
    """LP: LayerNorm after the first linear layer."""
    version: int = 2
    """SP: 1 = Linear LN ReLU Linear; 2 = Linear [LN GELU Linear] x num_inner, LN GELU Linear."""
    num_inner: int = 0
    """SP version 2: inner layers."""


def split_cls(x: Tensor) -> Projection:
    """[B, 1 + N, C] -> cls [B, C] and patch [B, N, C], views."""
    cls, patch = x.split([1, x.shape[1] - 1], dim=1)  # one cat in the backward, where two slices fill and add
    return {"cls": cls.squeeze(1), "patch": patch}


class TransformerProjector(nn.Module):
    """TP: transformer blocks, then Linear(D -> C). The linear layers keep PyTorch's default initialisation."""

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        num_heads: int,
        num_blocks: int = 1,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-4,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(input_dim, num_heads, mlp_ratio, layer_scale) for _ in range(num_blocks))
        self.linear = nn.Linear(input_dim, output_dim)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """[B, 1 + N, D] -> [B, 1 + N, C]; of the tokens `kept`, [n] or [B, n], which read all of them, [B, n, C]."""
        *_, tokens = x, *run_blocks(self.blocks, x, last_dtype=product_dtype(x), last_kept=kept)
        return self.linear(tokens)


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


class LadderProjector(nn.Module):
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

    def forward(self, tokens: Tokens) -> Projection:
        """{block: [B, 1 + N, D]} -> {"cls": [B, C], "patch": [B, N, C]}."""
        parts = {block: split_cls(x) for block, x in tokens.items()}
        projection = {}
        for token in self.token_types:
            rungs = [rung(parts[int(block)][token]) for block, rung in getattr(self, token).items()]
            projection[token] = torch.stack(rungs).sum(0) if len(rungs) > 1 else rungs[0]
        return projection


class SimpleProjector(nn.Module):
    """SP: a token-wise MLP (Ranzinger et al., AM-RADIO, CVPR 2024). [B, 1 + N, D] -> [B, 1 + N, C]."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, version: int = 2, num_inner: int = 0) -> None:
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"simple projector version {version}; choose 1 or 2")
        layers: list[nn.Module] = [nn.Linear(input_dim, hidden_dim)]
        if version == 1:
            layers += [nn.LayerNorm(hidden_dim), nn.ReLU()]
        else:
            for _ in range(num_inner):
                layers += [nn.LayerNorm(hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim)]
            layers += [nn.LayerNorm(hidden_dim), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden_dim, output_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Projectors(nn.ModuleDict):
    """One projector a teacher, all of one kind; ValueError for a kind that is not known, or blocks that are not there.

    Args:
        embed_dim, depth, num_heads: of the student.
        teachers: name -> (channels, token types) of the teacher's features.
    """

    def __init__(
        self,
        cfg: ProjectorConfig,
        embed_dim: int,
        depth: int,
        num_heads: int,
        teachers: Mapping[str, tuple[int, Sequence[str]]],
    ) -> None:
        super().__init__()
        last = depth - 1
        self.kind = cfg.kind
        self.token_types = {name: tuple(tokens) for name, (_, tokens) in teachers.items()}
        self.blocks = (cfg.which_blocks or list(range(depth))) if cfg.kind == "lp" else [last]
        if any(not 0 <= i <= last for i in self.blocks):
            raise ValueError(f"projector.which_blocks {self.blocks}: the student's blocks are 0 to {last}")
        for name, (channels, token_types) in teachers.items():
            if cfg.kind == "tp":
                self[name] = TransformerProjector(
                    embed_dim, channels, cfg.num_heads or num_heads, cfg.num_blocks, cfg.mlp_ratio, cfg.layer_scale
                )
            elif cfg.kind == "sp":
                self[name] = SimpleProjector(embed_dim, cfg.hidden_dim, channels, cfg.version, cfg.num_inner)
            elif cfg.kind == "lp":
                hidden = [cfg.last_hidden_dim if i == last else cfg.hidden_dim for i in self.blocks]
                self[name] = LadderProjector(
                    embed_dim, channels, self.blocks, hidden, cfg.prenorm, cfg.midnorm, token_types
                )
            else:
                raise ValueError(f"projector kind {cfg.kind!r}; choose 'tp', 'lp' or 'sp'")

    def forward(
        self, tokens: Tokens, routes: Routes | None = None, subset: PatchSubset | OwnPatches | None = None
    ) -> dict[str, Projection]:
        """{block: [B, 1 + N, D]} -> teacher -> token type -> [B, C] or [B, N, C], of the teacher's images if routed.

        Of a subset of the patches if there is one: then token-wise projectors see no others.

        A projector without images runs on the batch's first one and gives none of its tokens: no operation has to take
        an empty batch, and every parameter gets a gradient, of zeros.
        """
        projections = {}
        last = tokens[self.blocks[-1]]
        kept = None if subset is None else subset.with_cls(last.shape[1] - 1, last.device)
        if self.kind != "tp":
            tokens = {block: select(x, kept) for block, x in tokens.items()}
        for name, projector in self.items():
            own, own_kept, nothing = tokens, kept, False
            if routes is not None:
                route = routes[name]
                nothing = not len(route)
                own = {block: x[:1] if nothing else route.take(x) for block, x in tokens.items()}
                if kept is not None and kept.ndim == 2:
                    own_kept = kept[:1] if nothing else route.take(kept)
            if self.kind == "lp":
                projection = projector(own)
            else:
                inside = (own_kept,) if self.kind == "tp" else ()  # its blocks read all tokens
                both = split_cls(projector(own[self.blocks[-1]], *inside))
                projection = {token: both[token] for token in self.token_types[name]}
            projections[name] = {token: x[:0] for token, x in projection.items()} if nothing else projection
        return projections


class Student(nn.Module):
    """Encoder and projectors. images [B, 3, H, W] -> teacher -> token type -> [B, C] or [B, N, C].

    The projectors take un-normalised [cls, patches] without the registers, so no loss reaches the encoder's final norm:
    it is frozen at gamma = 1, beta = 0.

    `autocast_dtype` is the type of its matrix products; weights, norms and residuals stay float32. It lives here, not
    around the call: DeepSpeed's engine switches an outer autocast off. None: float32 throughout.
    """

    autocast_dtype: torch.dtype | None = None

    def compute_in(self, autocast_dtype: torch.dtype | None, stream: str = "fp32") -> None:
        """Sets the types: of products, and of tokens between blocks, "fp32" or "bf16" (where products are bf16)."""
        self.autocast_dtype = autocast_dtype
        bf16 = stream == "bf16" and autocast_dtype is torch.bfloat16
        self.encoder.stream_dtype = torch.bfloat16 if bf16 else None

    def __init__(
        self, encoder: ViTConfig, projector: ProjectorConfig, teachers: Mapping[str, tuple[int, Sequence[str]]]
    ) -> None:
        super().__init__()
        if not encoder.cls_token:
            raise ValueError("the student needs a cls token: the projectors' input is [cls, patches]")
        self.encoder = VisionTransformer(encoder)
        self.encoder.norm.requires_grad_(False)
        self.projectors = Projectors(projector, encoder.embed_dim, encoder.depth, encoder.num_heads, teachers)

    def compile_blocks(self, **options: Any) -> None:
        """`torch.compile`, with its options, of every block on its own, in place: parameters keep their names."""
        for module in self.modules():
            if isinstance(module, Block):
                module.compile(**{"dynamic": False, **options})

    def tokens(self, images: Tensor, patches: SharedPatches | None = None) -> dict[int, Tensor]:
        """[cls, patches] after the blocks that the projectors read: block -> un-normalised [B, 1 + N, D]."""
        outputs = self.encoder.block_outputs(images, self.projectors.blocks, patches)
        prefix = self.encoder.num_prefix_tokens
        if prefix == 1:
            return outputs
        return {i: torch.cat([x[:, :1], x[:, prefix:]], dim=1) for i, x in outputs.items()}

    def forward(
        self, images: Tensor, routes: Routes | None = None, patches: SharedPatches | None = None,
        subset: PatchSubset | OwnPatches | None = None,
    ) -> dict[str, Projection]:  # fmt: skip
        """`routes`: which of the images each teacher's projector gets, all by default; `patches`: the step's; `subset`:
        of the patches that are projected, all by default."""
        with torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self.projectors(self.tokens(images, patches), routes, subset)


def build_student(
    encoder: ViTConfig, projector: ProjectorConfig, teachers: Mapping[str, tuple[int, Sequence[str]]], seed: int = 0
) -> Student:
    """A student with initial weights that are a function of the configuration and `seed` alone.

    `teachers`: name -> (channels, token types) of its features.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        student = Student(encoder, projector, teachers)
        student.encoder.init_weights()
    return student
