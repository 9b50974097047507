"""The distillation loss of one teacher and token type, standardization included.

With y = (t - mean) * inv_std, per token (DUNE, CVPR 2025, Eq. 1, with the published weights 0.5):

    l = w_cos * (1 - cos(s, y)) + w_sl1 * mean_c smooth_l1_beta(s_c - y_c)

averaged over the patches of an image, in float32. cos divides by max(|s|, eps) * max(|y|, eps), eps = 1e-8, as
`torch.nn.functional.cosine_similarity` does. With g the upstream gradient of an image over its number of patches,
and norms bounded by eps,

    dl/ds = g * (w_cos * (s cos / |s|^2 - y / (|s| |y|)) + w_sl1 / C * clamp((s - y) / beta, -1, 1))

so the forward saves two numbers a token, cos / |s|^2 and 1 / (|s| |y|), and the backward makes y again.
Standardized features exist in registers alone. Sums run in a fixed order, so the bits are the same every time.

Minimal bytes moved (bf16): forward 4 an element (s and t read once), backward 6 (s, t read, ds written).
Shapes: s, t [B, P, C] or [B, C]; mean, inv_std float32 [C] -> [B].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dune_fast.kernels.distill_loss_kernels import EPS, MAX_CHANNELS, backward_triton, forward_triton
from dune_fast.kernels.launching import VIT_CHANNELS, Example, draw
from dune_fast.kernels.library import guard, guard_device, register, use_triton, widen


class TokenLoss(NamedTuple):
    """Per-image losses, float32 [B]: the weighted sum, which carries the gradient, and its parts, which do not."""

    total: Tensor
    cosine: Tensor
    smooth_l1: Tensor


def standardize(x: Tensor, mean: Tensor, inv_std: Tensor) -> Tensor:
    """(x - mean) * inv_std in float32 (float64 stays). x: [..., C]; mean, inv_std: [C]."""
    return (widen(x) - mean) * inv_std


def distill_loss_reference(
    student: Tensor, teacher: Tensor, mean: Tensor | None = None, inv_std: Tensor | None = None,
    cosine_weight: float = 0.5, smooth_l1_weight: float = 0.5, beta: float = 1.0,
) -> TokenLoss:  # fmt: skip
    """`distill_loss` in plain torch, differentiated by autograd; float64 stays float64."""
    s = widen(student)
    t = widen(teacher) if mean is None else standardize(teacher, mean, inv_std)
    cosine = 1.0 - F.cosine_similarity(s, t, dim=-1, eps=EPS)
    smooth_l1 = F.smooth_l1_loss(s, t, reduction="none", beta=beta).mean(-1)
    if student.ndim == 3:
        cosine, smooth_l1 = cosine.mean(-1), smooth_l1.mean(-1)
    return TokenLoss(cosine_weight * cosine + smooth_l1_weight * smooth_l1, cosine.detach(), smooth_l1.detach())


def _forward_reference(student: Tensor, teacher: Tensor, mean: Tensor | None, inv_std: Tensor | None, *terms: float):
    s = widen(student)
    y = widen(teacher) if mean is None else standardize(teacher, mean, inv_std)
    length, s_norm, y_norm = s.norm(dim=-1), s.norm(dim=-1).clamp_min(EPS), y.norm(dim=-1).clamp_min(EPS)
    of_s = F.cosine_similarity(s, y, dim=-1, eps=EPS) / s_norm / length.masked_fill(length == 0, 1)
    saved = torch.stack([of_s, 1 / s_norm / y_norm], dim=-1)  # [B, P, 2] or [B, 2]
    return *distill_loss_reference(student, teacher, mean, inv_std, *terms), saved.view(-1, 2)


def _backward_reference(
    student: Tensor, teacher: Tensor, mean: Tensor | None, inv_std: Tensor | None, saved: Tensor, upstream: Tensor,
    cosine_weight: float, smooth_l1_weight: float, beta: float,
) -> Tensor:  # fmt: skip
    s = widen(student).reshape(len(student), -1, student.shape[-1])  # [B, P, C]
    y = (widen(teacher) if mean is None else standardize(teacher, mean, inv_std)).reshape(s.shape)
    of_s, of_y = saved.view(*s.shape[:2], 2).split(1, -1)  # [B, P, 1] each
    slope = torch.where((s - y).abs() < beta, (s - y) / (beta or 1.0), (s - y).sign())
    gradient = cosine_weight * (s * of_s - y * of_y) + smooth_l1_weight / s.shape[-1] * slope
    return (upstream[:, None, None] / s.shape[1] * gradient).reshape(student.shape).to(student.dtype)


def _forward_fake(student: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    total, cosine, smooth_l1 = (student.new_empty(len(student), dtype=dtype) for _ in range(3))
    return total, cosine, smooth_l1, student.new_empty(student.numel() // student.shape[-1], 2, dtype=dtype)


_TERMS = "float cosine_weight, float smooth_l1_weight, float beta"
_forward = register(
    f"distill_loss(Tensor student, Tensor teacher, Tensor? mean, Tensor? inv_std, {_TERMS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    forward_triton, _forward_reference, _forward_fake,
)  # fmt: skip
_backward = register(
    "distill_loss_backward(Tensor student, Tensor teacher, Tensor? mean, Tensor? inv_std, Tensor saved, "
    f"Tensor upstream, {_TERMS}) -> Tensor",
    backward_triton, _backward_reference, lambda student, *_: student.new_empty(student.shape),
)  # fmt: skip


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, mean, inv_std, *terms):
        total, cosine, smooth_l1, saved = _forward(student, teacher, mean, inv_std, *terms)
        ctx.save_for_backward(student, teacher, mean, inv_std, saved)
        ctx.terms = terms
        ctx.mark_non_differentiable(cosine, smooth_l1)
        return total, cosine, smooth_l1

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        return _backward(*ctx.saved_tensors, upstream, *ctx.terms), *[None] * 6


def distill_loss(
    student: Tensor, teacher: Tensor, mean: Tensor | None = None, inv_std: Tensor | None = None,
    cosine_weight: float = 0.5, smooth_l1_weight: float = 0.5, beta: float = 1.0,
) -> TokenLoss:  # fmt: skip
    """Cosine and smooth-L1 between the student's projection and the standardized teacher.

    Args:
        student: [B, P, C] or [B, C], any floating type; a slice of tokens is read where it lies.
        teacher: of the same shape, raw features where `mean` and `inv_std` are given, else already standardized.
            Frozen: a teacher that asks for a gradient takes the reference, as do more than 4096 channels.
        mean, inv_std: float32 [C].
        cosine_weight, smooth_l1_weight: coefficients of the two terms.
        beta: where smooth-L1 turns from quadratic to linear; 0 is plain L1.

    Raises:
        ValueError: shapes or devices disagree, only one of mean and inv_std is given, or beta is negative.
    """
    given = {"student": student, "teacher": teacher, "mean": mean, "inv_std": inv_std}
    guard_device("distill_loss", **given)
    guard(
        student.shape == teacher.shape and student.ndim in (2, 3),
        "distill_loss takes student and teacher of one shape [B, P, C] or [B, C]", **given,
    )  # fmt: skip
    statistics = [x for x in (mean, inv_std) if x is not None]
    guard(
        len(statistics) != 1 and all(x.shape == student.shape[-1:] for x in statistics),
        "distill_loss takes mean and inv_std [C] with the features' C, both or neither", **given,
    )  # fmt: skip
    if beta < 0:
        raise ValueError(f"distill_loss takes beta >= 0, got {beta}")
    arguments = (student, teacher, mean, inv_std, cosine_weight, smooth_l1_weight, beta)
    constant = not any(x.requires_grad for x in (teacher, *statistics))
    if use_triton(*given.values()) and constant and student.numel() and student.shape[-1] <= MAX_CHANNELS:
        return TokenLoss(*_DistillLoss.apply(*arguments))
    return distill_loss_reference(*arguments)


_WIDTHS = (64, *VIT_CHANNELS, 2048, MAX_CHANNELS)
AOT = (
    *(((128, 576, channels), torch.bfloat16) for channels in _WIDTHS),
    *(((128, 576, channels), torch.float32) for channels in _WIDTHS[-3:]),
)


def examples(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Example]:
    """Both passes on patch tokens [B, N, C] cut from [B, 1 + N, C], and on cls tokens [B, C] cut from them."""
    student, teacher = (draw((shape[0], 1 + shape[1], shape[2]), dtype, device) for _ in range(2))
    mean, inv_std = draw(shape[2:], torch.float32, device), torch.rand(shape[2], device=device) + 0.3
    upstream = draw(shape[:1], torch.float32, device)
    for kind, cut in (("patch", slice(1, None)), ("cls", 0)):
        for x, y in ((student[:, cut], teacher[:, cut]), (student[:, cut], teacher.float()[:, cut])):
            label = f"{kind}, {str(y.dtype)[6:]} teacher"
            saved = torch.rand(x.numel() // shape[2], 2, device=device) + 0.1
            yield Example(label, _forward, (x, y, mean, inv_std, 0.5, 0.5, 1.0))
            yield Example(f"{label}, backward", _backward, (x, y, mean, inv_std, saved, upstream, 0.5, 0.5, 1.0))
