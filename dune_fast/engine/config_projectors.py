"""What a run's projectors ask of its student, its teachers and its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch

from dune_fast.engine.config_limits import find_fault
from dune_fast.engine.config_sections import ConfigError
from dune_fast.projectors.base import KINDS, StudentShape, TeacherFeatures, blocks_read, build_projector
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.projectors.sak import check_levels
from dune_fast.student import StudentConfig


def check_projectors(
    projector: ProjectorConfig, student: StudentConfig, teachers: Mapping[str, TeacherFeatures], image_size: int,
    progressive: bool, patch_share: float,
) -> None:  # fmt: skip
    """ConfigError if there is no such kind or field, or a teacher's projector cannot be built, or not used.

    Args:
        image_size: of the run, in pixels.
        progressive: whether the run has images of other sizes, too.
        patch_share: of the patches, that the loss is taken on.
    """
    if projector.kind not in KINDS:
        raise ConfigError(f"projector.kind={projector.kind!r}; choose one of {', '.join(KINDS)}")
    if unknown := sorted(set(projector.teachers) - set(teachers)):
        known = ", ".join(sorted(teachers))
        raise ConfigError(f"projector.teachers has {', '.join(unknown)}; this run's teachers are: {known}")
    try:
        of_teacher = {name: projector.of(name) for name in teachers}
        deepest = max(blocks_read(projector, student.depth))
        if projector.kind == "sak":
            check_levels(projector, student.embed_dim, teachers)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if deepest < student.depth - 1:
        raise ConfigError(
            f"projector.which_blocks={projector.which_blocks} ends at block {deepest}, and the student's last one is "
            f"{student.depth - 1}: no loss would reach it; add that block, or set student.depth={deepest + 1}"
        )
    for name, own in of_teacher.items():
        if fault := find_fault(_numbers(own, "projector")):
            raise ConfigError(fault.replace("projector", f"projector.teachers.{name}", 1))
        if own.kind == "heads" and own.patch_head.upsample > 1 and patch_share < 1:
            raise ConfigError(
                f"objective.patch_share={patch_share:g} with upsample={own.patch_head.upsample} in the head of {name}: "
                "a subset of patches has no finer grid; choose one of the two"
            )
        grid = own.source_grid or student.image_size // student.patch_size
        if own.kind == "theia" and (progressive or image_size != grid * student.patch_size):
            raise ConfigError(
                f"projector.kind=theia: its translators are for images of {grid} x {grid} patches, and this run's have "
                f"{image_size // student.patch_size} rows{' and, in parts, fewer' if progressive else ''}: set "
                "projector.source_grid (or student.image_size), and leave progressive and partitions out"
            )
        if own.kind in ("theia", "heads"):
            _check_build(own, student, name, teachers[name])


def _numbers(cfg: Any, path: str) -> dict[str, Any]:
    """Dotted field -> value, of a dataclass and those inside it."""
    found: dict[str, Any] = {}
    for name, value in vars(cfg).items():
        found |= _numbers(value, f"{path}.{name}") if is_dataclass(value) else {f"{path}.{name}": value}
    return found


def _check_build(projector: ProjectorConfig, student: StudentConfig, name: str, teacher: TeacherFeatures) -> None:
    """Whether a translator leads from the student's grid to the teacher's, and heads suit its tokens and channels."""
    grid = student.image_size // student.patch_size
    shape = StudentShape(student.embed_dim, student.depth, student.num_heads, student.cls_token, grid)
    try:
        with torch.device("meta"):
            build_projector(projector, shape, teacher)
    except ValueError as error:
        raise ConfigError(f"teacher {name!r}: {error}") from None
