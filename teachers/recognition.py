"""Which family of ViT teachers a file belongs to: one rule for `dune-fast teachers verify` and `load_encoder`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.encoder_names import encoder_prefix
from dune_fast.teachers.registry import family_class
from dune_fast.teachers.vit import ViTTeacher

VIT_FAMILIES = ("mast3r", "multihmr", "dune", "deit3", "dbotft", "dinov2", "dino")
"""Families told apart by their names of tensors, the most peculiar first; iBOT's are DINO's, UNIC's DUNE's."""


def vit_family(name: str) -> type[ViTTeacher]:
    """The class of one of `VIT_FAMILIES`."""
    family = family_class(name)
    assert issubclass(family, ViTTeacher)
    return family


def recognize(keys: Collection[str], path: Path | str = "") -> str | None:
    """The family that a state dict's names (wrappers stripped) belong to, None if none.

    What stands below a prefix other than those of a family's own release is judged without it.
    """
    try:
        prefix = encoder_prefix(keys, path)
    except TeacherWeightsError:
        prefix = ""
    inner = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    for names in (keys, inner):
        for name in VIT_FAMILIES:
            if vit_family(name).recognizes(names):
                return name
    return None
