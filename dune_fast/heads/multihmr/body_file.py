"""The file of an SMPL-X body model, which every user gets by registering: read without unpickling anything.

It is an archive of arrays, read by `npz`. Arrays that the layer does not need, some of them pickled objects, are never
touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dune_fast.heads.multihmr.npz import NpzError, read_npz

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


def find_body_file(path: Path) -> Path:
    """The file that a path stands for: itself, or in a folder its SMPLX_NEUTRAL.npz; BodyModelError without one."""
    path = Path(path)
    if path.is_dir():
        found = [p for p in (path / "SMPLX_NEUTRAL.npz", path / "smplx" / "SMPLX_NEUTRAL.npz") if p.is_file()]
        if not found:
            raise BodyModelError(f"the folder {path} holds no SMPLX_NEUTRAL.npz: {how_to_get()}")
        return found[0]
    if not path.is_file():
        raise BodyModelError(f"there is no body model {path}: {how_to_get()}")
    return path


def read_body_file(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a model that the layer needs, see `smplx.BodyModel`; float64, float32 or integers as stored.

    BodyModelError if there is no such file, or it is not an SMPL-X model in `.npz` format.
    """
    path = find_body_file(path)
    try:
        with open(path, "rb") as handle:
            pickled = handle.read(1) == b"\x80" or path.suffix == ".pkl"
        if pickled:
            raise BodyModelError(
                f"{path} is a pickle, which is not read, since that could run code; take the .npz beside it: "
                f"{how_to_get()}"
            )
        arrays = read_npz(path, _SHAPES, _OPTIONAL, _MOST)
        _check_values(arrays)
    except (OSError, NpzError) as error:
        raise BodyModelError(f"{path} is no SMPL-X body model ({error}): {how_to_get()}") from error
    return arrays


def _check_values(arrays: Mapping[str, np.ndarray]) -> None:
    """Indices inside their ranges, joints after their parents, numbers finite; NpzError."""
    vertices, faces = len(arrays["v_template"]), len(arrays["f"])
    if not vertices or not faces:
        raise NpzError("it has no vertices or no faces")
    for name, top in (("f", vertices), ("lmk_faces_idx", faces), ("vertex_ids", vertices)):
        if name in arrays and (arrays[name].dtype.kind not in "iu" or int(arrays[name].min()) < 0):
            raise NpzError(f"{name} is not a list of indices")
        if name in arrays and int(arrays[name].max()) >= top:
            raise NpzError(f"{name} points past the last of {top}")
    parents = arrays["kintree_table"][0].astype(np.float64)  # the root's is 2^32 - 1 or -1
    if not all(0 <= p < i for i, p in enumerate(parents[1:], 1)):
        raise NpzError("kintree_table has a joint before its parent")
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise NpzError(f"{name} has values that are not finite")
