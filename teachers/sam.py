"""Segment Anything's image encoder: under its release's names, with prompt encoder and decoder beside it, or Hugging
Face's.

Kirillov et al., "Segment Anything", ICCV 2023. timm's files of it are read too. An official run resizes the longer side
to 1024 pixels and pads the rest of the square after normalisation: here with `input_size: 1024`. Without it, images of
the student's size go in whole, positions resized.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from dune_fast.kernels.nn.sam import SAMConfig, SAMEncoder
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError, below
from dune_fast.teachers.foundation import renamed
from dune_fast.teachers.protocol import map_tokens
from dune_fast.teachers.vit import ViTTeacher, plain_norm

_TABLE = "attn.rel_pos_h"
_GLOBAL = {768: (2, 5, 8, 11), 1024: (5, 11, 17, 23), 1280: (7, 15, 23, 31)}


def _rows(state: Mapping[str, Tensor]) -> list[int]:
    """Rows of every block's table of relative positions."""
    names = [key for key in state if re.fullmatch(rf"blocks\.\d+\.{re.escape(_TABLE)}", key) and state[key].ndim]
    return [len(state[key]) for key in sorted(names, key=lambda key: int(key.split(".")[1]))]


class SAMTeacher(ViTTeacher):
    """Patches as the last block leaves them or, with `projected`, after the neck (256 channels)."""

    token_types = ("patch",)
    options = ("projected",)
    cls_token = False
    network = SAMEncoder
    sizes = {768: (12, 12, 4), 1024: (24, 16, 4), 1280: (32, 16, 4)}

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        names = (f"image_encoder.blocks.0.{_TABLE}", f"vision_encoder.layers.0.{_TABLE}", "blocks.0.mlp.lin1.weight")
        return any(name in keys for name in names)

    @classmethod
    def published_interpolation(cls, registers: int) -> tuple[float, bool]:
        return 0.0, False

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        inner = below(state, "image_encoder.") or below(state, "vision_encoder.") or dict(state)
        inner = renamed(inner, (
            (".mlp.lin1.", ".mlp.fc1."), (".mlp.lin2.", ".mlp.fc2."), ("patch_embed.projection.", "patch_embed.proj."),
            ("neck.conv1.", "neck.0."), ("neck.layer_norm1.", "neck.1."), ("neck.conv2.", "neck.2."),
            ("neck.layer_norm2.", "neck.3."), (".layer_norm", ".norm"), ("layers.", "blocks."),
        ))  # fmt: skip
        table = inner.get("pos_embed")
        if table is not None and table.ndim == 4:
            if table.shape[1] != table.shape[2]:
                raise TeacherWeightsError(f"{path} has positions of {list(table.shape)}; a square map is expected")
            inner["pos_embed"] = table.flatten(1, 2)
            windows = {n for n in _rows(inner) if n != 2 * table.shape[1] - 1}
            if len(windows) > 1 or not all(n % 2 for n in windows):
                raise TeacherWeightsError(
                    f"{path} has tables of relative positions of {sorted(windows)} rows beside the whole grid's "
                    f"{2 * table.shape[1] - 1}; those of one window are expected"
                )
        return inner

    @classmethod
    def reads(cls, name: str) -> bool:
        return name.endswith("pos_embed")

    @classmethod
    def variant(cls, plain: ViTConfig, state: Mapping[str, Tensor], cfg: TeacherConfig) -> ViTConfig:
        fields = asdict(plain) | {"final_norm": False}
        if not state:
            return SAMConfig(**fields, global_blocks=_GLOBAL[plain.embed_dim])
        rows, whole = _rows(state), 2 * (plain.image_size // plain.patch_size) - 1
        window = next(((n + 1) // 2 for n in rows if n != whole), SAMConfig.window)
        everywhere = tuple(i for i, n in enumerate(rows) if n == whole)
        neck = state.get("neck.0.weight")
        return SAMConfig(
            **fields, window=window, global_blocks=everywhere, neck=0 if neck is None or not neck.ndim else len(neck)
        )

    def channels(self) -> int:
        vit, cfg = self.trunk.vit, self.config
        if not cfg.projected:
            return self.trunk.num_features
        if not vit.cfg.neck:
            raise ValueError(f"teachers.{self.name}.projected is true, but {cfg.weights} has no neck; set it to false")
        if cfg.layer is not None:
            raise ValueError(f"teachers.{self.name}: the neck reads the last block; set layer to null")
        return vit.cfg.neck

    def tokens(self, features: dict[int, Tensor]) -> dict[str, Tensor]:
        x = features[self.block]  # [B, h, w, D]
        if self.config.projected:
            return {"patch": map_tokens(self.trunk.vit.neck(x.permute(0, 3, 1, 2)))}
        if self.config.layer is not None and self.config.norm:
            x = plain_norm(x)
        return {"patch": map_tokens(x, channels_last=True)}
