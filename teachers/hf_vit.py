"""ViT and DeiT as Hugging Face's transformers names their tensors, and Theia's encoders in their own containers.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; Touvron et al., "Training data-efficient image
transformers & distillation through attention", ICML 2021; Shang et al., "Theia", CoRL 2024. Files of DINOv2 from there
have other names inside their blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.nn.theia import TheiaConfig, TheiaViT
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError, below
from dune_fast.teachers.foundation import packed, renamed
from dune_fast.teachers.vit import ViTTeacher

ANCHOR = "encoder.layer.0.layernorm_before.weight"
"""The name that every such encoder has: what stands before it is the encoder's prefix."""
CONTAINER = "backbone.model."
"""What stands before the encoder's names in Theia's containers."""
NAMES = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."), ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"), ("embeddings.mask_token", "mask_token"),
    ("embeddings.reg_token", "register_tokens"), ("embeddings.reg_pos_embed", "register_positions"),
    ("encoder.layer.", "blocks."), (".layernorm_before.", ".norm1."), (".layernorm_after.", ".norm2."),
    (".attention.output.dense.", ".attn.proj."), (".attention.attention.", ".attn."),
    (".intermediate.dense.", ".mlp.fc1."), (".output.dense.", ".mlp.fc2."), ("layernorm.", "norm."),
)  # fmt: skip
"""(transformers' spelling, ours), in this order. `reg_*` are Theia's."""
HALF = (0.5, 0.5, 0.5)
PARTS = ("query.", "key.", "value.")


class HFViTTeacher(ViTTeacher):
    """cls and patch tokens after the final norm. `mean` and `std` are Google's; DeiT's are ImageNet's."""

    statistics = (HALF, HALF)
    network = TheiaViT
    sizes = {192: (12, 3, 4), 384: (12, 6, 4), 768: (12, 12, 4), 1024: (24, 16, 4), 1280: (32, 16, 4)}

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        return any(key == ANCHOR or key.endswith("." + ANCHOR) for key in keys)

    @classmethod
    def published_interpolation(cls, registers: int) -> tuple[float, bool]:
        return 0.0, False

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        return packed(renamed(below(state, cls.prefix(state, path)), NAMES), PARTS, "qkv.", path)

    @classmethod
    def prefix(cls, names: Iterable[str], path: Path | str) -> str:
        found = [key.removesuffix(ANCHOR) for key in names if key.endswith(ANCHOR)]
        if len(found) != 1:
            raise TeacherWeightsError(f"{path} has {len(found)} encoders under Hugging Face's names of ViT, not one")
        return found[0]

    @classmethod
    def reads(cls, name: str) -> bool:
        return ".attention.attention." in name

    @classmethod
    def variant(cls, plain: ViTConfig, state: Mapping[str, Tensor], cfg: TeacherConfig) -> ViTConfig:
        # the table has a row for cls, also where there is none
        return TheiaConfig(**asdict(plain) | {"cls_token": not state or "cls_token" in state})


class TheiaTeacher(HFViTTeacher):
    """Theia's models, the encoder of the container: the same names below `backbone.model.`, images as ImageNet's."""

    statistics = (IMAGENET_MEAN, IMAGENET_STD)

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        return CONTAINER + ANCHOR in keys
