"""Families of teachers: by name, and by the tensors of a file."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection, MutableMapping
from pathlib import Path

from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.encoder_names import encoder_prefix
from dune_fast.teachers.protocol import Teacher, Trunk
from dune_fast.teachers.vit import ViTTeacher

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
    "clip": "clip.CLIPTeacher",
    "open_clip": "clip.OpenCLIPTeacher",
    "siglip": "siglip.SigLIPTeacher",
    "dinov3": "dinov3.DINOv3Teacher",
    "eupe": "dinov3.EUPETeacher",
    "sam": "sam.SAMTeacher",
    "depth_anything": "depth_anything.DepthAnythingTeacher",
    "depth_anything_v2": "depth_anything.DepthAnythingV2Teacher",
    "radio": "radio.RADIOTeacher",
    "hf_vit": "hf_vit.HFViTTeacher",
    "theia": "hf_vit.TheiaTeacher",
    "timm": "timm_model.TimmTeacher",
    "module": "module_path.ModuleTeacher",
    "onnx_vit": "onnx_vit.OnnxViTTeacher",
    "xfeat": "xfeat.XFeatTeacher",
}

_RECOGNIZED = (
    "clip", "open_clip", "siglip", "sam", "dinov3", "depth_anything", "radio", "theia", "hf_vit", "mast3r", "multihmr",
    "dune", "deit3", "dbotft", "dinov2", "dino",
)  # fmt: skip
"""ViTs told apart by their names of tensors, the most peculiar first; iBOT's are DINO's, UNIC's DUNE's, EUPE's
DINOv3's, those of Depth Anything V2 the first version's."""


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


def vit_family(name: str) -> type[ViTTeacher]:
    """The class of a family of ViTs."""
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
        for name in _RECOGNIZED:
            if vit_family(name).recognizes(names):
                return name
    return None
