"""What a student's options ask of the rest of a run."""

from __future__ import annotations

from dune_fast.engine.config_sections import ConfigError
from dune_fast.kernels.nn.radio import check_options
from dune_fast.kernels.nn.radio_options import RADIOOptions
from dune_fast.kernels.nn.windows import fitting_sizes
from dune_fast.student import StudentConfig


def check_student(student: StudentConfig, image_size: int, compiled: bool) -> None:
    """ConfigError for options of RADIO's family that do not go with each other, or with the run's images.

    Args:
        image_size: of the run, in pixels.
        compiled: `train.compile`.
    """
    radio = student.radio
    if student.family != "radio":
        unread = [name for name, value in vars(radio).items() if value != getattr(RADIOOptions(), name)]
        if unread:
            raise ConfigError(
                f"student.radio.{unread[0]}={getattr(radio, unread[0])} with student.family={student.family}, which "
                "does not read it: choose student.family=radio, or leave it out"
            )
        return
    try:
        check_options(student)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if 0 < radio.cpe_max_size == student.image_size:
        raise ConfigError(
            f"student.radio.cpe_max_size={radio.cpe_max_size} is student.image_size, so positions are not cropped: "
            "lower student.image_size to the run's images, or set cpe_max_size=0 for a table without cropping"
        )
    if compiled and (radio.window_sizes or radio.spectral):
        raise ConfigError(
            "train.compile=true with student.radio.window_sizes or student.radio.spectral: blocks are compiled anew "
            "for every size of window and every power iteration; choose one of the two"
        )
    if radio.window_sizes:
        grid = (image_size // student.patch_size,) * 2
        if not fitting_sizes(radio.window_sizes, grid):
            raise ConfigError(
                f"student.radio.window_sizes={list(radio.window_sizes)}: none divides the {grid[0]} x {grid[1]} "
                f"patches of image_size={image_size} and is smaller; choose others, or [] for whole attention"
            )
