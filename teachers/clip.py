"""CLIP's image towers: OpenAI's and others' under Hugging Face's names, DFN's, LAION's and MetaCLIP's under OpenCLIP's.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021. A ViT with a norm
before its blocks and, in OpenAI's and DFN's weights, a quicker approximation of GELU, which the tensors do not show:
`activation`. The text tower is ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from dune_fast.kernels.nn.block import product_dtype
from dune_fast.kernels.nn.foundation_vit import FoundationConfig, FoundationViT
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError, below
from dune_fast.teachers.foundation import TOWER, as_table, packed, renamed, tower, with_patch_bias
from dune_fast.teachers.vit import ViTTeacher

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class CLIPTeacher(ViTTeacher):
    """cls = the pooled output: cls after the last norm, and with `projected` after the projection. Patches = after that
    norm or, with `norm: false`, before it, as Hugging Face's `last_hidden_state`.

    The projection has other channels than the patches. For both, name two teachers of one file: `token_types: [cls]`
    with `projected: true`, and `token_types: [patch]`. They share one forward pass.
    """

    statistics = (CLIP_MEAN, CLIP_STD)
    options = ("activation", "projected")
    network = FoundationViT
    sizes = {
        768: (12, 12, 4), 1024: (24, 16, 4), 1280: (32, 16, 4), 1408: (40, 16, 6144 / 1408),
        1664: (48, 16, 8192 / 1664),
    }  # fmt: skip
    activation: ClassVar[str] = "quick_gelu"
    """Of the family's best-known weights."""

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        return any(key.removeprefix(TOWER) == "pre_layrnorm.weight" for key in keys)

    @classmethod
    def published_interpolation(cls, registers: int) -> tuple[float, bool]:
        return 0.0, False

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        inner = renamed(tower(state), (
            ("embeddings.patch_embedding.", "patch_embed.proj."), ("embeddings.class_embedding", "cls_token"),
            ("embeddings.position_embedding.weight", "pos_embed"), ("pre_layrnorm.", "norm_pre."),
            ("post_layernorm.", "norm."), ("encoder.layers.", "blocks."), (".layer_norm", ".norm"),
            (".self_attn.out_proj.", ".attn.proj."), (".self_attn.", ".attn."),
        ))  # fmt: skip
        inner.pop("embeddings.position_ids", None)  # counted up, in files of older versions
        inner = packed(inner, ("q_proj.", "k_proj.", "v_proj."), "qkv.", path)
        return cls._finished(inner, state.get("visual_projection.weight"))

    @staticmethod
    def _finished(inner: dict[str, Tensor], projection: Tensor | None) -> dict[str, Tensor]:
        if projection is not None:
            inner["projection.weight"] = projection
        return as_table(with_patch_bias(inner), "cls_token", "pos_embed")

    @classmethod
    def reads(cls, name: str) -> bool:
        return name.removeprefix(TOWER).startswith(("embeddings.", "encoder."))

    @classmethod
    def variant(cls, plain: ViTConfig, state: Mapping[str, Tensor], cfg: TeacherConfig) -> ViTConfig:
        projection = state.get("projection.weight")
        fields = asdict(plain) | {"mlp": cfg.activation or cls.activation, "norm_eps": 1e-5, "pre_norm": True}
        return FoundationConfig(**fields, projection=0 if projection is None else len(projection))

    def channels(self) -> int:
        trunk, cfg = self.trunk, self.config
        if not cfg.projected:
            return trunk.num_features
        if not (projection := trunk.vit.cfg.projection):
            raise ValueError(
                f"teachers.{self.name}.projected is true, but {cfg.weights} has no projection; set it to false"
            )
        if "patch" in cfg.token_types:
            raise ValueError(
                f"teachers.{self.name}: cls has {projection} channels after the projection, patches have "
                f"{trunk.num_features}; name two teachers of this file, one with token_types=[cls] and projected=true, "
                "one with token_types=[patch]"
            )
        if cfg.layer is not None:
            raise ValueError(f"teachers.{self.name}: the projection reads the last block; set layer to null")
        return projection

    def tokens(self, features: dict[int, Tensor]) -> dict[str, Tensor]:
        if self.config.layer is not None:
            return super().tokens(features)
        vit, x = self.trunk.vit, features[self.block]
        normed = vit.norm(x, out_dtype=product_dtype(x))
        cls = normed[:, 0]
        patches = (normed if self.config.norm else x)[:, vit.num_prefix_tokens :]
        return {"cls": vit.projection(cls) if self.config.projected else cls, "patch": patches}


class OpenCLIPTeacher(CLIPTeacher):
    """As CLIP's, of files under OpenCLIP's names. `activation` is "quick_gelu" for models that are called so."""

    activation = "gelu"

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        return "visual.ln_pre.weight" in keys and "visual.class_embedding" in keys

    @classmethod
    def published_interpolation(cls, registers: int) -> tuple[float, bool]:
        return 0.0, True

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        inner = renamed(below(state, "visual."), (
            ("conv1.", "patch_embed.proj."), ("class_embedding", "cls_token"), ("positional_embedding", "pos_embed"),
            ("ln_pre.", "norm_pre."), ("ln_post.", "norm."), ("transformer.resblocks.", "blocks."),
            (".ln_1.", ".norm1."), (".ln_2.", ".norm2."), (".attn.in_proj_", ".attn.qkv."),
            (".attn.out_proj.", ".attn.proj."), (".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2."),
        ))  # fmt: skip
        if "attn_pool.query" in inner:
            raise TeacherWeightsError(f"{path} is of a model that pools by attention (CoCa), which is not supported")
        projection = inner.pop("proj", None)
        return cls._finished(inner, None if projection is None else projection.t())

    @classmethod
    def reads(cls, name: str) -> bool:
        return name.startswith("visual.")
