"""What a run's projectors ask of its student, its teachers and its images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dune_fast.engine.config_sections import ConfigError
from dune_fast.projectors.base import KINDS, StudentShape, blocks_read, build_projector
from dune_fast.projectors.sak import check_levels

if TYPE_CHECKING:
    from dune_fast.engine.config import RunConfig


def check_projectors(cfg: RunConfig) -> None:
    """ConfigError if there is no such kind or field, or a teacher's projector cannot be built, or not used."""
    if cfg.projector.kind not in KINDS:
        raise ConfigError(f"projector.kind={cfg.projector.kind!r}; choose one of {', '.join(KINDS)}")
    if unknown := sorted(set(cfg.projector.teachers) - set(cfg.teachers)):
        known = ", ".join(sorted(cfg.teachers))
        raise ConfigError(f"projector.teachers has {', '.join(unknown)}; this run's teachers are: {known}")
    try:
        of_teacher = {name: cfg.projector.of(name) for name in cfg.teachers}
        blocks_read(cfg.projector, cfg.student.depth)
        if cfg.projector.kind == "sak":
            check_levels(cfg.projector, cfg.teacher_features)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for name, own in of_teacher.items():
        if own.kind == "heads" and own.patch_head.upsample > 1 and cfg.objective.patch_share < 1:
            raise ConfigError(
                f"objective.patch_share={cfg.objective.patch_share:g} with upsample={own.patch_head.upsample} in the "
                f"head of {name}: a subset of patches has no finer grid; choose one of the two"
            )
        if own.kind == "theia":
            _check_translator(cfg, name)


def _check_translator(cfg: RunConfig, name: str) -> None:
    """Theia's projectors know one size of images."""
    student, projector = cfg.student, cfg.projector.of(name)
    if cfg.progressive or cfg.image_size != student.image_size:
        other = "progressive" if cfg.progressive else f"student.image_size={student.image_size}"
        raise ConfigError(
            f"projector.kind=theia with image_size={cfg.image_size} and {other}: its translators are for one size of "
            "images; set student.image_size to image_size, and leave progressive out"
        )
    shape = StudentShape(
        student.embed_dim, student.depth, student.num_heads, student.cls_token, student.image_size // student.patch_size
    )
    try:
        with torch.device("meta"):
            build_projector(projector, shape, cfg.teacher_features[name])
    except (ValueError, AssertionError) as error:  # torch asserts that heads divide channels
        raise ConfigError(f"teacher {name!r}: {error}") from None
