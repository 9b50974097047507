"""Multi-HMR's head, Baradel et al., ECCV 2024: patch tokens and a camera to the people of an image.

A patch is scored for holding a person's head; the people found are queries of `hph.HPH`, which gives rotations, shape,
expression and depth. `place_bodies` puts SMPL-X bodies of them into the camera's frame. S: side of the square image in
pixels, g = S / patch_size patches a side, C channels of the encoder, P people of the batch, nb shape coefficients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dune_fast.heads.head import Head, HeadError
from dune_fast.heads.multihmr.camera import (
    camera_embedding,
    default_intrinsics,
    depth_of,
    focal_ratio,
    inverse,
    project,
    unproject,
)
from dune_fast.heads.multihmr.detection import Cells, detect, scores_of, suppress
from dune_fast.heads.multihmr.hph import HPH, NUM_ROTATIONS
from dune_fast.heads.multihmr.rotations import matrix_from_six
from dune_fast.heads.multihmr.smplx import BodyModel
from dune_fast.heads.tokens import EncoderTokens

CENTERS = {"head": 15, "pelvis": 0, "nose": 55}
"""Primary keypoint -> its number among the 127 joints."""


class People(NamedTuple):
    """P people of a batch, flat, in the order of their cells."""

    cells: Cells
    scores: Tensor
    """[P]"""
    offset: Tensor
    """[P, 2], in patches: (x, y) from the middle of the cell to the primary keypoint."""
    location: Tensor
    """[P, 2], pixels (x, y) of the primary keypoint."""
    rotations: Tensor
    """[P, 53, 3, 3]: root, 21 body, 15 left hand, 15 right hand, jaw."""
    betas: Tensor
    """[P, nb]"""
    expression: Tensor
    """[P, 10]"""
    depth_value: Tensor
    """[P], what the head gives for the depth."""
    depth: Tensor
    """[P], metres along the optical axis."""
    translation: Tensor
    """[P, 3], of the primary keypoint in the camera's frame, metres."""
    intrinsics: Tensor
    """[P, 3, 3], K of each person's image."""
    score_map: Tensor
    """[B, g, g], of all patches: after suppression where people were looked for, else before."""


class Placed(NamedTuple):
    """Bodies of P people in the camera's frame (metres) and in the image (pixels)."""

    v3d: Tensor
    """[P, V, 3]"""
    j3d: Tensor
    """[P, 127, 3]"""
    v2d: Tensor
    """[P, V, 2]"""
    j2d: Tensor
    """[P, 127, 2]"""
    pelvis: Tensor
    """[P, 3]"""


