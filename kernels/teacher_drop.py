"""Which (teacher, image) losses count: the hardest teacher of each image and a random part of the others.

    c[t, b] = allowed[t, b] * (t == argmax_t L[t, b]  or  u[t, b] >= p)

with u ~ U[0, 1) from a counter-based generator keyed by (seed, step, global image index, teacher), so that the choice
does not depend on how images are spread over ranks (UNIC, ECCV 2024, "lowest loss" teacher dropping).
Minimal bytes moved: read L, write c. Shapes: L, c float32 [T, B].
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import philox


def drop_uniforms(seed: int, step: int, positions: Tensor, num_teachers: int) -> Tensor:
    """u of the formula, float32 [T, B]: Philox words 0..3 of stream DROPPING + 4 * (t // 4) serve four teachers."""
    groups = [
        philox.uniform4(seed, philox.DROPPING | block << 8, positions, step)  # [B, 4]
        for block in range((num_teachers + 3) // 4)
    ]
    return torch.cat(groups, dim=-1)[:, :num_teachers].T


def teacher_drop(losses: Tensor, positions: Tensor, step: int, seed: int, probability: float) -> Tensor:
    """Coefficients 0 or 1, float32 [T, B].

    Args:
        losses: float32 [T, B], per teacher and image; no gradient flows through the choice.
        positions: int64 [B], global index of each image in the run.
        step: of the run.
        seed: of the run.
        probability: with which a teacher that is not the hardest of its image is dropped, in [0, 1].

    Raises:
        ValueError: shapes disagree or the probability is out of range.
    """
    if losses.ndim != 2 or positions.shape != losses.shape[1:]:
        raise ValueError(
            f"teacher_drop takes losses [T, B] and positions [B], got {list(losses.shape)} and {list(positions.shape)}"
        )
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"drop probability {probability} is not in [0, 1]")
    losses = losses.detach()
    if probability == 0.0 or len(losses) == 1:
        return torch.ones_like(losses)
    teachers = torch.arange(len(losses), device=losses.device)[:, None]
    hardest = losses.argmax(0, keepdim=True) == teachers
    kept = drop_uniforms(seed, step, positions, len(losses)) >= probability
    return (hardest | kept).to(losses.dtype)
