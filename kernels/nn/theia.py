"""The ViT of Theia's students, which is Hugging Face's ViT and DeiT: LayerNorm eps 1e-12, no LayerScale.

Two things differ from `vit.py` where they are asked for. Registers have positions of their own (`register_positions`,
added to them). Without a cls token the position table keeps the row that was for it, unread. Registers stand between
cls and patches, as in all encoders here, and not behind the patches as in Theia's own code: attention does not know an
order, so tokens are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig


@dataclass
class TheiaConfig(ViTConfig):
    """Architecture of a `TheiaViT`."""

    num_registers: int = 0
    """Register tokens; 7 in Theia's ablation."""
    layer_scale: float | None = None
    """Initial value of LayerScale's gamma; null for none."""
    interpolate_offset: float = 0.0
    """See `ViTConfig`."""
    norm_eps: float = 1e-12
    """Epsilon of every LayerNorm."""

    network_family: ClassVar[str] = "theia"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pos_embed != "learned":
            raise ValueError(f"Theia's encoder has a learned position table; pos_embed is {self.pos_embed!r}")


class TheiaViT(VisionTransformer):
    """See the top of the file; `forward` and `block_outputs` are `VisionTransformer`'s."""

    cfg: TheiaConfig
    config_class = TheiaConfig

    def __init__(self, cfg: TheiaConfig) -> None:
        super().__init__(cfg)
        patches = (cfg.image_size // cfg.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, cfg.embed_dim))
        if cfg.num_registers:
            self.register_positions = nn.Parameter(torch.zeros(1, cfg.num_registers, cfg.embed_dim))

    def init_weights(self) -> TheiaViT:
        """Truncated normal 0.02 for all weights, positions and tokens, the patch projection too; zero biases."""
        super().init_weights()
        tokens = [self.cls_token] if self.cfg.cls_token else []
        registers = [self.register_tokens, self.register_positions] if self.cfg.num_registers else []
        for parameter in (self.patch_embed.proj.weight, *tokens, *registers):
            nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.zeros_(self.patch_embed.proj.bias)
        return self

    table_prefix = 1

    def positions(self, height: int, width: int) -> Tensor:
        table = super().positions(height, width)
        return table if self.cfg.cls_token else table[:, 1:]

    def registers(self) -> Tensor:
        return self.register_tokens + self.register_positions
