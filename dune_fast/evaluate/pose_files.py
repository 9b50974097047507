"""Files of camera poses: lines of numbers after the names of images, and submissions to the map-free benchmark."""

from __future__ import annotations

import io
import logging
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from dune_fast.teachers.files import member_fault

logger = logging.getLogger(__name__)

_LARGEST = 64 << 20  # bytes of a file of poses


class PoseFileError(ValueError):
    """A file of poses, or what belongs to it, cannot be used; the message says why."""


class Pose(NamedTuple):
    """A line of a file of poses."""

    quaternion: tuple[float, float, float, float]
    """w, x, y, z; of any length but 0."""
    translation: tuple[float, float, float]
    """Metres."""
    confidence: float = 0.0


def read_poses(text: str, path: Path, fields: int) -> dict[int, Pose]:
    """Frame -> pose of a file's lines; those that are no pose are ignored, as the benchmark does, with a warning."""
    found: dict[int, Pose] = {}
    ignored = 0
    for line in filter(str.strip, text.splitlines()):
        number, pose = frame_number(line.split()[0]), _pose(line.split(), 1, fields)
        if line.startswith("#"):
            continue
        if number is None or pose is None:
            ignored += 1
        else:
            found[number] = pose
    if ignored:
        logger.warning("%s: %d lines are not `frame` and %d finite numbers; ignored", path, ignored, fields - 1)
    return found


def read_pairs(path: Path, strict: bool = False) -> dict[tuple[str, str], Pose]:
    """(first, second) -> pose of a file of `measure_poses`.

    A line that is no pose is ignored with a warning, or PoseFileError with `strict`.
    """
    found, ignored = {}, 0
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        if (pose := _pose(words, 2, 9)) is not None:
            found[words[0], words[1]] = pose
        elif strict:
            raise PoseFileError(f"{path}, line {number}, is not `first second qw qx qy qz tx ty tz`: {line[:80]!r}")
        else:
            ignored += 1
    if ignored:
        logger.warning("%s: %d lines are not two names and 7 finite numbers; ignored", path, ignored)
    return found


def read_intrinsics(path: Path) -> dict[str, tuple[float, ...]]:
    """Name of an image -> fx, fy, cx, cy, width, height in pixels. PoseFileError for a line that is none."""
    found = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *words = line.split()
        values = _floats(words)
        if values is None or len(values) != 6 or min(*values[:2], *values[4:]) <= 0:
            raise PoseFileError(f"{path}, line {number}, is not `frame fx fy cx cy W H`: {line[:80]!r}")
        found[name] = tuple(values)
    return found


def submission_bytes(scenes: Mapping[str, Iterable[tuple[str, Pose]]]) -> bytes:
    """A submission as a zip: scene -> (frame's name, pose)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for scene, poses in scenes.items():
            lines = [
                " ".join([name, *(f"{v:.9g}" for v in (*p.quaternion, *p.translation, p.confidence))])
                for name, p in poses
            ]
            archive.writestr(f"pose_{scene}.txt", "\n".join(lines) + "\n")
    return file.getvalue()


def read_submission(path: Path) -> dict[str, str]:
    """Scene -> text of its file."""
    if path.is_dir():
        return {file.stem.removeprefix("pose_"): read_text(file) for file in sorted(path.glob("pose_*.txt"))}
    if not path.is_file():
        raise PoseFileError(f"there is no submission {path}: give a folder of pose_SCENE.txt, or a zip of them")
    try:
        with zipfile.ZipFile(path) as archive:
            if fault := member_fault(archive.infolist()):
                raise PoseFileError(f"{path} has {fault}; it is not read")
            members = {Path(m.filename).stem.removeprefix("pose_"): m for m in archive.infolist()
                       if re.fullmatch(r"(?:.*/)?pose_[^/]+\.txt", m.filename)}  # fmt: skip
            if sum(m.file_size for m in members.values()) > _LARGEST:
                raise PoseFileError(f"{path} would have more than {_LARGEST >> 20} MiB of poses; it is not read")
            return {scene: archive.read(member).decode(errors="replace") for scene, member in members.items()}
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise PoseFileError(f"{path} is no zip file that can be read ({error}): make it again") from error


def read_text(path: Path) -> str:
    """A file's text; PoseFileError if it cannot be read or is far too large."""
    try:
        if path.stat().st_size > _LARGEST:
            raise PoseFileError(f"{path} has more than {_LARGEST >> 20} MiB: no file of poses is so large")
        return path.read_text(errors="replace")
    except OSError as error:
        raise PoseFileError(f"{path} cannot be read: {error.strerror}") from error


def frame_number(name: str) -> int | None:
    """The last number in the name of a frame, 35 of seq1/frame_00035.jpg; None if there is none."""
    found = re.findall(r"[0-9]+", name.rpartition("/")[2])
    return int(found[-1]) if found and len(found[-1]) < 18 else None


def _floats(words: list[str]) -> list[float] | None:
    """Numbers, None if one is none or not finite."""
    try:
        values = [float(word) for word in words]
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None


def _pose(words: list[str], names: int, fields: int) -> Pose | None:
    """The pose after the names of a line of so many fields, None if there is none."""
    values = _floats(words[names:]) if len(words) == fields else None
    if values is None or not any(values[:4]):
        return None
    return Pose(tuple(values[:4]), tuple(values[4:7]), *values[7:])
