"""Cosine of two whole maps (Shang et al., Theia, CoRL 2024): one angle for all of an image's patches and channels.

    p' = p / max(|p|, eps),   t' = t / max(|t|, eps)                    norms over all N * C numbers of a map
    loss = 1 - p'.t' / sqrt((|p'|^2 + eps) (|t'|^2 + eps)),   eps = 1e-12

A map of zeros has the loss 1. The cosine of patches, one by one, is `dune_fast.kernels.distill_loss`.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12


def map_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """The loss of every image, float32 [B].

    Args:
        prediction, target: [B, ...] of one shape and any float type; a map of an image is everything behind B.

    Raises:
        ValueError: shapes that differ: no broadcasting, which would compare images with one another.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"map_cosine compares maps of one shape; the student's is {list(prediction.shape)}, the teacher's "
            f"{list(target.shape)}"
        )
    p, t = prediction.flatten(1).float(), target.flatten(1).float()
    p_norm, t_norm = (torch.linalg.vector_norm(x, dim=1).clamp_min(EPS) for x in (p, t))
    # of the dot products alone: maps divided by their norms would be two more copies
    dot = torch.linalg.vecdot(p, t) / p_norm / t_norm
    p_square, t_square = (torch.linalg.vecdot(x, x) / norm / norm for x, norm in ((p, p_norm), (t, t_norm)))
    return 1.0 - dot / ((p_square + EPS) * (t_square + EPS)).sqrt()
