"""SMPL-X, Pavlakos et al., CVPR 2019: shape, expression and 55 rotations to vertices and 127 joints, in metres.

    vs = v_template + sum_l betas_l shapedirs[..., l] + sum_l psi_l E[..., l],      J = J_regressor vs
    vp = vs + posedirs . vec(R_1 - I, ..., R_54 - I)                                (row-major, 486 numbers)
    G_0 = [R_0 | J_0],  G_i = G_parent [R_i | J_i - J_parent],  joint i = the translation of G_i
    vertex v = (sum_i weights[v, i] [G_i.R | t_i - G_i.R J_i]) vp,  the translation of the body added last

J is linear in the coefficients, so its own directions are made once. Levels of the tree are multiplied at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dune_fast.heads.multihmr.body_file import JOINTS, VERTICES, BodyModelError, read_body_file
from dune_fast.heads.multihmr.rotations import matrix_from_axis_angle

VERTEX_JOINTS = {
    "nose": 9120, "reye": 9929, "leye": 9448, "rear": 616, "lear": 6, "LBigToe": 5770, "LSmallToe": 5780,
    "LHeel": 8846, "RBigToe": 8463, "RSmallToe": 8474, "RHeel": 8635, "lthumb": 5361, "lindex": 4933, "lmiddle": 5058,
    "lring": 5169, "lpinky": 5286, "rthumb": 8079, "rindex": 7669, "rmiddle": 7794, "rring": 7905, "rpinky": 8022,
}  # fmt: skip
"""The vertices that are joints 55 to 75, in this order; numbers of the official model."""

NUM_JOINTS = JOINTS + len(VERTEX_JOINTS) + 51
"""127: of the tree, vertices, landmarks of the face."""

_SHAPE_COLUMNS = {400: 300, 20: 10}  # columns of `shapedirs` -> how many are of the shape; the rest is expression


class Body(NamedTuple):
    """P bodies in metres."""

    vertices: Tensor
    """[P, V, 3]"""
    joints: Tensor
    """[P, 127, 3]; 0 is the pelvis, 15 the head."""


class BodyModel(nn.Module):
    """The layer. Nothing of it is in a state dict: the model's licence forbids to pass it on.

    Args:
        arrays: see `body_file.read_body_file`.
        vertex_ids: the 21 vertices that are joints, by the names of `VERTEX_JOINTS`; None for the file's own array
            `vertex_ids`, or the official numbers where the model has the official number of vertices.

    Raises:
        BodyModelError: the arrays do not fit one another, or nobody says which vertices are joints.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], vertex_ids: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.num_vertices = len(arrays["v_template"])
        self.parents = [0, *(int(p) for p in arrays["kintree_table"][0][1:])]
        self.levels = _levels(self.parents)
        columns = arrays["shapedirs"].shape[-1]
        if columns not in _SHAPE_COLUMNS:
            known = " or ".join(map(str, _SHAPE_COLUMNS))
            raise BodyModelError(f"the body model has {columns} shape directions; files with {known} are known")
        self.expression_start = _SHAPE_COLUMNS[columns]
        shapes = torch.tensor(arrays["shapedirs"], dtype=torch.float32)
        regressor = torch.tensor(arrays["J_regressor"], dtype=torch.float32)
        template = torch.tensor(arrays["v_template"], dtype=torch.float32)
        self._keep("template", template)
        self._keep("shapes", shapes)  # [V, 3, S]
        self._keep("joint_template", regressor @ template)  # [55, 3]
        self._keep("joint_shapes", torch.einsum("jv,vcs->jcs", regressor, shapes))  # [55, 3, S]
        poses = torch.tensor(arrays["posedirs"], dtype=torch.float32)
        self._keep("poses", poses.flatten(0, 1).T.contiguous())  # [486, 3 V]
        self._keep("weights", torch.tensor(arrays["weights"], dtype=torch.float32))
        self._keep("faces", torch.tensor(arrays["f"].astype(np.int64)))  # [F, 3]
        self._keep("landmark_corners", self.faces[torch.tensor(arrays["lmk_faces_idx"].astype(np.int64))])  # [51, 3]
        self._keep("landmark_weights", torch.tensor(arrays["lmk_bary_coords"], dtype=torch.float32))
        means = np.stack([arrays["hands_meanl"], arrays["hands_meanr"]]).reshape(2, 15, 3)
        self._keep("hand_means", torch.tensor(means, dtype=torch.float32))
        self._keep("vertex_joints", torch.tensor(self._vertex_joints(arrays, vertex_ids)))

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def _vertex_joints(self, arrays: Mapping[str, np.ndarray], ids: Mapping[str, int] | None) -> list[int]:
        if ids is not None:
            if missing := [name for name in VERTEX_JOINTS if name not in ids]:
                raise BodyModelError(f"vertex_ids lacks {', '.join(missing)}")
            found = [int(ids[name]) for name in VERTEX_JOINTS]
        elif "vertex_ids" in arrays:
            found = [int(i) for i in arrays["vertex_ids"]]
        elif self.num_vertices == VERTICES:
            found = list(VERTEX_JOINTS.values())
        else:
            raise BodyModelError(
                f"the body model has {self.num_vertices} vertices, the official one {VERTICES}: say which vertices are "
                f"joints, by vertex_ids with {', '.join(VERTEX_JOINTS)}"
            )
        if not all(0 <= i < self.num_vertices for i in found):
            raise BodyModelError(f"vertex_ids {found} are not all among the model's {self.num_vertices} vertices")
        return found

    def forward(self, betas: Tensor, rotations: Tensor, expression: Tensor | None = None) -> Body:
        """P bodies whose root turns about the pelvis; no translation.

        Args:
            betas: [P, n], the first n shape coefficients; 11 on an old file with 10 reach its first expression.
            rotations: [P, 55, 3, 3] in the model's order: root, 21 body, jaw, eyes, left hand, right hand.
            expression: [P, m] or None.
        """
        shaped = self._shaped(self.template, self.shapes, betas, expression)
        rest = self._shaped(self.joint_template, self.joint_shapes, betas, expression)
        eye = torch.eye(3, dtype=rotations.dtype, device=rotations.device)
        posed = shaped + ((rotations[:, 1:] - eye).flatten(1) @ self.poses).view_as(shaped)
        turns, joints = self._chain(rotations, rest)
        shifts = joints - (turns @ rest[..., None])[..., 0]
        moves = torch.cat([turns, shifts[..., None]], -1).flatten(2)  # [P, 55, 12]
        blended = (self.weights @ moves).unflatten(2, (3, 4))  # [P, V, 3, 4]
        vertices = (blended[..., :3] @ posed[..., None])[..., 0] + blended[..., 3]
        corners = vertices[:, self.landmark_corners]  # [P, 51, 3, 3]
        landmarks = (corners * self.landmark_weights[..., None]).sum(2)
        return Body(vertices, torch.cat([joints, vertices[:, self.vertex_joints], landmarks], 1))

    def _chain(self, rotations: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Every joint's rotation [P, 55, 3, 3] and place [P, 55, 3] after those of its ancestors, level by level."""
        own, still = rotations.unbind(1), rest.unbind(1)  # lists of numbers as indices would be copied to the device
        turns: list[Tensor] = [own[0]] * JOINTS
        places: list[Tensor] = [still[0]] * JOINTS
        for level in self.levels:
            parents = [self.parents[i] for i in level]
            above = torch.stack([turns[p] for p in parents], 1)
            bone = torch.stack([still[i] - still[p] for i, p in zip(level, parents, strict=True)], 1)
            turned = above @ torch.stack([own[i] for i in level], 1)
            moved = torch.stack([places[p] for p in parents], 1) + (above @ bone[..., None])[..., 0]
            for k, i in enumerate(level):
                turns[i], places[i] = turned[:, k], moved[:, k]
        return torch.stack(turns, 1), torch.stack(places, 1)

    def pelvis(self, betas: Tensor, expression: Tensor | None = None) -> Tensor:
        """Where the pelvis of an unmoved body is, [P, 3]: the root turns about it."""
        return self._shaped(self.joint_template[:1], self.joint_shapes[:1], betas, expression)[:, 0]

    def _shaped(self, template: Tensor, directions: Tensor, betas: Tensor, expression: Tensor | None) -> Tensor:
        """Points [P, n, 3] of a template [n, 3] and directions [n, 3, S]."""
        columns, start = directions.shape[-1], self.expression_start
        last = max(betas.shape[1], 0 if expression is None else start + expression.shape[1])
        if last > columns:
            raise BodyModelError(f"the body model has {columns} shape directions, {last} are asked for")
        points = template + torch.einsum("pl,ncl->pnc", betas, directions[..., : betas.shape[1]])
        if expression is None:
            return points
        chosen = directions[..., start : start + expression.shape[1]]
        return points + torch.einsum("pl,ncl->pnc", expression, chosen)

    def matrices(self, root: Tensor, body: Tensor, jaw: Tensor, leye: Tensor, reye: Tensor, left_hand: Tensor,
                 right_hand: Tensor, flat_hand_mean: bool = True) -> Tensor:  # fmt: skip
        """[P, 55, 3, 3] of axis-angles: [P, n x 3] or [P, n, 3] with n = 1, 21, 1, 1, 1, 15, 15.

        Args:
            flat_hand_mean: whether zero is a flat hand; if not, the model's mean pose is added.
        """
        given = (root, body, jaw, leye, reye, left_hand, right_hand)
        parts = [x if x.ndim == 3 else x.unflatten(1, (x.shape[1] // 3, 3)) for x in given]
        if not flat_hand_mean:
            parts[-2:] = [hand + mean for hand, mean in zip(parts[-2:], self.hand_means, strict=True)]
        return matrix_from_axis_angle(torch.cat(parts, 1))


def _levels(parents: Sequence[int]) -> list[list[int]]:
    """Joints below the root by their depth in the tree."""
    depth = [0] * len(parents)
    for i, parent in enumerate(parents[1:], 1):
        depth[i] = depth[parent] + 1
    return [[i for i, d in enumerate(depth) if d == level] for level in range(1, max(depth) + 1)]


def load_body_model(path: Path, vertex_ids: Mapping[str, int] | None = None) -> BodyModel:
    """The layer of a user's file; BodyModelError, see `read_body_file` and `BodyModel`."""
    return BodyModel(read_body_file(path), vertex_ids)
