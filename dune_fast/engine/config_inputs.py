"""Checks of what goes into student and teachers: sizes of images, grids, stages."""

from __future__ import annotations

from collections.abc import Mapping

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


def check_own_grids(teachers: Mapping[str, TeacherConfig], shares: Mapping[str, float]) -> None:
    """ConfigError if a share of the patches (field -> share) is to be taken of a grid that is not the student's."""
    for name, teacher in teachers.items():
        for field, share in shares.items():
            if teacher.grid == "own" and share < 1:
                raise ConfigError(
                    f"teachers.{name}.grid=own with {field}={share:g}: a share of the patches is one of the student's "
                    "grid; set it to 1, or the teacher's grid to student"
                )
