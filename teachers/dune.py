"""Distilled encoders as teachers: DUNE's and UNIC's releases, and what a run of this project has written.

Sariyildiz et al., "DUNE: Distilling a Universal Encoder from Heterogeneous 2D and 3D Teachers", CVPR 2025, and "UNIC",
ECCV 2024. One reader serves teachers, `dune_fast.load_encoder` and the warm start of a run: whatever surrounds the
encoder (projectors, teachers' statistics, optimizer) is left out, and every spelling of its names that such files have
ends in those of `dune_fast.nn.vit`.

UNIC's container is read by what such containers have in common; it was not compared with an official file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from teachers.containers import TeacherWeightsError, below, strip_wrappers
from teachers.registry import register
from teachers.vit import ViTTeacher

_ANCHOR = "patch_embed.proj.weight"
"""The name that every encoder has: what stands before it is the encoder's prefix."""
_PREFIXES = ("", "encoder.", "backbone.", "teacher.", "student.")
"""Which one is taken where a file has several encoders, the first of them first."""


def flat_blocks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released names to ours: the chunk index before the block index goes (`blocks.0.N.`), so does the mask token."""
    return {
        re.sub(r"((?:^|\bencoder\.)blocks)\.\d+(\.\d+\.)", r"\1\2", key): value
        for key, value in state.items()
        if not key.endswith("mask_token")
    }


def encoder_state(state: Mapping[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """The tensors of the one encoder in a state dict, under the names of `dune_fast.nn.vit`.

    Args:
        state: an encoder alone, or one among other parts below any prefix (`encoder.`, `backbone.`, ...), wrapped by
            DistributedDataParallel or torch.compile or not, blocks in chunks (`blocks.0.N.`) or flat.
        path: the source, for error messages.

    Raises:
        TeacherWeightsError: there is no encoder in it, or several of equal standing.
    """
    state = strip_wrappers(state)
    found = [key.removesuffix(_ANCHOR) for key in state if key == _ANCHOR or key.endswith(f".{_ANCHOR}")]
    if not found:
        parts = ", ".join(sorted({key.split(".")[0] for key in state})[:8])
        raise TeacherWeightsError(
            f"{path} lacks the tensor {_ANCHOR}, so there is no ViT's encoder in it (what it has begins with: {parts})"
        )
    known = [prefix for prefix in _PREFIXES if prefix in found]
    if len(found) > 1 and not known:
        raise TeacherWeightsError(
            f"{path} has several encoders, below {', '.join(map(repr, found))}; save the wanted one alone"
        )
    return flat_blocks(strip_wrappers(below(state, known[0] if known else found[0])))


@register("dune")
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
        return f"encoder.{_ANCHOR}" in keys or any(key.startswith("blocks.0.0.") for key in keys)

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        return encoder_state(state, path)


@register("unic")
class UNICTeacher(DUNETeacher):
    """As DUNE's; see the note on UNIC's container at the top of the file."""
