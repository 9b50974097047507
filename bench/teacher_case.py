"""Reference cases of kind `teacher`: a file in a published container and the features of what it holds.

The file goes through registry and ensemble, as in a run. An image called `from_student_HxW` is at the student's
resolution, and the ensemble resizes it; any other is at the teacher's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.case import Case, Check, compare
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.rope2d import grid_positions
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.registry import family_class

STUDENT_PATCH_SIZE = 14
FROM_STUDENT = "from_student_"
TOKENS = {"cls": "x_norm_clstoken", "patch": "x_norm_patchtokens"}
"""Token type of the ensemble -> its name in a case."""


def teacher_config(case: Case) -> TeacherConfig:
    """The configuration that a run would have for this case's file."""
    info = case.info
    mean, std = family_class(info["family"]).statistics
    names = {key.rsplit("/", 1)[-1] for key in case.tensors}
    return TeacherConfig(
        family=info["family"],
        weights=str(case.path.parent / info["file"]),
        patch_size=info["patch_size"],
        num_features=info["num_features"],
        token_types=[kind for kind, name in TOKENS.items() if name in names],
        mean=list(mean),
        std=list(std),
        num_heads=info.get("num_heads"),
        num_registers=info.get("num_register_tokens"),
        interpolate_offset=info.get("interpolate_offset"),
        interpolate_antialias=info.get("interpolate_antialias"),
    )


def run_teacher(case: Case) -> list[Check]:
    """Errors of every feature that the case names; positions and the resized image too, where it holds them."""
    info, cfg = case.info, teacher_config(case)
    ensembles = {q: TeacherEnsemble({"teacher": cfg}, q) for q in {cfg.patch_size, student_patch_size(case)}}
    checks: list[Check] = []
    for size in info["sizes"]:
        patch = student_patch_size(case) if size.startswith(FROM_STUDENT) else cfg.patch_size
        ours = features(ensembles[patch], case[f"{size}/image"], cfg)
        expected = case.under(size)
        expected.pop("image")
        checks += compare(ours, expected, under=f"{size}/")
    return checks


def student_patch_size(case: Case) -> int:
    """Patch size of the student whose images are called `from_student_*`."""
    return case.info.get("student_patch_size", STUDENT_PATCH_SIZE)


def features(ensemble: TeacherEnsemble, images: Tensor, cfg: TeacherConfig) -> dict[str, Tensor]:
    """Everything that a case may name: the ensemble's tokens, and the network's own features of the same input."""
    seen: list[Tensor] = []
    teacher = ensemble.teachers["teacher"]
    handle = teacher.trunk.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = ensemble(images)["teacher"]
    handle.remove()
    (inputs,) = seen
    vit = teacher.trunk.vit
    with torch.no_grad():
        ours = vit(inputs)
        (ours["intermediate_last"],) = vit.get_intermediate_layers(inputs, 1)
    for kind, x in tokens.items():
        ours[TOKENS[kind]] = x
    ours["positions"] = grid_positions(*vit.grid(inputs), device=inputs.device).expand(len(inputs), -1, -1)
    mean, std, own_mean, own_std = (
        torch.tensor(list(v)).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD, cfg.mean, cfg.std)
    )
    ours["resized"] = (inputs * own_std + own_mean - mean) / std  # as the student normalises
    return ours
