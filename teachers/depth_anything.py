"""Depth Anything, under Hugging Face's names: features of the dense head, which Theia reads.

Yang et al., "Depth Anything", CVPR 2024, whose head reads the backbone's last four blocks; "Depth Anything V2", NeurIPS
2024, whose head reads blocks spread over its depth. The tensors of the two have the same names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from dune_fast.kernels.nn.depth_anything import DepthAnything, DepthAnythingConfig
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.foundation import packed, renamed
from dune_fast.teachers.protocol import map_tokens
from dune_fast.teachers.vit import ViTTeacher

_CONV1 = "head.conv1.weight"
_HEADS = {384: ((48, 96, 192, 384), 64), 768: ((96, 192, 384, 768), 128), 1024: ((256, 512, 1024, 1024), 256)}
"""Channels of a token -> (channels of the neck's maps, of the fused one) of the published sizes."""
_SPREAD = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}
"""Blocks of the backbone -> those that the second version's head reads."""


class DepthAnythingTeacher(ViTTeacher):
    """Patches: the feature before the last ReLU, 32 channels at the image's resolution, at a patch's nearest pixel."""

    token_types = ("patch",)
    layer_scale = True
    network = DepthAnything
    sizes = {384: (12, 6, 4), 768: (12, 12, 4), 1024: (24, 16, 4)}
    swiglu_channels = ()

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        return "neck.reassemble_stage.layers.0.projection.weight" in keys and _CONV1 in keys

    @classmethod
    def published_interpolation(cls, registers: int) -> tuple[float, bool]:
        return 0.0, False

    @classmethod
    def architecture(cls, cfg: TeacherConfig) -> ViTConfig:
        widths = {heads: width for width, (_, heads, _) in cls.sizes.items()}
        if cfg.num_heads not in widths:
            raise ValueError(
                f"without a weights file, num_heads must be one of {', '.join(map(str, widths))}: the channels of the "
                f"feature do not say the network's size; it is {cfg.num_heads}"
            )
        return super().architecture(replace(cfg, num_features=widths[cfg.num_heads]))

    @classmethod
    def width(cls, architecture: ViTConfig) -> int:
        assert isinstance(architecture, DepthAnythingConfig)
        return architecture.features

    @classmethod
    def outputs(cls, depth: int) -> tuple[int, ...]:
        """Indices of the blocks that the head of a network of this depth reads."""
        return tuple(range(depth - 4, depth))

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        inner = renamed(state, (
            ("backbone.layernorm.", "norm."), ("backbone.embeddings.patch_embeddings.projection.", "patch_embed.proj."),
            ("backbone.embeddings.position_embeddings", "pos_embed"), ("backbone.embeddings.", ""),
            ("backbone.encoder.layer.", "blocks."), ("backbone.model.layer.", "blocks."),
            (".attention.output.dense.", ".attn.proj."), (".attention.o_proj.", ".attn.proj."),
            (".attention.attention.query.", ".attn.q_proj."), (".attention.attention.key.", ".attn.k_proj."),
            (".attention.attention.value.", ".attn.v_proj."), (".attention.", ".attn."),
            (".layer_scale1.lambda1", ".ls1.gamma"), (".layer_scale2.lambda1", ".ls2.gamma"),
            ("neck.reassemble_stage.layers.", "reassemble."), ("neck.convs.", "convs."),
            ("neck.fusion_stage.layers.", "fusion."),
        ))  # fmt: skip
        for unread in ("mask_token", "head.conv3.weight", "head.conv3.bias"):
            inner.pop(unread, None)
        return packed(inner, ("q_proj.", "k_proj.", "v_proj."), "qkv.", path)

    @classmethod
    def reads(cls, name: str) -> bool:
        return name.startswith("backbone.")

    @classmethod
    def variant(cls, plain: ViTConfig, state: Mapping[str, Tensor], cfg: TeacherConfig) -> ViTConfig:
        fields = asdict(plain) | {"outputs": cls.outputs(plain.depth)}
        if not state:
            neck, fusion = _HEADS[plain.embed_dim]
            return DepthAnythingConfig(**fields, neck=neck, fusion=fusion, hidden=fusion // 2)
        names = [*(f"convs.{i}.weight" for i in range(4)), _CONV1, "head.conv2.weight"]
        shapes = [tuple(state[name].shape) if name in state else () for name in names]
        if wrong := [name for name, shape in zip(names, shapes, strict=True) if len(shape) != 4]:
            raise TeacherWeightsError(f"{cfg.weights}: {wrong[0]} is missing or no convolution's: not Depth Anything's")
        if plain.depth < 4:
            raise TeacherWeightsError(f"{cfg.weights} has {plain.depth} blocks; Depth Anything's head reads four")
        return DepthAnythingConfig(
            **fields, neck=tuple(shape[1] for shape in shapes[:4]), fusion=shapes[0][0], hidden=shapes[4][0],
            features=shapes[5][0],
        )  # fmt: skip

    def channels(self) -> int:
        if self.config.layer is not None or not self.config.norm:
            raise ValueError(
                f"teachers.{self.name}: the head reads four blocks, all normalised; leave layer null and norm true"
            )
        return self.trunk.vit.cfg.features

    def tokens(self, features: dict[int, Tensor]) -> dict[str, Tensor]:
        feature = features[self.block]  # [B, 32, H, W]
        size = [side // self.trunk.patch_size for side in feature.shape[-2:]]
        return {"patch": map_tokens(F.interpolate(feature, size=size, mode="nearest"))}


class DepthAnythingV2Teacher(DepthAnythingTeacher):
    """As Depth Anything's, of the second version's weights."""

    @classmethod
    def outputs(cls, depth: int) -> tuple[int, ...]:
        return _SPREAD.get(depth) or super().outputs(depth)
