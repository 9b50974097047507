"""One pre-norm Vision Transformer for student, teachers and transformer projectors.

    x = x + ls1 * Attention(LN(x));  x = x + ls2 * MLP(LN(x))

with optional cls and register tokens, LayerScale, RoPE2D instead of a position table, and a final norm. The order of
tokens is [cls, registers, patches]; positions are added to [cls, patches], the registers get none (Darcet et al.,
"Vision Transformers Need Registers", ICLR 2024). Parameter names are those of DINOv2's releases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.kernels.nn.block import (
    LAYER_NORM_EPS,
    MLP_KINDS,
    Block,
    LayerNorm,
    init_linear,
    product_dtype,
    run_blocks,
)
from dune_fast.kernels.nn.dinov2_interface import DINOv2Interface
from dune_fast.kernels.nn.draws import StepDraws
from dune_fast.kernels.nn.patches import PatchEmbed, SharedPatches
from dune_fast.kernels.rope2d import grid_positions, rope2d_angles


@dataclass
class ViTConfig:
    """Architecture of a Vision Transformer."""

    image_size: int = 336
    """Square input, in pixels, that the position table is made for; other sizes are interpolated."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    embed_dim: int = 768
    """Channels of a token."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads of a block."""
    mlp_ratio: float = 4.0
    """Hidden channels of the MLP over `embed_dim`; SwiGLU has two thirds of them, rounded up to a multiple of 8."""
    num_registers: int = 4
    """Register tokens between cls and patches."""
    layer_scale: float | None = 1e-4
    """Initial value of LayerScale's gamma; null for none."""
    cls_token: bool = True
    """Whether a class token leads the sequence."""
    pos_embed: str = "learned"
    """"learned" (a table, interpolated bicubically) or "rope2d" (rotary, no table)."""
    interpolate_offset: float = 0.1
    """Interpolation of the table: above 0 by the scale factor (n + offset) / M, as the published student; 0 by size."""
    interpolate_antialias: bool = False
    """Antialiased interpolation of the table, as the register models of DINOv2's release."""
    final_norm: bool = True
    """Whether there is a LayerNorm after the last block."""
    mlp: str = "gelu"
    """"gelu" (two linear layers) or "swiglu" (gated, as DINOv2's ViT-g)."""

    mlp_kinds: ClassVar[tuple[str, ...]] = MLP_KINDS
    norm_eps: ClassVar[float] = LAYER_NORM_EPS

    def __post_init__(self) -> None:
        if self.mlp not in self.mlp_kinds:
            raise ValueError(f"mlp is {self.mlp!r}; choose one of {', '.join(self.mlp_kinds)}")
        if self.pos_embed not in ("learned", "rope2d"):
            raise ValueError(f"pos_embed is {self.pos_embed!r}; choose 'learned' or 'rope2d'")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}; "
                f"the nearest are {nearest_multiples(self.image_size, self.patch_size)}"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")


def plain(cfg: ViTConfig) -> ViTConfig:
    """The fields that a `ViTConfig` has, of a configuration that may have more."""
    return ViTConfig(**{f.name: getattr(cfg, f.name) for f in fields(ViTConfig)})


def nearest_multiples(size: int, step: int) -> str:
    """The multiples of `step` on both sides of `size`, for error messages: "98 and 112"."""
    below = size // step * step
    return f"{below} and {below + step}" if below > 0 else str(step)


