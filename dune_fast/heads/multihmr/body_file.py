"""The file of an SMPL-X body model, which every user gets by registering: read without unpickling anything.

It is an archive of arrays. Its members, their shapes and their sizes are checked by their headers before an array is
unpacked, and arrays that the layer does not need, some of them pickled objects, are never touched.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from dune_fast.teachers.files import member_fault

SITE = "https://smpl-x.is.tue.mpg.de"
"""Where one registers for the body model."""

JOINTS = 55
VERTICES = 10475
"""Of the official model."""

_MOST = {"V": 1 << 17, "F": 1 << 18, "S": 1024}
_SHAPES = {
    "v_template": ("V", 3), "shapedirs": ("V", 3, "S"), "posedirs": ("V", 3, 9 * (JOINTS - 1)),
    "J_regressor": (JOINTS, "V"), "weights": ("V", JOINTS), "kintree_table": (2, JOINTS), "f": ("F", 3),
    "lmk_faces_idx": (51,), "lmk_bary_coords": (51, 3), "hands_meanl": (45,), "hands_meanr": (45,),
}  # fmt: skip
_OPTIONAL = {"vertex_ids": (21,)}  # of other models than the official one: the vertices that are joints, too


class BodyModelError(ValueError):
    """The body model is missing, damaged or another one; the message says where to get it."""


def how_to_get() -> str:
    """Half a sentence on where the body model comes from."""
    return (
        f"register at {SITE}, accept its licence (non-commercial, no redistribution), download SMPL-X and give the "
        "path of SMPLX_NEUTRAL.npz"
    )


def read_body_file(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a model that the layer needs, see `smplx.BodyModel`; float64, float32 or integers as stored.

    BodyModelError if there is no such file, or it is not an SMPL-X model in `.npz` format.
    """
    path = Path(path)
    if path.is_dir():
        found = [p for p in (path / "SMPLX_NEUTRAL.npz", path / "smplx" / "SMPLX_NEUTRAL.npz") if p.is_file()]
        if not found:
            raise BodyModelError(f"the folder {path} holds no SMPLX_NEUTRAL.npz: {how_to_get()}")
        path = found[0]
    if not path.is_file():
        raise BodyModelError(f"there is no body model {path}: {how_to_get()}")
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path)
    except zipfile.BadZipFile as error:
        with open(path, "rb") as handle:
            pickled = handle.read(1) == b"\x80"
        if pickled or path.suffix == ".pkl":
            raise BodyModelError(
                f"{path} is a pickle, which is not read, since that could run code; take the .npz beside it: "
                f"{how_to_get()}"
            ) from error
        raise _wrong(path, str(error)) from error
    except (OSError, EOFError, zlib.error, struct.error, NotImplementedError, RuntimeError, MemoryError) as error:
        raise _wrong(path, str(error) or type(error).__name__) from error


def _wrong(path: Path, reason: str) -> BodyModelError:
    return BodyModelError(f"{path} is no SMPL-X body model ({reason}): {how_to_get()}")


def _read(archive: zipfile.ZipFile, path: Path) -> dict[str, np.ndarray]:
    """All arrays; sizes V, F and S are those of the first array that has them."""
    members = archive.infolist()
    if fault := member_fault(members):
        raise _wrong(path, f"it has {fault}")
    names = {member.filename: member for member in members}
    if missing := [name for name in _SHAPES if f"{name}.npy" not in names]:
        raise _wrong(path, f"it lacks the arrays {', '.join(missing)}")
    sizes: dict[str, int] = {}
    arrays = {}
    for name, shape in {**_SHAPES, **{k: v for k, v in _OPTIONAL.items() if f"{k}.npy" in names}}.items():
        member = names[f"{name}.npy"]
        with archive.open(member) as handle:
            try:
                arrays[name] = _array(handle, member.file_size, shape, sizes)
            except ValueError as error:
                raise _wrong(path, f"{name} {error}") from error
    _check_values(arrays, path)
    return arrays


def _array(handle: IO[bytes], size: int, wanted: tuple[int | str, ...], sizes: dict[str, int]) -> np.ndarray:
    """One array after its header says the expected shape and type, and the member is as long as that needs."""
    version = np.lib.format.read_magic(handle)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"is of version {version} of the format")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(handle)
    if dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise ValueError(f"holds {dtype}, not numbers")
    expected = tuple(
        n if isinstance(n, int) else sizes.get(n, shape[i] if i < len(shape) else -1) for i, n in enumerate(wanted)
    )
    if shape != expected or any(isinstance(n, str) and not 0 < shape[i] <= _MOST[n] for i, n in enumerate(wanted)):
        letters = ", ".join(str(sizes.get(str(n), n)) for n in wanted)
        raise ValueError(f"is {list(shape)}, expected [{letters}]")
    sizes |= {n: shape[i] for i, n in enumerate(wanted) if isinstance(n, str)}
    count = math.prod(shape)
    if handle.tell() + count * dtype.itemsize != size:
        raise ValueError(f"claims {count} values, which its {size} bytes are not")
    content = handle.read(count * dtype.itemsize)
    if len(content) != count * dtype.itemsize:
        raise ValueError("is truncated")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _check_values(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Indices inside their ranges, joints after their parents, numbers finite."""
    vertices, faces = len(arrays["v_template"]), len(arrays["f"])
    for name, top in (("f", vertices), ("lmk_faces_idx", faces), ("vertex_ids", vertices)):
        if name in arrays and (arrays[name].dtype.kind not in "iu" or int(arrays[name].min()) < 0):
            raise _wrong(path, f"{name} is not a list of indices")
        if name in arrays and int(arrays[name].max()) >= top:
            raise _wrong(path, f"{name} points past the last of {top}")
    parents = arrays["kintree_table"][0].astype(np.float64)  # the root's is 2^32 - 1 or -1
    if not all(0 <= p < i for i, p in enumerate(parents[1:], 1)):
        raise _wrong(path, "kintree_table has a joint before its parent")
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise _wrong(path, f"{name} has values that are not finite")
