"""The architecture of a ViT: read off its tensors' shapes or a file's own word; random tensors for an architecture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.nn.encoders import architecture, as_stored, encoder_config, from_stored
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.teachers.containers import TeacherWeightsError, damaged
from dune_fast.teachers.run_files import Manifest, is_checkpoint

HEAD_DIM = 64
"""Channels of an attention head in every published encoder; the tensors do not show it."""

ARCHITECTURE = "vit_config"
"""Entry of a safetensors file's metadata that holds the encoder's `ViTConfig` as JSON; of another family than "vit",
with that too."""

PREPROCESSING = "preprocessing"
"""Entry of a file's metadata that says as JSON how images become the encoder's input."""

_MAX_DEPTH, _MAX_SIZE = 1000, 100_000


def registers_of(state: Mapping[str, Tensor]) -> int:
    """Register tokens of an encoder."""
    return state["register_tokens"].shape[1] if "register_tokens" in state else 0


def infer_vit(
    state: Mapping[str, Tensor],
    path: Path | str,
    num_heads: int | None = None,
    interpolate_offset: float = 0.1,
    interpolate_antialias: bool = False,
    pos_embed: str = "learned",
    layer_scale: bool | None = None,
    cls_token: bool | None = None,
) -> ViTConfig:
    """The architecture that an encoder's tensors (names of `dune_fast.kernels.nn.vit`) belong to.

    Args:
        num_heads: attention heads; None for channels / 64.
        interpolate_offset, interpolate_antialias: see `ViTConfig`; tensors do not show them.
        pos_embed: "learned" or "rope2d".
        cls_token: None for one where positions are learned.
        layer_scale: whether blocks have LayerScale; None for whatever the first one has.

    Raises:
        TeacherWeightsError: a tensor that says the sizes is missing or impossible, or the network is another.
    """
    swiglu = "blocks.0.mlp.w12.weight" in state
    learned = pos_embed == "learned"
    has_cls = learned if cls_token is None else cls_token
    try:
        dim, colours, patch, width = state["patch_embed.proj.weight"].shape
        hidden = state["blocks.0.mlp.w12.weight" if swiglu else "blocks.0.mlp.fc1.weight"].shape[0]
        if swiglu:  # the layer makes gate and value, each with two thirds of the ratio's channels
            hidden *= 3 / 4
        count = state["pos_embed"].shape[1] - int(has_cls) if learned else 0
        gain = "blocks.0.ls1.gamma" in state if layer_scale is None else layer_scale
        registers = registers_of(state)
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    except KeyError as error:
        raise TeacherWeightsError(f"{path} lacks the encoder's tensor {error}: it is not the expected ViT") from error
    except (ValueError, IndexError) as error:
        raise TeacherWeightsError(f"{path} has tensors of shapes that no ViT has: {error}") from error
    side = math.isqrt(count)
    if side**2 != count or colours != 3 or patch != width:
        raise TeacherWeightsError(
            f"{path} has {count} patch positions and patches of {colours}x{patch}x{width}; "
            "a square grid of square RGB patches is expected"
        )
    if num_heads is None and dim % HEAD_DIM:
        raise TeacherWeightsError(
            f"{path} has {dim} channels, which is no multiple of an attention head's {HEAD_DIM}; give num_heads"
        )
    if depth > sum(key.endswith(".norm1.weight") for key in state):
        raise TeacherWeightsError(f"{path} has a block {depth - 1} but lacks some tensor norm1.weight before it")
    return ViTConfig(
        image_size=side * patch if count else patch,
        patch_size=patch,
        embed_dim=dim,
        depth=depth,
        num_heads=num_heads or dim // HEAD_DIM,
        mlp_ratio=hidden / dim,
        num_registers=registers,
        layer_scale=1e-4 if gain else None,
        cls_token=has_cls,
        pos_embed=pos_embed,
        interpolate_offset=interpolate_offset,
        interpolate_antialias=interpolate_antialias,
        mlp="swiglu" if swiglu else "gelu",
    )


def random_vit_state(
    cfg: ViTConfig, seed: int, network: type[VisionTransformer] = VisionTransformer
) -> dict[str, Tensor]:
    """Weights from a generator of their own, scaled so that every block matters: for tests and benchmarks."""
    with torch.device("meta"):
        wanted = network(cfg).state_dict()
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in wanted.items():
        unit = ("norm" in key and key.endswith("weight")) or key.endswith("periods")
        offset = 1.0 if unit else 0.3 if key.endswith("gamma") else 0.0
        state[key] = torch.randn(value.shape, generator=draw).mul_(0.02).add_(offset)
    return state


def architecture_metadata(cfg: ViTConfig) -> dict[str, str]:
    """Metadata of a safetensors file from which the encoder can be built without a configuration."""
    return {"format": "pt", ARCHITECTURE: json.dumps(as_stored(cfg))}


def stored_architecture(path: Path) -> ViTConfig | None:
    """The architecture in a sound safetensors file's metadata or a checkpoint's manifest, None if there is none.

    TeacherWeightsError if it is senseless.
    """
    if is_checkpoint(path):
        config = Manifest.read(path).config
        if (values := config.get("student")) is not None:
            return _checked(lambda: _of_student(values, config.get("teachers") or {}), path)
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt") as handle:
            values = (handle.metadata() or {}).get(ARCHITECTURE)
    else:
        return None
    if values is None:
        return None
    return _checked(lambda: from_stored(json.loads(values)), path)


def stored_statistics(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation that images for a file of ours are normalised by: ImageNet's unless its metadata say else.

    None for a file that is none of ours.
    """
    if stored_architecture(path) is None:
        return None
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as handle:
            values = (handle.metadata() or {}).get(PREPROCESSING)
        if values is not None:
            try:
                found = json.loads(values)
                mean, std = (tuple(float(x) for x in found[key]) for key in ("mean", "std"))
            except (TypeError, ValueError, KeyError) as error:
                raise damaged(path, f"its preprocessing is senseless: {error}") from error
            if len(mean) == len(std) == 3 and min(std) > 0:
                return mean, std
            raise damaged(path, f"its preprocessing is senseless: mean {mean}, std {std}")
    return IMAGENET_MEAN, IMAGENET_STD


