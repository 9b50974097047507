"""DINOv3's ViTs and those of EUPE, which are the same network: under their releases' names or Hugging Face's.

Siméoni et al., "DINOv3", 2025; EUPE, 2026. RoPE over the patches' centres instead of a position table, four storage
tokens. The release turns the channels j and j + d / 2 of a head together, where our `rope2d` turns neighbours within an
axis' half: the rows of q and k are put in our order, which leaves their product as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dune_fast.kernels.nn.foundation_vit import FoundationConfig, FoundationViT
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.foundation import packed, renamed
from dune_fast.teachers.vit import ViTTeacher

_BASE = 100.0
"""Longest period of RoPE, in units of half a grid's side."""


class DINOv3Teacher(ViTTeacher):
    """cls and patch tokens after the final norm; storage tokens are computed and left out."""

    layer_scale = True
    pos_embed = "rope2d"
    cls_token = True
    network = FoundationViT
    sizes = {
        192: (12, 3, 4), 384: (12, 6, 4), 768: (12, 12, 4), 1024: (24, 16, 4), 1280: (32, 20, 6), 4096: (40, 32, 3),
    }  # fmt: skip
    swiglu_channels = (1280, 4096)

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        released = "storage_tokens" in keys and "rope_embed.periods" in keys
        return released or ("embeddings.register_tokens" in keys and "embeddings.patch_embeddings.weight" in keys)

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        theirs = "embeddings.patch_embeddings.weight" in state
        inner = _from_hugging_face(state, path) if theirs else renamed(state, (
            ("storage_tokens", "register_tokens"), ("rope_embed.periods", "rope_periods"),
        ))  # fmt: skip
        for key in [key for key in inner if key.endswith("mask_token") or key.startswith("local_cls_norm.")]:
            del inner[key]  # of training alone
        for key in [key for key in inner if key.endswith(".bias_mask")]:
            bias = key.removesuffix("_mask")
            if bias not in inner or inner[bias].shape != inner[key].shape:
                raise TeacherWeightsError(f"{path}: {key} has no {bias} of its shape to go with")
            inner[bias] = torch.where(inner[key] == 0, 0, inner[bias] * inner.pop(key))
        return packed(inner, ("mlp.w1.", "mlp.w2."), "mlp.w12.", path)

    @classmethod
    def read_content(
        cls, content: Mapping[str, Any], path: Path, cfg: TeacherConfig
    ) -> tuple[ViTConfig, dict[str, Tensor]]:
        architecture, state = super().read_content(content, path, cfg)
        width = architecture.embed_dim // architecture.num_heads
        if width % 4:
            raise TeacherWeightsError(
                f"{path}: {architecture.num_heads} heads of {width} channels, no multiple of 4; give num_heads"
            )
        state.setdefault("rope_periods", _BASE ** (torch.arange(width // 4) / (width // 4)))
        order = torch.arange(width).view(2, 2, -1).transpose(0, 1).reshape(-1)  # [half, axis, j] -> [axis, half, j]
        for key in [key for key in state if ".attn.qkv." in key]:
            if len(state[key]) == 3 * architecture.embed_dim:
                q, k, v = state[key].unflatten(0, (3, architecture.num_heads, width))
                state[key] = torch.stack([q[:, order], k[:, order], v]).flatten(0, 2)
        return architecture, state

    @classmethod
    def reads(cls, name: str) -> bool:
        return ".mlp.w" in name or name.endswith(".bias_mask") or name.removeprefix("model.").startswith("layer.")

    @classmethod
    def variant(cls, plain: ViTConfig, state: Mapping[str, Tensor], cfg: TeacherConfig) -> ViTConfig:
        return FoundationConfig(**asdict(plain), norm_eps=1e-5)


class EUPETeacher(DINOv3Teacher):
    """As DINOv3's: the two cannot be told apart by their tensors."""


def _from_hugging_face(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Hugging Face's names to the release's, q, k and v packed; k has no bias."""
    inner = {key.removeprefix("model."): value for key, value in state.items()}
    gated = any(".mlp.gate_proj." in key for key in inner)
    inner = renamed(inner, (
        ("embeddings.patch_embeddings.", "patch_embed.proj."), ("embeddings.", ""), ("layer.", "blocks."),
        (".attention.o_proj.", ".attn.proj."), (".attention.", ".attn."), (".layer_scale1.lambda1", ".ls1.gamma"),
        (".layer_scale2.lambda1", ".ls2.gamma"), (".mlp.gate_proj.", ".mlp.w1."),
        (".mlp.up_proj.", ".mlp.w2." if gated else ".mlp.fc1."),
        (".mlp.down_proj.", ".mlp.w3." if gated else ".mlp.fc2."),
    ))  # fmt: skip
    return packed(inner, ("q_proj.", "k_proj.", "v_proj."), "qkv.", path, missing_bias=True)
