"""A teacher's and the student's patches on one grid, which of them count, and how much every image then counts.

    G(M, h x w)                             `dune_fast.kernels.nn.homography.grid`
    teacher sees what the student sees      both maps are resized to one grid
    teacher has a view of its own, M        M: coordinates of the teacher's view -> of the student's. The student's map
                                            is sampled at G(M, teacher's grid), or the teacher's at G(M^-1, student's)

Sampling is bilinear with `align_corners=True` and zeros outside; a position counts by the product of both masks. Rules
are what the papers and NVIDIA's two published revisions do; `RULES` has them by the name of `objective.align`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dune_fast.kernels.nn.homography import grid


class View(NamedTuple):
    """How a teacher's view of the images lies to the student's; each part may be missing."""

    transform: Tensor | None = None
    """float [B, 3, 3], coordinates in [-1, 1], x before y: of the teacher's view -> of the student's."""
    student_valid: Tensor | None = None
    """[B, H, W], 1 where the student's pixels (or tokens) are of the source image."""
    teacher_valid: Tensor | None = None
    """The same of the teacher's view."""


class Rule(NamedTuple):
    """One way to bring two maps together; see the head of this file."""

    plain: str
    """Without a view: both are resized to the "smaller" or "larger" of the two grids, side by side."""
    mode: str = "bilinear"
    """Of that resize."""
    corners: bool = False
    """`align_corners` of that resize."""
    to_teacher: bool = False
    """With a view: the student's map is always sampled; otherwise that of the wider grid is."""
    floor: float = 1e-8
    """Weight of a position that is not valid."""
    inside: bool = True
    """With a view: a position that lies outside the other's image weighs 0."""
    power: float = 1.0
    """An image counts by its number of valid positions to this power."""
    whole: bool = False
    """A token is valid if all its pixels are, not more than half of them."""


RULES = {
    "smaller": Rule("smaller"),
    "teacher": Rule("smaller", to_teacher=True, floor=1e-6, inside=False, power=0.5, whole=True),
    "partitioned": Rule("larger", corners=True, whole=True),
    "larger": Rule("larger"),
    "larger_bicubic": Rule("larger", mode="bicubic"),
}
"""`objective.align` -> rule. "smaller": RADIOv2.5 and the published training code (7.0.1). "teacher": its later
revision (4deb2f7), which weights images by the root of their tokens. "partitioned": that revision's option for
partitions. "larger": AM-RADIO's paper. "larger_bicubic": EUPE."""


class Aligned(NamedTuple):
    """Maps [B, C, h, w] of one grid, and the weight of each position, float32 [B, h, w]; None where all count alike."""

    student: Tensor
    teacher: Tensor
    weight: Tensor | None


def token_mask(valid: Tensor, height: int, width: int, whole: bool = False) -> Tensor:
    """Which tokens of a grid are valid, float32 [B, h, w], 0 or 1, of a mask of pixels [B, H, W].

    Args:
        whole: only those all of whose pixels are; otherwise those of which more than half are.
    """
    share = F.adaptive_avg_pool2d(valid[:, None].float(), (height, width))[:, 0]
    return (share >= 1 if whole else share > 0.5).float()


