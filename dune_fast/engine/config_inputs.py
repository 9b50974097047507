"""Checks of what goes into student and teachers: sizes of images, grids, stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dune_fast.dali_pipelines.datasets import DataConfig
from dune_fast.engine.config_sections import ConfigError
from dune_fast.kernels.nn.vit import nearest_multiples
from dune_fast.teachers.config import TeacherConfig, seen


def check_sizes(sizes: Mapping[str, int], patch: int, teachers: Mapping[str, TeacherConfig]) -> None:
    """ConfigError if the student or a teacher cannot take images of some size.

    Args:
        sizes: field -> side of the student's images in pixels.
        patch: the student's patch size.
    """
    for field, size in sizes.items():
        if size % patch:
            raise ConfigError(
                f"{field}={size} is not a multiple of the student's patch size {patch}; the nearest are "
                f"{nearest_multiples(size, patch)}"
            )
        grid = size // patch
        for name, teacher in teachers.items():
            own = teacher.input_size is not None or teacher.mosaic
            if not own and grid % teacher.grid_multiple:
                raise ConfigError(
                    f"{field}={size} gives a grid of {grid} patches, but teacher {name!r} needs a "
                    f"multiple of {teacher.grid_multiple}; the nearest image sizes are "
                    f"{nearest_multiples(size, patch * teacher.grid_multiple)}"
                )
            if teacher.mosaic and not seen(teacher, grid).images:
                raise ConfigError(
                    f"{field}={size} gives teacher {name!r} images of {grid * teacher.patch_size} px, which do not fit "
                    f"on a canvas of teachers.{name}.mosaic={teacher.mosaic}: choose a smaller "
                    f"teachers.{name}.input_size, or mosaic=0"
                )


def check_own_grids(
    teachers: Mapping[str, TeacherConfig], shares: Mapping[str, float], sizes: Mapping[str, int], patch: int,
    finer: Mapping[str, int],
) -> None:  # fmt: skip
    """ConfigError if patches that stay on a teacher's own grid do not go with the student's.

    Args:
        shares: field -> share of the student's patches that is taken.
        sizes, patch: see `check_sizes`.
        finer: teacher -> how many times the student's rows its projection has, where that has to be the teacher's grid.
    """
    for name, teacher in teachers.items():
        if teacher.grid != "own" or "patch" not in teacher.token_types:
            continue
        for field, share in shares.items():
            if share < 1:
                raise ConfigError(
                    f"teachers.{name}.grid=own with {field}={share:g}: a share of the patches is one of the student's "
                    "grid; set it to 1, or the teacher's grid to student"
                )
        for field, size in sizes.items():
            given, own = size // patch * finer.get(name, 0), seen(teacher, size // patch).grid
            if name in finer and given != own:
                raise ConfigError(
                    f"teachers.{name}.grid=own gives {own} x {own} patches, and at {field}={size} the student's "
                    f"projection has {given} x {given}: choose objective.align, which brings them together, a "
                    "projector that gives the teacher's grid, or grid=student"
                )


def check_crops(
    data: DataConfig, teachers: Mapping[str, TeacherConfig], align: str, cache: str, zooms: Sequence[Sequence[float]],
    moves: bool,
) -> None:  # fmt: skip
    """ConfigError if teachers' own crops or sizes do not go with the loss, `objective.align`, or with the folder of a
    cache.

    Args:
        zooms, moves: of `config_stages.teacher_zooms` and `moves_teachers`.
    """
    for name, teacher in teachers.items():
        if teacher.input_sizes and cache:
            raise ConfigError(
                f"teachers.{name}.input_sizes={list(teacher.input_sizes)} with cache.folder={cache!r}: a cache holds "
                "features of one size; leave one of them out"
            )
        if teacher.input_sizes and teacher.grid == "own" and not align:
            raise ConfigError(
                f"teachers.{name}.input_sizes={list(teacher.input_sizes)} with grid=own gives other grids from step to "
                "step: choose objective.align, which brings them to the student's, or grid=student"
            )
    if data.teacher_views and cache:
        raise ConfigError(
            f"data.teacher_views=true with cache.folder={cache!r}: a cache holds features of the student's crops; "
            "leave one of them out"
        )
    if moves and not align:
        raise ConfigError(
            f"data.teacher_views=true with teacher_zoom={' and '.join(map(str, zooms))} and teacher_shift="
            f"{data.teacher_shift:g}: teachers see other parts of an image than the student; choose objective.align, "
            "which compares what both see, e.g. objective.align=teacher"
        )
