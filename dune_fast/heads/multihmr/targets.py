"""What the head is to predict, from the people of the ground truth.

The primary keypoint of a person's body, projected, gives its cell, clamped to the grid, and the offset from the cell's
middle in patches, not clamped. Of several people in a cell the first of the list is kept: nearest people come first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dune_fast.heads.multihmr.camera import focal_ratio, project, value_of
from dune_fast.heads.multihmr.detection import Cells
from dune_fast.heads.multihmr.head import CENTERS, MultiHmrHead, Placed
from dune_fast.heads.multihmr.smplx import BodyModel

PARTS = {"root": 1, "body": 21, "jaw": 1, "leye": 1, "reye": 1, "left_hand": 15, "right_hand": 15}
"""Axis-angles of a person, in the body model's order -> joints."""

NEAREST = 0.01
"""Metres; people closer than this, or behind the camera, are not trained on."""


class Targets(NamedTuple):
    """Of P people, P' of them kept (`cells.kept`)."""

    cells: Cells
    scores: Tensor
    """[B, g, g], 1 at the cells of kept people, else 0."""
    offset: Tensor
    """[P, 2] patches"""
    location: Tensor
    """[P, 2] pixels"""
    rotations: Tensor
    """[P, 53, 3, 3], in the head's order."""
    betas: Tensor
    """[P, nb]"""
    depth_value: Tensor
    """[P], of the pelvis."""
    translation: Tensor
    """[P, 3], of the primary keypoint, metres."""
    body: Placed


def make_targets(
    truth: Mapping[str, Tensor], image: Tensor, slot: Tensor, slots: int, intrinsics: Tensor, model: BodyModel,
    head: MultiHmrHead,
) -> Targets:  # fmt: skip
    """Targets of P people; nothing waits for the device.

    Args:
        truth: axis-angles [P, n, 3] by the names and numbers of `PARTS`, `betas` [P, nb], `transl` [P, 3] metres.
        image: [P], index in the batch; of an image, people stand in the order of preference.
        slot: [P], place among those of the image.
        slots: most people of an image.
        intrinsics: K [B, 3, 3] in pixels of the S x S image.
        model: whose bodies these are.
        head: whose grid and keypoint count; its weights are not used.
    """
    rotations = model.matrices(*(truth[name] for name in PARTS))  # [P, 55, 3, 3]
    vertices, joints = model(truth["betas"], rotations)
    v3d, j3d = vertices + truth["transl"][:, None], joints + truth["transl"][:, None]
    k = intrinsics[image]
    v2d, j2d = project(v3d, k), project(j3d, k)
    keypoint = CENTERS[head.center]
    location = j2d[:, keypoint]
    cell = (location / head.patch_size).floor().clamp(0, head.grid - 1)  # (column, row)
    column, row = cell.long().unbind(1)
    place = (image * head.grid + row) * head.grid + column
    taken = (place[:, None] == place).tril(-1).any(1)
    kept = ~taken
    scores = torch.zeros(len(intrinsics) * head.grid**2, device=place.device).index_fill(0, place, 1.0)
    # root, body, hands, jaw: the head's order
    own = torch.cat([rotations[:, :22], rotations[:, 25:55], rotations[:, 22:23]], 1)
    ratio = focal_ratio(intrinsics, head.image_size)[image]
    return Targets(
        Cells(image, row, column, slot, slots, kept), scores.view(-1, head.grid, head.grid),
        location / head.patch_size - (cell + 0.5), location, own, truth["betas"],
        value_of(j3d[:, 0, 2], ratio, head.nearness), j3d[:, keypoint], Placed(v3d, j3d, v2d, j2d, j3d[:, 0]),
    )  # fmt: skip
