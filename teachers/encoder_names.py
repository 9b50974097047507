"""Every spelling of a ViT encoder's tensor names, and which tensors beside it change nothing.

A file has the encoder alone or below a prefix (`encoder.`, `backbone.`, ...), its blocks in chunks (`blocks.0.N.`) or
flat, under DINOv2's names or timm's. All end in the names of `dune_fast.kernels.nn.vit`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dune_fast.teachers.containers import TeacherWeightsError, below, strip_wrappers

ANCHOR = "patch_embed.proj.weight"
"""The name that every encoder has: what stands before it is the encoder's prefix."""
_PREFIXES = ("", "encoder.", "backbone.", "teacher.", "student.")
"""Which one is taken where a file has several encoders, the first of them first."""

_PARTS = ("blocks", "patch_embed", "norm")
_AFTER_TOKENS = re.compile(
    r"(decoder|head|fc_norm|mask_token|attn_pool|projector|predictor|dec_|downstream|classifier|linear|proj|last_layer"
    r"|neck|pooler|criterion|loss|teacher_norms|pre_logits|text)\w*|\w*_(heads?|decoder|classifier|projector|predictor|loss)"
)
"""Modules that read finished tokens, and the mask token, which no whole image sees. Whatever else stands beside the
blocks may change tokens on their way (another stem, a norm before the blocks, adapters, positions)."""
_COUNTERS = ("n_averaged", "logit_scale", "logit_bias")


def beside_encoder(name: str) -> bool:
    """Whether the features of an encoder do without the tensor of this name: heads, decoders, other parts."""
    part = name.partition(".")[0]
    return part not in _PARTS and bool(_AFTER_TOKENS.fullmatch(part) or name in _COUNTERS)


def encoder_prefix(names: Iterable[str], path: Path | str) -> str:
    """What stands before the names of the one encoder; TeacherWeightsError if there is none, or several as good."""
    names = list(names)
    found = [key.removesuffix(ANCHOR) for key in names if key == ANCHOR or key.endswith(f".{ANCHOR}")]
    if not found:
        parts = ", ".join(sorted({key.split(".")[0] for key in names})[:8])
        raise TeacherWeightsError(
            f"{path} lacks the tensor {ANCHOR}, so there is no ViT's encoder in it (what it has begins with: {parts})"
        )
    known = [prefix for prefix in _PREFIXES if prefix in found]
    if len(found) > 1 and not known:
        raise TeacherWeightsError(
            f"{path} has several encoders, below {', '.join(map(repr, found))}; save the wanted one alone"
        )
    return known[0] if known else found[0]


def flat_blocks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released names to ours: the chunk index before the block index goes (`blocks.0.N.`), so does the mask token."""
    return {
        re.sub(r"((?:^|\bencoder\.)blocks)\.\d+(\.\d+\.)", r"\1\2", key): value
        for key, value in state.items()
        if not key.endswith("mask_token")
    }


def encoder_state(state: Mapping[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """The tensors of the one encoder in a state dict, under the names of `dune_fast.kernels.nn.vit`.

    It may stand alone, or among other parts below any prefix. TeacherWeightsError if there is no encoder, or several of
    equal standing.
    """
    inner = strip_wrappers(below(state, encoder_prefix(state, path)), path)
    return from_timm(flat_blocks(inner))


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's spelling of DINOv2 to ours: registers, a table without a position for cls, the packed SwiGLU."""
    state = {"register_tokens" if key == "reg_token" else key: value for key, value in state.items()}
    table = state.get("pos_embed")
    has_cls = table is not None and table.ndim == 3 and "cls_token" in state
    if has_cls and _square(table.shape[1]) and not _square(table.shape[1] - 1):  # cls gets no position
        state["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    first, second = (state.get(f"blocks.0.mlp.fc{n}.weight") for n in (1, 2))
    if first is not None and second is not None and second.ndim == 2 and first.shape[0] == 2 * second.shape[1]:
        return {key.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): v for key, v in state.items()}
    return state


def _square(count: int) -> bool:
    return math.isqrt(count) ** 2 == count
