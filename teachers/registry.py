"""Families of teachers by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, MutableMapping

from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.protocol import Teacher, Trunk

# One line a family. A module is imported when its family is asked for, so a package that only one teacher needs is
# not needed by the others.
_MODULES = {
    "dinov2": "dune_fast.teachers.dinov2",
    "mast3r": "dune_fast.teachers.mast3r",
    "multihmr": "dune_fast.teachers.multihmr",
    "dino": "dune_fast.teachers.unic",
    "ibot": "dune_fast.teachers.unic",
    "deit3": "dune_fast.teachers.unic",
    "dbotft": "dune_fast.teachers.unic",
    "dune": "dune_fast.teachers.dune",
    "unic": "dune_fast.teachers.dune",
    "timm": "dune_fast.teachers.timm_model",
    "module": "dune_fast.teachers.module_path",
    "onnx_vit": "dune_fast.teachers.onnx_vit",
    "xfeat": "dune_fast.teachers.xfeat",
}

_FAMILIES: dict[str, type[Teacher]] = {}


class UnknownTeacherError(ValueError):
    """A configuration names a family that does not exist."""


def register(family: str) -> Callable[[type[Teacher]], type[Teacher]]:
    """Class decorator: `family` in a teacher's configuration means this class."""

    def add(teacher: type[Teacher]) -> type[Teacher]:
        if (other := _FAMILIES.get(family)) not in (None, teacher):
            raise ValueError(f"the teacher family {family!r} is taken by {other.__module__}.{other.__qualname__}")
        _FAMILIES[family] = teacher
        return teacher

    return add


def families() -> list[str]:
    """Names that a configuration may use."""
    return sorted({*_MODULES, *_FAMILIES})


def build_teacher(name: str, cfg: TeacherConfig, trunks: MutableMapping[str, Trunk] | None = None) -> Teacher:
    """The teacher that `cfg` describes, weights loaded, on the CPU. Trunks are shared by `trunks`, see `Teacher`.

    Raises:
        UnknownTeacherError: `cfg.family` is not registered.
        ValueError: the configuration contradicts itself or the weights.
        TeacherWeightsError: the weights are missing, damaged or of another model.
    """
    check_family(name, cfg.family)
    return family_class(cfg.family)(name, cfg, trunks)


def family_class(family: str) -> type[Teacher]:
    """The class of a family that exists, its module imported."""
    if family not in _FAMILIES:
        importlib.import_module(_MODULES[family])
    return _FAMILIES[family]


def check_family(name: str, family: str) -> None:
    """UnknownTeacherError, with the close names, if no family is called that."""
    if family not in families():
        close = difflib.get_close_matches(family, families(), n=2)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise UnknownTeacherError(
            f"teachers.{name}.family is {family!r}, which does not exist; {hint}allowed: {', '.join(families())}"
        )
