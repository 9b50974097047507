"""Encoders in the folders that `dune-fast export --to timm | hf` writes, and in transformers' folders of DINOv2.

Both libraries resize the position table by size and with antialias, and so do these encoders: the features are those
that the library computes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.teachers.config import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.teachers.containers import TeacherWeightsError, read_safetensors
from dune_fast.teachers.weights import build_loaded

_WEIGHTS, _CONFIG, _PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
_HF_NAMES = {
    r"^embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"^embeddings\.position_embeddings": "pos_embed",
    r"^embeddings\.": "",
    r"^layernorm\.": "norm.",
    r"^encoder\.layer\.": "blocks.",
    r"attention\.output\.dense": "attn.proj",
    r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
}
"""transformers' names -> ours, one after the other."""
_QKV = "attention.attention."


def load_exported(folder: Path) -> VisionTransformer | None:
    """The encoder, float32, frozen, in evaluation mode; None for a folder of another kind.

    Raises:
        TeacherWeightsError: the files are damaged or contradict each other.
    """
    if not (folder / _WEIGHTS).is_file() or not (folder / _CONFIG).is_file():
        return None
    config = _json(folder / _CONFIG)
    if "model_args" in config and "dinov2" in str(config.get("architecture")):
        found, read, convert = config.get("pretrained_cfg", {}), _timm_architecture, _timm_state
        statistics = found.get("mean"), found.get("std")
    elif config.get("model_type") in ("dinov2", "dinov2_with_registers"):
        found = _json(folder / _PREPROCESSOR) if (folder / _PREPROCESSOR).is_file() else {}
        read, convert, statistics = _hf_architecture, _hf_state, (found.get("image_mean"), found.get("image_std"))
    else:
        return None
    path = folder / _WEIGHTS
    try:
        architecture, state = read(config), convert(read_safetensors(path))
    except (KeyError, TypeError) as error:
        raise TeacherWeightsError(f"{folder}: {_CONFIG} or {_WEIGHTS} lacks {error}: export it again") from error
    built = build_loaded(lambda: VisionTransformer(architecture), state, path, ("mask_token",))
    assert isinstance(built, VisionTransformer)
    built.mean, built.std = (tuple(x or y) for x, y in zip(statistics, (IMAGENET_MEAN, IMAGENET_STD), strict=True))
    return built


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise TeacherWeightsError(f"{path} is no JSON: {error}") from error


def _timm_architecture(config: Mapping[str, Any]) -> ViTConfig:
    args = config["model_args"]
    return ViTConfig(
        image_size=args["img_size"], patch_size=args["patch_size"], embed_dim=args["embed_dim"], depth=args["depth"],
        num_heads=args["num_heads"], mlp_ratio=args["mlp_ratio"], num_registers=args["reg_tokens"],
        layer_scale=args["init_values"] or None, interpolate_offset=0.0, interpolate_antialias=True,
    )  # fmt: skip


def _timm_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's table has no row of cls, whose position is in the token."""
    state = {key.replace("reg_token", "register_tokens"): value for key, value in state.items()}
    table = state["pos_embed"]
    return state | {"pos_embed": torch.cat([torch.zeros_like(table[:, :1]), table], 1)}


def _hf_architecture(config: Mapping[str, Any]) -> ViTConfig:
    if config.get("use_swiglu_ffn"):
        raise TeacherWeightsError("transformers' DINOv2 with gated MLPs (ViT-g) is not read: use the published file")
    return ViTConfig(
        image_size=config["image_size"], patch_size=config["patch_size"], embed_dim=config["hidden_size"],
        depth=config["num_hidden_layers"], num_heads=config["num_attention_heads"], mlp_ratio=config["mlp_ratio"],
        num_registers=config.get("num_register_tokens", 0), interpolate_offset=0.0, interpolate_antialias=True,
    )  # fmt: skip


def _hf_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values in one matrix, and our names."""
    found = {}
    for key, value in state.items():
        name = key
        if f"{_QKV}key." in key or f"{_QKV}value." in key:
            continue
        if f"{_QKV}query." in key:
            value = torch.cat([state[key.replace("query", part)] for part in ("query", "key", "value")])
            name = key.replace(f"{_QKV}query", "attn.qkv")
        for theirs, ours in _HF_NAMES.items():
            name = re.sub(theirs, ours, name)
        found[name] = value
    return found
