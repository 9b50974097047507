"""Names of tensors in the files of CLIP, SigLIP, DINOv3, ... and how they become those of `kernels.nn`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dune_fast.teachers.containers import TeacherWeightsError, below, damaged

Renames = Sequence[tuple[str, str]]
"""(their spelling, ours): parts of names, replaced in turn."""

TOWER = "vision_model."
"""What stands before the names of an image tower of Hugging Face's, where a file has a text tower too."""


def tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower of a state dict under Hugging Face's names, or all of it where it is one."""
    return below(state, TOWER) or dict(state)


def renamed(state: Mapping[str, Tensor], renames: Renames) -> dict[str, Tensor]:
    """A state dict under other names."""
    found = {}
    for key, value in state.items():
        for old, new in renames:
            key = key.replace(old, new)
        found[key] = value
    return found


def packed(
    state: dict[str, Tensor], parts: Sequence[str], whole: str, path: Path, missing_bias: bool = False
) -> dict[str, Tensor]:
    """A state dict in which the tensors of some layers (`.q.`, `.k.`, `.v.`) are one (`.qkv.`), row by row.

    A part that lacks its bias has zeros there where `missing_bias` allows it. TeacherWeightsError if one is missing, or
    they do not go together.
    """
    owners = {key.rpartition(parts[0])[0] for key in state if parts[0] in key}
    for owner in sorted(owners):
        for kind in ("weight", "bias"):
            names = [f"{owner}{part}{kind}" for part in parts]
            found = [state.pop(name, None) for name in names]
            weight = state.get(f"{owner}{whole}weight")
            if kind == "bias" and missing_bias and weight is not None and any(x is not None for x in found):
                rows = len(weight) // len(parts)
                found = [weight.new_zeros(rows) if x is None else x for x in found]
            if lacking := [name for name, x in zip(names, found, strict=True) if x is None]:
                raise TeacherWeightsError(f"{path} lacks the tensor {lacking[0]}, which belongs to {names[0]}")
            try:
                state[f"{owner}{whole}{kind}"] = torch.cat(found)
            except (RuntimeError, TypeError) as error:
                raise damaged(path, f"{', '.join(names)} do not go together: {error}") from error
    return state


def with_patch_bias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose patch projection has a bias, zeros where the release has none."""
    weight = state.get("patch_embed.proj.weight")
    if weight is not None and weight.ndim:
        state.setdefault("patch_embed.proj.bias", weight.new_zeros(len(weight)))
    return state


def as_table(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """A state dict whose tensors of these names get leading dimensions of size 1, up to three: [N, D] -> [1, N, D]."""
    for name in names:
        if name in state:
            x = state[name]
            state[name] = x.reshape((1,) * (3 - x.ndim) + tuple(x.shape)) if x.ndim < 3 else x
    return state
