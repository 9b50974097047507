"""SigLIP's and SigLIP 2's image towers of one image size, under Hugging Face's names.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023; Tschannen et al., "SigLIP 2", 2025. There is no
cls token: a learned query reads the patches. The text tower is ignored. Checkpoints for several aspect ratios (NaFlex)
are another network.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from dune_fast.kernels.nn.block import product_dtype
from dune_fast.kernels.nn.foundation_vit import FoundationConfig, FoundationViT
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.foundation import TOWER, as_table, packed, renamed, tower
from dune_fast.teachers.vit import ViTTeacher

_HALF = (0.5, 0.5, 0.5)


class SigLIPTeacher(ViTTeacher):
    """cls = the pooled output, a query's reading of the patches after the last norm; patches after that norm."""

    statistics = (_HALF, _HALF)
    cls_token = False
    network = FoundationViT
    sizes = {
        768: (12, 12, 4), 1024: (24, 16, 4), 1152: (27, 16, 4304 / 1152), 1536: (40, 16, 4),
    }  # fmt: skip
    swiglu_channels = ()

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        return any(key.removeprefix(TOWER) == "head.probe" for key in keys)

    @classmethod
    def published_interpolation(cls, registers: int) -> tuple[float, bool]:
        return 0.0, False

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        inner = renamed(tower(state), (
            ("embeddings.patch_embedding.", "patch_embed.proj."), ("embeddings.position_embedding.weight", "pos_embed"),
            ("head.layernorm.", "pool.norm."), ("head.attention.in_proj_", "pool.in_proj."),
            ("head.attention.", "pool."), ("head.", "pool."), ("post_layernorm.", "norm."),
            ("encoder.layers.", "blocks."), (".layer_norm", ".norm"), (".self_attn.out_proj.", ".attn.proj."),
            (".self_attn.", ".attn."),
        ))  # fmt: skip
        inner.pop("embeddings.position_ids", None)
        return as_table(packed(inner, ("q_proj.", "k_proj.", "v_proj."), "qkv.", path), "pos_embed")

    @classmethod
    def reads(cls, name: str) -> bool:
        return name.removeprefix(TOWER).startswith(("embeddings.", "encoder."))

    @classmethod
    def variant(cls, plain: ViTConfig, state: Mapping[str, Tensor], cfg: TeacherConfig) -> ViTConfig:
        return FoundationConfig(**asdict(plain) | {"mlp": "gelu_tanh", "norm_eps": 1e-6, "pool": True})

    def channels(self) -> int:
        if self.config.layer is not None and "cls" in self.config.token_types:
            raise ValueError(
                f"teachers.{self.name}: the query that makes cls reads the last block; set layer to null, or "
                "token_types to [patch]"
            )
        return super().channels()

    def tokens(self, features: dict[int, Tensor]) -> dict[str, Tensor]:
        x = features[self.block]
        tokens = {"patch": self.normed(x)}
        if "cls" in self.config.token_types:
            vit = self.trunk.vit
            tokens["cls"] = vit.pool(vit.norm(x, out_dtype=product_dtype(x)))
        return tokens
