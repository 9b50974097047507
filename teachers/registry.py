"""Families of teachers by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import MutableMapping

from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.protocol import Teacher, Trunk

# One line a family: file and class. A file is imported when its family is asked for, so a package that only one
# teacher needs is not needed by the others.
_FAMILIES = {
    "dinov2": "dinov2.DINOv2Teacher",
    "mast3r": "mast3r.MASt3RTeacher",
    "multihmr": "multihmr.MultiHMRTeacher",
    "dino": "unic.DINOTeacher",
    "ibot": "unic.IBOTTeacher",
    "deit3": "unic.DeiT3Teacher",
    "dbotft": "unic.DBOTFineTunedTeacher",
    "dune": "dune.DUNETeacher",
    "unic": "dune.UNICTeacher",
    "timm": "timm_model.TimmTeacher",
    "module": "module_path.ModuleTeacher",
    "onnx_vit": "onnx_vit.OnnxViTTeacher",
    "xfeat": "xfeat.XFeatTeacher",
}


class UnknownTeacherError(ValueError):
    """A configuration names a family that does not exist."""


def families() -> list[str]:
    """Names that a configuration may use."""
    return sorted(_FAMILIES)


def build_teacher(name: str, cfg: TeacherConfig, trunks: MutableMapping[str, Trunk] | None = None) -> Teacher:
    """The teacher that `cfg` describes, weights loaded, on the CPU. Trunks are shared by `trunks`, see `Teacher`.

    UnknownTeacherError if there is no such family; otherwise raises as `Teacher`.
    """
    check_family(name, cfg.family)
    return family_class(cfg.family)(name, cfg, trunks)


def family_class(family: str) -> type[Teacher]:
    """The class of a family that exists, its module imported."""
    file, _, name = _FAMILIES[family].partition(".")
    return getattr(importlib.import_module(f"dune_fast.teachers.{file}"), name)


def check_family(name: str, family: str) -> None:
    """UnknownTeacherError, with the close names, if no family is called that."""
    if family not in families():
        close = difflib.get_close_matches(family, families(), n=2)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise UnknownTeacherError(
            f"teachers.{name}.family is {family!r}, which does not exist; {hint}allowed: {', '.join(families())}"
        )
