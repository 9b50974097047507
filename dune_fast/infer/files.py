"""Images that commands are given, and where their results go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import ImageOps

from dune_fast.dali_pipelines.errors import BrokenImage
from dune_fast.dali_pipelines.images import SUFFIXES, decode
from dune_fast.teachers.local_paths import local_path


class InferenceError(ValueError):
    """Images that cannot be used; the message says which and why."""


def image_files(given: Iterable[str | Path]) -> list[Path]:
    """The images of files and folders, those of a folder sorted, with what is below it.

    InferenceError for a path that is not there, a folder without images, or nothing at all.
    """
    found: list[Path] = []
    for path in (local_path(each, "an image") for each in given):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file())
            if not inside:
                raise InferenceError(f"{path} has no image: no file in it ends in {', '.join(SUFFIXES[:6])} ...")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InferenceError(f"there is no image {path}: give files or folders of images")
    if not found:
        raise InferenceError("no image is given: name files or folders of images")
    return found


def check_names(paths: Sequence[Path]) -> None:
    """InferenceError if two images would write the same files, which have the images' names."""
    seen: dict[str, Path] = {}
    for path in paths:
        if (twin := seen.setdefault(path.stem, path)) != path:
            raise InferenceError(f"{twin} and {path} would write the same files: rename one, or run them apart")


def read_image(path: Path) -> np.ndarray:
    """uint8 [H, W, 3], turned upright by its EXIF orientation; InferenceError if it cannot be read."""
    try:
        return np.array(ImageOps.exif_transpose(decode(np.fromfile(path, np.uint8))))
    except (OSError, ValueError, BrokenImage) as error:
        raise InferenceError(f"{path} cannot be read: {error}") from error