def _of_student(student: Mapping[str, Any], teachers: Mapping[str, Any]) -> ViTConfig:
    """The architecture of a run's encoder by its configuration; summaries are those of sources with cls tokens."""
    sources = {name: (teacher or {}).get("source") or name for name, teacher in teachers.items()}
    order = list(dict.fromkeys(sources.values()))
    cfg = encoder_config(student)
    _check_sizes(cfg)
    if not student.get("cls_per_teacher"):
        return architecture(cfg, int(cfg.cls_token))
    found = architecture(cfg, max(1, len(order)))
    read = {order.index(sources[name]) for name, teacher in teachers.items() if "cls" in teacher["token_types"]}
    found.summaries = tuple(sorted(read)) or found.summaries
    return found


def _checked(make: Callable[[], ViTConfig], path: Path) -> ViTConfig:
    """The architecture that `make` gives; TeacherWeightsError if it is senseless."""
    try:
        cfg = make()
        _check_sizes(cfg)
    except (TypeError, ValueError, KeyError, ArithmeticError, AttributeError) as error:
        raise damaged(path, f"its architecture is senseless: {error}") from error
    return cfg


def _check_sizes(cfg: ViTConfig) -> None:
    """ValueError for values that no encoder has; nothing else checks a file's metadata before it is used."""
    for name, default in vars(type(cfg)()).items():
        value = getattr(cfg, name)
        if (name == "layer_scale" and value is None) or not isinstance(default, int | float | str):
            continue  # sections and lists check themselves
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise ValueError(f"{name} is {value!r}")
        if isinstance(value, int | float) and not 0 <= value <= (_MAX_DEPTH if name == "depth" else _MAX_SIZE):
            raise ValueError(f"{name} is {value!r}")
