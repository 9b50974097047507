"""People of an image as an `.npz` file: the ground truth of training, and what `dune-fast infer multihmr` writes.

    root, body, jaw, leye, reye, left_hand, right_hand   axis-angles in radians, [P, n, 3]; n = 1, 21, 1, 1, 1, 15, 15
    betas [P, L], transl [P, 3]                          SMPL-X's shape and translation (metres, the camera's frame)
    K [3, 3]                                             intrinsics in pixels of the image
    expression [P, E], scores [P]                        optional
    v3d [P, V, 3], j3d [P, 127, 3], j2d [P, 127, 2]      optional: vertices, joints, joints in pixels of the image

P may be 0. The root's rotation is inside the model: a body turns about its own pelvis before it is moved by `transl`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.heads.multihmr.npz import NpzError, read_npz
from dune_fast.heads.multihmr.targets import PARTS

_MOST = {"P": 4096, "L": 300, "E": 100, "V": 1 << 17}
_PARAMETERS = {
    **{name: ("P", n, 3) for name, n in PARTS.items()}, "betas": ("P", "L"), "transl": ("P", 3), "K": (3, 3),
}  # fmt: skip
_OPTIONAL = {
    "expression": ("P", "E"), "scores": ("P",), "v3d": ("P", "V", 3), "j3d": ("P", 127, 3), "j2d": ("P", 127, 2),
}  # fmt: skip


def read_people(path: Path) -> dict[str, np.ndarray]:
    """float32 arrays by the names above; DataError if the file is not such a file."""
    try:
        found = read_npz(path, _PARAMETERS, _OPTIONAL, _MOST)
    except NpzError as error:
        raise DataError(
            f"{path} holds no people ({error}); what it should hold says the top of "
            "dune_fast/heads/multihmr/people_files.py"
        ) from error
    arrays = {name: array.astype(np.float32) for name, array in found.items()}
    if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise DataError(f"{path}: {', '.join(bad)} has values that are not finite; correct the file")
    if not (arrays["K"][0, 0] > 0 and arrays["K"][1, 1] > 0):
        given = arrays["K"].tolist()
        raise DataError(f"{path}: K has no focal lengths, {given}; give [[f, 0, x], [0, f, y], [0, 0, 1]] in pixels")
    return arrays


def write_people(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes such a file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: np.asarray(array, np.float32) for name, array in arrays.items()})
    write_whole(path, buffer.getvalue())
