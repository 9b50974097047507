"""Multi-HMR's encoder, a DINOv2 ViT without registers that was fine-tuned to find people.

Baradel et al., "Multi-HMR: Multi-Person Whole-Body Human Mesh Recovery in a Single Shot", ECCV 2024. The rest of the
model, which turns the tokens into bodies, is ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from dune_fast.teachers.containers import below
from dune_fast.teachers.vit import ViTTeacher

_PREFIX = "backbone.encoder."


class MultiHMRTeacher(ViTTeacher):
    """Tokens after the encoder's final norm. DUNE distils the patches."""

    layer_scale = True

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        return any(key.startswith(_PREFIX) for key in keys)

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        return below(state, _PREFIX)