class MultiHmrHead(Head):
    """The head; float32.

    Args:
        width: channels of the encoder.
        image_size: S. The tables of positions fix it; `resized` makes a head for another one.
        patch_size: of the encoder, in pixels.
        num_betas: nb, 10 or 11.
        depth, heads, head_dim, dim, hidden: of the transformer over people.
        camera: whether patches get the Fourier features of their rays.
        bands, max_resolution: of these features.
        nearness: whether the depth is predicted as its logarithm.
        center: primary keypoint, one of `CENTERS`.
    """

    kind = "multihmr"
    repeated = ("depth",)

    def __init__(
        self, width: int, image_size: int, patch_size: int = 14, num_betas: int = 10, depth: int = 2, heads: int = 8,
        head_dim: int = 32, dim: int = 1024, hidden: int = 1024, camera: bool = True, bands: int = 16,
        max_resolution: int = 64, nearness: bool = True, center: str = "head",
    ) -> None:  # fmt: skip
        super().__init__()
        if image_size % patch_size or image_size < patch_size:
            below, above = image_size // patch_size * patch_size, (image_size // patch_size + 1) * patch_size
            raise HeadError(
                f"image_size {image_size} is no multiple of the patch size {patch_size}: take "
                f"{max(below, patch_size)} or {above}"
            )
        if center not in CENTERS:
            raise HeadError(f"center {center!r} is unknown; choose one of {', '.join(CENTERS)}")
        if num_betas not in (10, 11):
            raise HeadError(f"num_betas {num_betas}: the head predicts 10 or 11 shape coefficients")
        self.width, self.patch_size, self.image_size = width, patch_size, image_size
        self.grid, self.center, self.nearness, self.num_betas = image_size // patch_size, center, nearness, num_betas
        self._options = {
            "width": width, "image_size": image_size, "patch_size": patch_size, "num_betas": num_betas, "depth": depth,
            "heads": heads, "head_dim": head_dim, "dim": dim, "hidden": hidden, "camera": camera, "bands": bands,
            "max_resolution": max_resolution, "nearness": nearness, "center": center,
        }  # fmt: skip
        self.mlp_classif = _mlp(width, 1)
        self.mlp_offset = _mlp(width, 2)
        context_dim = width + (3 + 6 * bands if camera else 0)
        self.x_attention_head = HPH(self.grid, context_dim, num_betas, depth, heads, head_dim, dim, hidden)

    def options(self) -> dict[str, Any]:
        return dict(self._options)

    def score_map(self, patch: Tensor) -> Tensor:
        """[B, g, g] of patch tokens [B, g x g, C], before suppression."""
        self._check(patch)
        return scores_of(self.mlp_classif(patch))[..., 0].unflatten(1, (self.grid, self.grid))

    def embedding(self, intrinsics: Tensor) -> Tensor:
        """[B, g, g, 3 + 6 bands] of K [B, 3, 3]."""
        chosen = self._options
        return camera_embedding(intrinsics, self.grid, self.patch_size, chosen["bands"], chosen["max_resolution"])

    def decode(self, patch: Tensor, intrinsics: Tensor, cells: Cells, scores: Tensor | None = None) -> People:
        """The people in the given cells.

        Args:
            patch: [B, g x g, C] after the encoder's final norm.
            intrinsics: K [B, 3, 3] in pixels of the S x S image.
            cells: of detections or of the ground truth.
            scores: [B, g, g] if the caller has it.
        """
        scores = self.score_map(patch) if scores is None else scores
        image, row, column = cells.image, cells.row, cells.column
        context = patch
        if self._options["camera"]:
            context = torch.cat([patch, self.embedding(intrinsics).flatten(1, 2).to(patch.dtype)], -1)
        six, betas, cam, expression = self.x_attention_head(context, cells)
        offset = self.mlp_offset(patch[image, row * self.grid + column])
        location = (torch.stack([column, row], 1) + 0.5 + offset) * self.patch_size
        rotations = matrix_from_six(six.unflatten(1, (NUM_ROTATIONS, 6)))
        depth = depth_of(cam[:, 0], focal_ratio(intrinsics, self.image_size)[image], self.nearness)
        translation = unproject(location, depth, inverse(intrinsics)[image])
        return People(
            cells, scores[image, row, column], offset, location, rotations, betas, expression, cam[:, 0], depth,
            translation, intrinsics[image].float(), scores,
        )  # fmt: skip

    def forward(
        self, tokens: EncoderTokens, intrinsics: Tensor | None = None, cells: Cells | None = None, *,
        threshold: float = 0.3, nms: int = 3,
    ) -> People:  # fmt: skip
        """The people found in B images, or those in the given cells.

        Args:
            tokens: of S x S images.
            intrinsics: K [B, 3, 3]; None for `camera.default_intrinsics`.
            cells: of the ground truth, in training: nothing is searched.
            threshold: score from which on a patch holds a person; 0.3 of the published demo, 0.2 of its evaluation.
            nms: patches of the neighbourhood within which the highest score alone counts.
        """
        if intrinsics is None:
            intrinsics = default_intrinsics(self.image_size).to(tokens.patch.device).expand(len(tokens.patch), 3, 3)
        if cells is not None:
            return self.decode(tokens.patch, intrinsics, cells)
        scores = suppress(self.score_map(tokens.patch), nms)
        return self.decode(tokens.patch, intrinsics, detect(scores, threshold), scores)

    def resized(self, image_size: int) -> MultiHmrHead:
        """A copy for images of another side; its tables of positions are interpolated linearly, the rest is equal."""
        other = type(self)(**{**self.options(), "image_size": image_size})
        state = self.state_dict()
        for name in state:
            if ".cross_" in name:
                table = state[name].T[None]  # [1, context, g]
                table = nn.functional.interpolate(table, size=other.grid, mode="linear", align_corners=False)
                state[name] = table[0].T
        other.load_state_dict(state)
        return other.to(next(self.parameters()).device)

    def _check(self, patch: Tensor) -> None:
        if patch.ndim != 3 or patch.shape[1:] != (self.grid**2, self.width):
            raise HeadError(
                f"the head reads [B, {self.grid**2}, {self.width}] patch tokens, those of {self.image_size} x "
                f"{self.image_size} px images, got {list(patch.shape)}: give images of this size, or use "
                "head.resized(SIZE)"
            )


def _mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


def body_rotations(rotations: Tensor) -> Tensor:
    """[P, 53, 3, 3] of the head -> [P, 55, 3, 3] in the body model's order, with an unturned root and eyes ahead."""
    eye = torch.eye(3, dtype=rotations.dtype, device=rotations.device).expand(len(rotations), 1, 3, 3)
    body, left, right, jaw = rotations[:, 1:22], rotations[:, 22:37], rotations[:, 37:52], rotations[:, 52:53]
    return torch.cat([eye, body, jaw, eye, eye, left, right], 1)


def place_bodies(people: People, model: BodyModel, center: str = "head") -> Placed:
    """SMPL-X bodies turned about the pelvis and moved, so that their primary keypoint is at the translation."""
    vertices, joints = model(people.betas, body_rotations(people.rotations), people.expression)
    pelvis, root = joints[:, :1], people.rotations[:, 0].transpose(1, 2)
    vertices, joints = (vertices - pelvis) @ root, (joints - pelvis) @ root
    shift = people.translation[:, None] - joints[:, CENTERS[center], None]
    v3d, j3d = vertices + shift, joints + shift
    return Placed(v3d, j3d, project(v3d, people.intrinsics), project(j3d, people.intrinsics), j3d[:, 0])
