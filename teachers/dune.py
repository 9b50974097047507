"""Distilled encoders as teachers: DUNE's and UNIC's releases, and what a run of this project has written.

Sariyildiz et al., "DUNE: Distilling a Universal Encoder from Heterogeneous 2D and 3D Teachers", CVPR 2025, and "UNIC",
ECCV 2024. Whatever surrounds the encoder (projectors, teachers' statistics, optimizer) is left out.

UNIC's container is read by what such containers have in common; it was not compared with an official file.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.encoder_names import ANCHOR
from dune_fast.teachers.vit import ViTTeacher

ARCHITECTURES = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
}
"""Published name -> (channels, blocks, heads); the container gives the name alone."""
ENCODER_OPTIONS = {
    "arch": "vit_base", "image_size": 336, "patch_size": 14, "num_register_tokens": 4, "layerscale_init": 1e-4,
    "qkv_bias": True, "ln_affine": True,
}  # fmt: skip
"""Options of the published encoder with what its loader takes where `enc_args` has none."""
PROJECTOR_OPTIONS = {
    "num_blocks": 1, "num_heads": 12, "mlp_ratio": 4.0, "layerscale_init": 1e-4, "qkv_bias": True, "ln_affine": True,
    "scale": 1.0,
}  # fmt: skip
"""Likewise, of the transformer projector. Its loader gives the projectors the encoder's heads, whatever they say."""


def container_options(content: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the published trainer keeps beside the weights; empty if there are none."""
    args = content.get("args")
    return vars(args) if isinstance(args, argparse.Namespace) else {}


def encoder_options(content: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """`enc_args` of a published container; empty if it has none. TeacherWeightsError for an option not known here."""
    return _options(content, "enc_args", ENCODER_OPTIONS, path)


def projector_options(content: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """`proj_args`, likewise."""
    return _options(content, "proj_args", PROJECTOR_OPTIONS, path)


def _options(content: Mapping[str, Any], entry: str, known: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    options = container_options(content).get(entry)
    if not isinstance(options, Mapping):
        return {}
    if unknown := sorted(map(str, set(options) - set(known))):
        raise TeacherWeightsError(
            f"{path} was made with {entry} {', '.join(unknown)}, which are not known here and may change what it "
            f"computes; known are {', '.join(known)}"
        )
    return dict(options)


def filled(state: Mapping[str, Tensor], options: Mapping[str, Any], norms: tuple[str, ...]) -> dict[str, Tensor]:
    """A state dict of blocks with what one left out computes: zero biases for `qkv_bias=False`, gain 1 and bias 0 for
    `ln_affine=False`, of the blocks' norms and of those named in `norms`."""
    state = dict(state)
    for key in [key for key in state if key.endswith(".attn.qkv.weight")]:
        block, weight = key.removesuffix("attn.qkv.weight"), state[key]
        if not options.get("qkv_bias", True):
            state.setdefault(f"{block}attn.qkv.bias", torch.zeros(len(weight), dtype=weight.dtype))
        if not options.get("ln_affine", True):
            for norm in (f"{block}norm1", f"{block}norm2", *norms):
                state.setdefault(f"{norm}.weight", torch.ones(weight.shape[1], dtype=weight.dtype))
                state.setdefault(f"{norm}.bias", torch.zeros(weight.shape[1], dtype=weight.dtype))
    return state


class DUNETeacher(ViTTeacher):
    """cls and patch tokens of a distilled encoder.

    The losses of DUNE see tokens before the final norm, which therefore never moved from gain 1 and bias 0. With
    `norm: true`, the default, the features are those that users of the encoder get (`x_norm_clstoken`,
    `x_norm_patchtokens`): each token standardized over its channels. `norm: false` gives the tokens as they went to the
    projectors (`x_prenorm`), lengths included.
    """

    layer_scale = None

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        if f"encoder.{ANCHOR}" in keys or any(key.startswith("blocks.0.0.") for key in keys):
            return True
        # a student's encoder alone; DINOv2's release has a mask token, a student has none
        return ANCHOR in keys and "register_tokens" in keys and "mask_token" not in keys

    @classmethod
    def completed(cls, state: dict[str, Tensor], content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
        return filled(state, encoder_options(content, path), ("norm",))


class UNICTeacher(DUNETeacher):
    """As DUNE's; see the note on UNIC's container at the top of the file."""
