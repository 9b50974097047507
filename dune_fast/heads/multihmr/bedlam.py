"""BEDLAM's annotations as people files: what its arrays mean for Multi-HMR's training.

BEDLAM (Black et al., CVPR 2023) is on https://bedlam.is.tue.mpg.de after registration, for non-commercial research. Its
labels are one `.npz` a scene with a row a person and frame; rows of one image have the same `imgname`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dune_fast.heads.multihmr.targets import PARTS

CLOSEUP = "closeup"
"""Part of the names of scenes whose images lie on their side."""

_COLUMNS = {"root": 0, "body": 3, "jaw": 66, "leye": 69, "reye": 72, "left_hand": 75, "right_hand": 120}
"""Where a part's axis-angles begin among the 165 numbers of a pose."""


def people_of(
    poses: np.ndarray, betas: np.ndarray, trans_cam: np.ndarray, cam_ext: np.ndarray, cam_int: np.ndarray,
    size: tuple[int, int],
) -> dict[str, np.ndarray]:  # fmt: skip
    """The P people of one image as the arrays of a people file, nearest first.

    Args:
        poses: `pose_cam` [P, 165] radians.
        betas: `shape` [P, 11].
        trans_cam: [P, 3] metres, to which the camera's own translation is added.
        cam_ext: [P, 4, 4].
        cam_int: [P, 3, 3] in pixels of the upright image, the same for everybody.
        size: (width, height) of the upright image, see `upright`.

    Raises:
        ValueError: arrays of other shapes, or people of several cameras.
    """
    people = len(poses)
    shapes = {"poses": (people, 165), "trans_cam": (people, 3), "cam_ext": (people, 4, 4), "cam_int": (people, 3, 3)}
    given = {"poses": poses, "trans_cam": trans_cam, "cam_ext": cam_ext, "cam_int": cam_int}
    for name, wanted in shapes.items():
        if given[name].shape != wanted:
            raise ValueError(f"{name} is {list(given[name].shape)}, expected {list(wanted)}: give one image's rows")
    if people and not np.allclose(cam_int, cam_int[0]):
        raise ValueError("cam_int differs between the people of one image: give one image's rows")
    transl = trans_cam + cam_ext[:, :3, 3]
    order = np.argsort(transl[:, 2], kind="stable")
    out = {
        name: poses[order, _COLUMNS[name] : _COLUMNS[name] + 3 * joints].reshape(people, joints, 3)
        for name, joints in PARTS.items()
    }
    k = cam_int[0] if people else np.array([[max(size), 0, size[0] / 2], [0, max(size), size[1] / 2], [0, 0, 1]])
    return out | {"betas": betas[order], "transl": transl[order], "K": published_intrinsics(k, size)}


def published_intrinsics(intrinsics: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """K [3, 3] in pixels of the image that becomes the published one on the square of S pixels.

    The published training takes (cx / width, cy / height) S there as the principal point, which is exact for a centred
    one alone: the image lies in the middle of the square, its shorter side is not S. This is kept.
    """
    width, height = size
    longer = max(size)
    k = np.array(intrinsics, dtype=np.float64)
    k[0, 2] = k[0, 2] / width * longer - (longer - width) / 2
    k[1, 2] = k[1, 2] / height * longer - (longer - height) / 2
    return k


def upright(image: Image.Image, name: str) -> Image.Image:
    """The image as its annotations count: those of scenes with `closeup` in their name are turned by -90 degrees."""
    return image.transpose(Image.Transpose.ROTATE_270) if CLOSEUP in name else image


def by_image(names: Sequence[str]) -> dict[str, np.ndarray]:
    """`imgname` of the rows -> image name -> its rows, in the order of the file."""
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        rows.setdefault(str(name), []).append(i)
    return {name: np.array(found) for name, found in rows.items()}