def resize_positions(
    table: Tensor, height: int, width: int, prefix: int = 1, offset: float = 0.1, antialias: bool = False
) -> Tensor:
    """A position table [1, prefix + M * M, D] for another grid, [1, prefix + height * width, D], bicubic.

    The table itself where it is for this grid. `prefix` entries stand for no patch; `offset` and `antialias` are
    `ViTConfig.interpolate_offset` and `interpolate_antialias`.
    """
    count = table.shape[1] - prefix
    if count == height * width and height == width:
        return table
    side = math.isqrt(count)
    # The published student divides (n + 0.1) by M and hands the factor on: the sampling points differ slightly from
    # those of interpolation to a size, and trained tables are tied to them.
    target = (
        {"scale_factor": ((height + offset) / side, (width + offset) / side)} if offset else {"size": (height, width)}
    )
    patches = table[:, prefix:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, mode="bicubic", antialias=antialias, **target)
    assert patches.shape[-2:] == (height, width), (patches.shape, height, width)
    return torch.cat([table[:, :prefix], patches.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


class VisionTransformer(DINOv2Interface, nn.Module):
    """The encoder.

    Tokens that leave `forward_tokens` and `block_outputs` are not normalised: the distillation's projectors take them
    like that. `forward` applies the final norm and returns the dictionary that users of DINOv2 know.
    """

    config_class: ClassVar[type[ViTConfig]] = ViTConfig
    """Type of `cfg`."""
    activation_checkpointing = False
    """Whether the backward pass computes each block again instead of keeping what is inside."""
    stream_dtype: torch.dtype | None = None
    """Type of the tokens between blocks; None for the embedding's."""
    autocast_dtype: torch.dtype | None = None
    """Type of the products where task heads ask for tokens, `dune_fast.heads.tokens`; None for the caller's own."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        dim = cfg.embed_dim
        self.patch_embed = PatchEmbed(cfg.patch_size, dim)
        if cfg.cls_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if cfg.pos_embed == "learned":
            patches = (cfg.image_size // cfg.patch_size) ** 2
            self.pos_embed = nn.Parameter(torch.zeros(1, int(cfg.cls_token) + patches, dim))
        if cfg.num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, cfg.num_registers, dim))
        self.blocks = nn.ModuleList(
            Block(dim, cfg.num_heads, cfg.mlp_ratio, cfg.layer_scale, cfg.mlp, cfg.norm_eps) for _ in range(cfg.depth)
        )
        self.norm = LayerNorm(dim, eps=cfg.norm_eps) if cfg.final_norm else nn.Identity()

    @classmethod
    def for_student(cls, cfg: ViTConfig, num_cls: int) -> VisionTransformer:
        """See `kernels.nn.encoders.ENCODERS`."""
        if num_cls != int(cfg.cls_token):
            given = f"student.cls_per_teacher asks for {num_cls} cls tokens, and this student.family has one"
            raise ValueError(f"{given}: set it to false, or choose student.family=radio")
        return cls(cls.config_class(**asdict(plain(cfg))))

    def init_weights(self) -> VisionTransformer:
        """Draws the student's initial weights from torch's generator; see `dune_fast.student.build_student`.

        Truncated normal 0.02 for linear weights and positions, zero biases, 1e-6 normal for cls and registers; the
        patch projection keeps PyTorch's default.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)
        if self.cfg.pos_embed == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cfg.cls_token:
            nn.init.normal_(self.cls_token, std=1e-6)
        if self.cfg.num_registers:
            nn.init.normal_(self.register_tokens, std=1e-6)
        return self

    @property
    def num_cls(self) -> int:
        """Tokens of classes or summaries, which come first."""
        return int(self.cfg.cls_token)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: cls and registers."""
        return self.num_cls + self.cfg.num_registers

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images [B, 3, H, W]; ValueError if H or W is not a multiple of the patch."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"the encoder takes images of shape [B, 3, H, W], got {list(images.shape)}")
        height, width = images.shape[-2:]
        patch = self.cfg.patch_size
        for name, size in (("height", height), ("width", width)):
            if size % patch or size == 0:
                raise ValueError(
                    f"image {name} {size} is not a multiple of the patch size {patch}; "
                    f"the nearest are {nearest_multiples(size, patch)}"
                )
        return height // patch, width // patch

    @property
    def table_prefix(self) -> int:
        """Rows of the position table that stand for no patch."""
        return int(self.cfg.cls_token)

    def registers(self) -> Tensor:
        """What the registers are before the first block, [1, R, D]."""
        return self.register_tokens

    def positions(self, height: int, width: int) -> Tensor:
        """The position table for a grid of height x width patches, [1, cls + height * width, D]."""
        cfg = self.cfg
        return resize_positions(
            self.pos_embed, height, width, self.table_prefix, cfg.interpolate_offset, cfg.interpolate_antialias
        )

    def embed(self, images: Tensor, patches: SharedPatches | None = None, draws: StepDraws | None = None) -> Tensor:
        """Images [B, 3, H, W] to the tokens before the first block, [B, P + N, D]; see `block_outputs`."""
        height, width = self.grid(images)
        x = self.patch_embed(images, patches)
        if self.cfg.pos_embed != "learned":
            return x  # RoPE2D has no cls and register tokens, see `rope`
        # cls and registers come with the table, onto rows of zeros: one pass pads, one adds, and no token is rounded to
        # the patches' type
        table, at = self.positions(height, width), int(self.cfg.cls_token)
        cls = [self.cls_token + table[:, :1]] if self.cfg.cls_token else []
        registers = [self.registers()] if self.cfg.num_registers else []
        return F.pad(x, (0, 0, self.num_prefix_tokens, 0)) + torch.cat([*cls, *registers, table[:, at:]], dim=1)

    def stream(self, x: Tensor) -> torch.dtype:
        """Type of the tokens between blocks, for such as x; products in float32 have a stream in float32."""
        return x.dtype if self.stream_dtype is None or product_dtype(x) == torch.float32 else self.stream_dtype

    def rope(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """Angles of RoPE2D for the grid of these images; None where a table holds the positions."""
        if self.cfg.pos_embed != "rope2d":
            return None
        if self.num_prefix_tokens:
            raise ValueError("RoPE2D has no position for cls and register tokens: set cls_token false, num_registers 0")
        positions = grid_positions(*self.grid(images), device=images.device)
        return rope2d_angles(positions, self.cfg.embed_dim // self.cfg.num_heads)

    def block_outputs(
        self, images: Tensor, blocks: Sequence[int], patches: SharedPatches | None = None,
        draws: StepDraws | None = None,
    ) -> dict[int, Tensor]:  # fmt: skip
        """Un-normalised tokens [B, P + N, D] after chosen blocks, by index; ValueError for a block that there is not.

        Args:
            images: [B, 3, H, W].
            blocks: indices from 0; -1 is the embedding before the first block. No block beyond the largest is run.
            patches: shared with the other networks of a step, see `PatchEmbed`.
            draws: random numbers of a training step, for a network that takes some; None in evaluation.
        """
        unknown = [i for i in blocks if not -1 <= i < len(self.blocks)]
        if unknown or not blocks:
            depth = len(self.blocks)
            raise ValueError(f"blocks {list(blocks)} of an encoder with {depth}: give some of -1 .. {depth - 1}")
        x = self.embed(images, patches, draws)
        x = x.to(self.stream(x))
        outputs = {-1: x} if -1 in blocks else {}
        return outputs | self.run(x, blocks, images, draws)

    def run(
        self, x: Tensor, blocks: Sequence[int], images: Tensor, draws: StepDraws | None = None
    ) -> dict[int, Tensor]:
        """Un-normalised tokens [B, P + N, D] after chosen blocks, by index, of the embedding x; see `block_outputs`."""
        rope = self.rope(images)
        tokens = run_blocks(self.blocks[: max(blocks) + 1], x, rope, self.activation_checkpointing)
        return {i: after for i, after in enumerate(tokens) if i in blocks}

    def forward_tokens(self, images: Tensor) -> Tensor:
        """Un-normalised tokens after the last block, [B, P + N, D]."""
        last = len(self.blocks) - 1
        return self.block_outputs(images, [last])[last]

    def without_registers(self, tokens: Tensor) -> Tensor:
        """[cls, patches] of all tokens [B, P + N, D]."""
        if self.num_prefix_tokens == self.num_cls:
            return tokens
        return torch.cat([tokens[:, : self.num_cls], tokens[:, self.num_prefix_tokens :]], dim=1)

    def split(self, tokens: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Tokens [B, P + N, D] into (cls [B, D] or None, registers [B, R, D], patches [B, N, D]), views."""
        at = int(self.cfg.cls_token)
        cls = tokens[:, 0] if self.cfg.cls_token else None
        return cls, tokens[:, at : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]

    def forward(self, images: Tensor, apply_norm: bool = True) -> dict[str, Tensor]:
        """Features of images [B, 3, H, W], normalised as `transform` does, by DINOv2's names.

        `x_norm_clstoken` [B, D] (where there is a cls token), `x_norm_regtokens` [B, R, D], `x_norm_patchtokens`
        [B, N, D], `x_prenorm` [B, P + N, D]. Without `apply_norm` the same names hold the tokens before the final norm,
        as DUNE's projectors read them.
        """
        tokens = self.forward_tokens(images)
        cls, registers, patches = self.normed_parts(tokens) if apply_norm else self.split(tokens)
        features = {"x_norm_regtokens": registers, "x_norm_patchtokens": patches, "x_prenorm": tokens}
        return features if cls is None else {"x_norm_clstoken": cls, **features}
