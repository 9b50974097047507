"""From an image to the people in it, and to what a people file says about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dune_fast.dali_pipelines.errors import BrokenImage, DataError
from dune_fast.dali_pipelines.images import decode
from dune_fast.heads.multihmr.camera import project
from dune_fast.heads.multihmr.head import MultiHmrHead, People, Placed, place_bodies
from dune_fast.heads.multihmr.rotations import axis_angle_from_matrix
from dune_fast.heads.multihmr.smplx import BodyModel
from dune_fast.heads.multihmr.square import normalise
from dune_fast.heads.tokens import encode
from dune_fast.kernels.nn.vit import VisionTransformer


@torch.no_grad()
def find_people(
    pixels: np.ndarray, intrinsics: np.ndarray, encoder: VisionTransformer, head: MultiHmrHead, model: BodyModel,
    threshold: float = 0.3, nms: int = 3,
) -> tuple[People, Placed]:  # fmt: skip
    """The people of one square image, uint8 [S, S, 3], with K [3, 3] in its pixels, and their bodies."""
    device = next(head.parameters()).device
    batch = normalise(pixels, encoder.mean, encoder.std)[None].to(device)
    k = torch.tensor(intrinsics, dtype=torch.float32, device=device)[None]
    people = head(encode(encoder, batch), k, threshold=threshold, nms=nms)
    return people, place_bodies(people, model, head.center)


def read_image(path: Path) -> Image.Image:
    """An RGB image, turned upright by its EXIF orientation; DataError if it cannot be read."""
    try:
        return ImageOps.exif_transpose(decode(np.fromfile(path, np.uint8)))
    except (OSError, ValueError, BrokenImage) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def parameters(people: People, placed: Placed, model: BodyModel, intrinsics: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a people file, see `people_files`; K [3, 3] is of the image that its pixels count in."""
    r = axis_angle_from_matrix(people.rotations)
    k = torch.tensor(intrinsics, dtype=torch.float32, device=r.device).expand(len(r), 3, 3)
    still = torch.zeros_like(r[:, :1])
    rest = model.pelvis(people.betas, people.expression)
    arrays: dict[str, Tensor] = {
        "root": r[:, :1], "body": r[:, 1:22], "jaw": r[:, 52:], "leye": still, "reye": still,
        "left_hand": r[:, 22:37], "right_hand": r[:, 37:52], "betas": people.betas, "expression": people.expression,
        "transl": placed.pelvis - rest, "scores": people.scores, "v3d": placed.v3d, "j3d": placed.j3d,
        "j2d": project(placed.j3d, k),
    }  # fmt: skip
    return {name: x.cpu().numpy() for name, x in arrays.items()} | {"K": np.asarray(intrinsics, np.float32)}