def align(student: Tensor, teacher: Tensor, rule: Rule, view: View | None = None) -> Aligned:
    """Both maps on one grid.

    Args:
        student: [B, C, h, w], any floating type; a map that is sampled or resized comes back in float32.
        teacher: [B, C', H, W].
        view: of the teacher; None, or without any part, where it sees what the student does.
    """
    if view is None or all(part is None for part in view):
        return Aligned(*_resized(student, teacher, rule), None)
    if view.transform is None:
        view = view._replace(transform=torch.eye(3, device=student.device).expand(len(student), 3, 3))
    transform, own, theirs = view.transform.float(), view.student_valid, view.teacher_valid
    if rule.to_teacher or teacher.shape[-1] <= student.shape[-1]:
        size = teacher.shape[-2:]
        points = grid(transform, size)
        student, sampled = _sample(student, points), _sample_mask(own, student, points)
        kept = torch.ones_like(sampled) if theirs is None else token_mask(theirs, *size, rule.whole)
    else:
        size = student.shape[-2:]
        points = grid(torch.linalg.inv_ex(transform).inverse, size)
        of_tokens = None if theirs is None else token_mask(theirs, *teacher.shape[-2:], rule.whole)
        teacher, sampled = _sample(teacher, points), _sample_mask(of_tokens, teacher, points)
        pooled = None if own is None else F.adaptive_avg_pool2d(own[:, None].float(), size)[:, 0]
        kept = torch.ones_like(sampled) if pooled is None else pooled
    weight = sampled * kept * (1 - rule.floor) + rule.floor
    if rule.inside:
        weight = weight.masked_fill((points.abs() > 1).any(-1), 0.0)
    return Aligned(student, teacher, weight)


def align_tokens(
    student: Tensor, teacher: Tensor, rule: Rule, view: View | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`align` of patch tokens of square grids: [B, n, C], [B, n, C'], weight [B, n] or None.

    Args:
        student: [B, N, C].
        teacher: [B, M, C'].

    Raises:
        ValueError: a grid that is not square.
    """
    if student.shape[1] == teacher.shape[1] and (view is None or all(part is None for part in view)):
        return student, teacher, None
    maps = (x.transpose(1, 2).unflatten(2, (side_of(x), -1)) for x in (student, teacher))
    aligned = align(*maps, rule, view)
    tokens = (x.flatten(2).transpose(1, 2) for x in aligned[:2])
    return *tokens, None if aligned.weight is None else aligned.weight.flatten(1)


def side_of(tokens: Tensor) -> int:
    """Rows of the square grid of patch tokens [B, N, C]; ValueError if N is no square."""
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} patches are no square grid: objective.align lays square maps on another")
    return side


def _resized(student: Tensor, teacher: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    choose = min if rule.plain == "smaller" else max
    size = tuple(choose(sides) for sides in zip(student.shape[-2:], teacher.shape[-2:], strict=True))
    options = {"size": size, "mode": rule.mode, "align_corners": rule.corners}
    resized = (x if x.shape[-2:] == size else F.interpolate(x.float(), **options) for x in (student, teacher))
    return tuple(resized)


def _sample(x: Tensor, points: Tensor) -> Tensor:
    return F.grid_sample(x.float(), points, mode="bilinear", padding_mode="zeros", align_corners=True)


def _sample_mask(valid: Tensor | None, like: Tensor, points: Tensor) -> Tensor:
    """A mask at points; where there is none, all of the map `like` is valid, and what lies outside of it is not."""
    valid = torch.ones_like(like[:, 0], dtype=torch.float32) if valid is None else valid
    return _sample(valid[:, None], points)[:, 0]


def sums_of(weight: Tensor, rule: Rule) -> Tensor:
    """What `image_losses` needs of all ranks, added over them: images, and what they count together; float64 [2]."""
    counted = _counted(weight, rule).double().sum()
    return torch.stack([counted.new_full((), len(weight)), counted])


def image_losses(positions: Tensor, weight: Tensor, rule: Rule, sums: Tensor) -> Tensor:
    """Loss of every image [B], the mean of which over all ranks' images is the weighted loss.

    Args:
        positions: of every position, [B, N].
        weight: float32 [B, N].
        sums: of `sums_of`, over all ranks.
    """
    mean = (positions * weight).sum(1) / weight.sum(1).clamp_min(1e-30 if rule.power == 1 else 1.0)
    return mean * _counted(weight, rule) * (sums[0] / sums[1].clamp_min(1.0)).to(mean.dtype)


def _counted(weight: Tensor, rule: Rule) -> Tensor:
    """How much every image counts, [B], of weights [B, ...]."""
    tokens = weight.flatten(1).sum(1)
    return tokens if rule.power == 1 else tokens.clamp_min(1.0) ** rule.power
