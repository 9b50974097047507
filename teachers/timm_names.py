"""timm's models by name and by their tensors: a teacher's configuration from a name, the names that a file fits.

`timm:NAME` in a run's configuration, and `dune-fast teachers verify FILE`. Models are built without memory.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.timm_model import CLASSIFIERS, create, has_cls, import_timm, patch_size
from dune_fast.teachers.weights import Fit, compare

SHORTHAND = "timm:"
"""`timm:NAME` or `timm:NAME@FILE` in place of a teacher's configuration."""

_VIT_SIZES = {
    192: "tiny", 384: "small", 768: "base", 1024: "large", 1152: "so400m", 1280: "huge", 1408: "giant", 1536: "giant",
    1664: "gigantic",
}  # fmt: skip
_CONVNEXT_SIZES = {
    40: "atto", 48: "femto", 64: "pico", 80: "nano", 96: "[ts][im]*", 128: "base", 192: "large", 256: "xlarge",
    384: "xxlarge",
}  # fmt: skip
_INIT = {"normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_", "copy_"}


class _NoInit(TorchFunctionMode):
    """Leaves out the drawing of weights that have no memory, which takes most of the time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in _INIT and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def meta_model(model: str, image_size: int | None = None, name: str = "NAME") -> nn.Module:
    """timm's model without classifier and memory; ValueError if there is no such model."""
    with torch.device("meta"), _NoInit():
        return create(name, model, {} if image_size is None else {"img_size": image_size})


def timm_config(model: str, weights: str = "", image_size: int | None = None, name: str = "NAME") -> TeacherConfig:
    """How a run uses a model of timm: sizes, tokens and normalisation as timm says them.

    Args:
        model: its name in timm, with or without the tag of its weights.
        weights: the file; by default `$DUNE_FAST_WEIGHTS/MODEL.safetensors` (`weights/` without the variable).
        image_size: side of the images that the weights were made for; None for the model's own.
        name: what the run calls the teacher, for messages.

    ValueError if timm is not installed or does not know the model.
    """
    built = meta_model(model, image_size, name)
    stated = built.pretrained_cfg
    folder = os.environ.get("DUNE_FAST_WEIGHTS") or "weights"
    return TeacherConfig(
        family="timm", model=model, weights=weights or f"{folder}/{model}.safetensors",
        patch_size=patch_size(built, 0), num_features=built.num_features,
        token_types=["cls", "patch"] if has_cls(built) else ["patch"],
        mean=list(stated["mean"]), std=list(stated["std"]), groups=["generic"], image_size=image_size,
    )  # fmt: skip


def from_shorthand(name: str, text: str) -> TeacherConfig:
    """The teacher that `+teachers.NAME=timm:MODEL` or `+teachers.NAME=timm:MODEL@FILE` stands for.

    ValueError if the text is something else, or timm does not know the model.
    """
    if not text.startswith(SHORTHAND):
        raise ValueError(
            f"teachers.{name} is {text!r}; write timm:MODEL or timm:MODEL@FILE for a model of timm, or give a file of "
            f"configs/teachers by +teachers@teachers.{name}=FILE"
        )
    model, _, weights = text.removeprefix(SHORTHAND).partition("@")
    return timm_config(model, weights, name=name)


def timm_matches(state: Mapping[str, Tensor], path: Path) -> list[str]:
    """Names of timm's models that a file's state dict fits without a rest, likely ones alone.

    The file's name may say the model, or `config.json` beside it, as on timm's hub.
    """
    try:
        timm = import_timm()
    except ValueError:  # without timm there is nothing to say about its models
        return []
    patterns = _patterns(state)
    names = [name for name in timm.list_models() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    named = [name for name in (*timm.list_models(), *timm.list_pretrained()) if name in path.stem]
    names = sorted(named, key=len)[-1:] + names  # with the tag of the weights, if the file's name has it
    if (stated := _stated_model(path)) is not None and timm.is_model(stated):
        names = [stated, *names]
    fitting = [name for name in dict.fromkeys(names) if _fits(name, state)]
    exact = [name for name in fitting if image_size_of(state, name) is None]  # others take the size as an option
    return exact or fitting


def timm_fit(cfg: TeacherConfig, state: Mapping[str, Tensor]) -> Fit:
    """How a state dict compares with the model of timm that `cfg` names."""
    return compare(meta_model(cfg.model, cfg.image_size).state_dict(), state, CLASSIFIERS)


def image_size_of(state: Mapping[str, Tensor], model: str) -> int | None:
    """Side of the images that a ViT's position table is for, where it is not the model's own; None if it is."""
    table, weight = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    built = meta_model(model)
    own = getattr(built, "pos_embed", None)
    if table is None or weight is None or own is None or own.shape == table.shape:
        return None
    if table.ndim == 4:  # SAM's is a map
        return table.shape[1] * weight.shape[-1]
    prefix = own.shape[1] - math.isqrt(own.shape[1]) ** 2
    return math.isqrt(table.shape[1] - prefix) * weight.shape[-1]


def _fits(name: str, state: Mapping[str, Tensor]) -> bool:
    try:
        wanted = meta_model(name, image_size_of(state, name)).state_dict()
    except (ValueError, RuntimeError, AssertionError):  # a model that does not take the size, or more packages
        return False
    surplus = [key for key in state if key not in wanted and not key.startswith(CLASSIFIERS)]
    return not surplus and all(key in state and state[key].shape == value.shape for key, value in wanted.items())


def _patterns(state: Mapping[str, Tensor]) -> list[str]:
    """Patterns of the names of models that the tensors may be of."""
    patch = state.get("patch_embed.proj.weight")
    if patch is not None and "blocks.0.attn.qkv.weight" in state and patch.ndim == 4:
        if "neck.0.weight" in state:
            return ["samvit_*"]
        if (size := _VIT_SIZES.get(patch.shape[0])) is None:
            return []
        kind = "siglip" if "attn_pool.latent" in state else "clip" if "norm_pre.weight" in state else ""
        return [f"vit_{size}*_patch{patch.shape[-1]}_*{kind}*"]
    stem = state.get("stem.0.weight")
    if stem is not None and "stages.0.blocks.0.conv_dw.weight" in state:
        version = "v2" if "stages.0.blocks.0.mlp.grn.weight" in state else ""
        size = _CONVNEXT_SIZES.get(stem.shape[0])
        return [] if size is None else [f"convnext{version}_{size}*"]
    return []


def _stated_model(path: Path) -> str | None:
    """The architecture that `config.json` beside a file names, None if there is none."""
    try:
        found = json.loads(path.with_name("config.json").read_text()).get("architecture")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None
