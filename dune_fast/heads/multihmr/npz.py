"""Archives of arrays (`.npz`) from anywhere, read without unpickling anything.

Members, shapes and sizes are checked by the arrays' headers before an array is unpacked; arrays that nobody asked for
are never touched, and a small file that is said to unpack to a large one is refused.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from dune_fast.teachers.files import member_fault

Shape = tuple[int | str, ...]
"""Sizes of an array; a letter stands for a size that the file chooses, the same in all of its arrays."""


_UNPACKED_FACTOR = 20  # the official body model's is 2; people that stand still compress to a tenth
_UNPACKED_FLOOR = 1 << 26  # bytes


class NpzError(ValueError):
    """What is wrong with an archive, as half a sentence; the caller says which file that is and what to do."""


def read_npz(
    path: Path, shapes: Mapping[str, Shape], optional: Mapping[str, Shape], most: Mapping[str, int],
    text: Collection[str] = (),
) -> dict[str, np.ndarray]:  # fmt: skip
    """Arrays by name, as stored and not writable; those of `optional` where the file has them.

    Args:
        path: of the archive.
        shapes: arrays that must be there.
        optional: arrays that may be there.
        most: largest size that a letter may stand for.
        text: arrays of strings; all others hold numbers.

    Raises:
        NpzError: no such archive, damaged, without an array, or one of them has another shape or type.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if fault := member_fault(members):
                raise NpzError(f"it has {fault}")
            names = {member.filename: member for member in members}
            if missing := [name for name in shapes if f"{name}.npy" not in names]:
                raise NpzError(f"it lacks the arrays {', '.join(missing)}")
            wanted = {**shapes, **{name: shape for name, shape in optional.items() if f"{name}.npy" in names}}
            unpacked = sum(names[f"{name}.npy"].file_size for name in wanted)
            if unpacked > max(_UNPACKED_FACTOR * path.stat().st_size, _UNPACKED_FLOOR):
                raise NpzError(f"{path.stat().st_size} bytes are said to unpack to {unpacked}")
            sizes: dict[str, int] = {}
            arrays = {}
            for name, shape in wanted.items():
                member = names[f"{name}.npy"]
                with archive.open(member) as handle:
                    try:
                        arrays[name] = _array(handle, member.file_size, shape, sizes, most, name in text)
                    except ValueError as error:
                        raise NpzError(f"{name} {error}") from error
            return arrays
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError,
            MemoryError, SyntaxError) as error:  # fmt: skip
        raise NpzError(str(error) or type(error).__name__) from error


def _array(
    handle: IO[bytes], size: int, wanted: Shape, sizes: dict[str, int], most: Mapping[str, int], text: bool
) -> np.ndarray:  # fmt: skip
    """One array, after its header says the expected shape and type and its member is as long as that needs."""
    version = np.lib.format.read_magic(handle)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"is of version {version} of the format")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(handle)
    if dtype.kind != "U" if text else dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise ValueError(f"holds {dtype}, not {'text' if text else 'numbers'}")
    known = [sizes.get(n, n) if isinstance(n, str) else n for n in wanted]
    if len(shape) != len(known) or any(
        not 0 <= found <= most[n] if isinstance(n, str) else found != n for found, n in zip(shape, known, strict=True)
    ):
        raise ValueError(f"is {list(shape)}, expected [{', '.join(map(str, known))}]")
    sizes |= {n: found for n, found in zip(wanted, shape, strict=True) if isinstance(n, str)}
    count = math.prod(shape)
    if handle.tell() + count * dtype.itemsize != size:
        raise ValueError(f"claims {count} values, which its {size} bytes are not")
    content = handle.read(count * dtype.itemsize)
    if len(content) != count * dtype.itemsize:
        raise ValueError("is truncated")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
