"""The distillation loss of one teacher and token type, standardization included.

With y = (t - mean) * inv_std, per token (DUNE, CVPR 2025, Eq. 1, with the published weights 0.5):

    l = w_cos * (1 - cos(s, y)) + w_sl1 * mean_c smooth_l1_beta(s_c - y_c)

averaged over the patches of an image, in float32. cos divides by max(|s|, eps) * max(|y|, eps), eps = 1e-8, as
`torch.nn.functional.cosine_similarity` does.

Minimal bytes moved (bf16): forward 4 an element (s and t read once), backward 6 (s, t read, ds written).
Shapes: s, t [B, P, C] or [B, C]; mean, inv_std float32 [C] -> [B].
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class TokenLoss(NamedTuple):
    """Per-image losses, float32 [B]: the weighted sum, which carries the gradient, and its parts, which do not."""

    total: Tensor
    cosine: Tensor
    smooth_l1: Tensor


def standardize(x: Tensor, mean: Tensor, inv_std: Tensor) -> Tensor:
    """(x - mean) * inv_std in float32. x: [..., C]; mean, inv_std: [C]."""
    return (x.float() - mean) * inv_std


def distill_loss(
    student: Tensor,
    teacher: Tensor,
    mean: Tensor | None = None,
    inv_std: Tensor | None = None,
    cosine_weight: float = 0.5,
    smooth_l1_weight: float = 0.5,
    beta: float = 1.0,
) -> TokenLoss:
    """Cosine and smooth-L1 between the student's projection and the standardized teacher.

    Args:
        student: [B, P, C] or [B, C], any floating type, may be a strided view.
        teacher: of the same shape, raw features where `mean` and `inv_std` are given, else already standardized.
        mean, inv_std: float32 [C].
        cosine_weight, smooth_l1_weight: coefficients of the two terms.
        beta: where smooth-L1 turns from quadratic to linear.

    Raises:
        ValueError: shapes disagree.
    """
    if student.shape != teacher.shape or student.ndim not in (2, 3):
        raise ValueError(
            f"distill_loss takes student and teacher of one shape [B, P, C] or [B, C], "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    s = student.float()
    t = teacher.float() if mean is None else standardize(teacher, mean, inv_std)
    cosine = 1.0 - F.cosine_similarity(s, t, dim=-1, eps=1e-8)
    smooth_l1 = F.smooth_l1_loss(s, t, reduction="none", beta=beta).mean(-1)
    if student.ndim == 3:
        cosine, smooth_l1 = cosine.mean(-1), smooth_l1.mean(-1)
    return TokenLoss(cosine_weight * cosine + smooth_l1_weight * smooth_l1, cosine.detach(), smooth_l1.detach())
