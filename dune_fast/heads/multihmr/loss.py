"""Multi-HMR's losses: focal detection over all patches, L1 on everything that is known of the people.

L1 terms are means over the kept people (or their points) of a sum over components. A term that is not finite counts 0
and sends no gradient. The host reads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dune_fast.heads.multihmr.head import People, Placed
from dune_fast.heads.multihmr.targets import Targets

_EPS = 1e-7  # under the logarithms


@dataclass
class LossWeights:
    """Weight of every term; the published ones. ValueError for negative ones."""

    bce: float = 10.0
    """Detection."""
    offset: float = 1.0
    rotmat: float = 0.1
    shape: float = 1.0
    dist: float = 1.0
    """The depth's value as the head gives it."""
    transl: float = 1.0
    j3d: float = 100.0
    """Joints minus the pelvis."""
    v3d: float = 100.0
    j2d: float = 1.0
    """In pixels; from `start_2d` on."""
    v2d: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"the weight {field.name}={value} of Multi-HMR's loss: give a number from 0 on")


class _Gate(torch.autograd.Function):
    """x forward; backward nothing of a term that turned out not to be finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, finite: list[Tensor]) -> Tensor:
        ctx.finite = finite
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.finite[0], gradient, torch.zeros_like(gradient)), None


def if_finite(term: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """term(*inputs), or 0 without gradient where that is not finite: 0 x infinity would be a gradient otherwise."""
    finite: list[Tensor] = []
    value = term(*(_Gate.apply(x, finite) for x in inputs))
    finite.append(value.detach().isfinite())
    return torch.where(finite[0], value, torch.zeros_like(value))


def detection_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Focal loss with exponent 2 of scores [B, g, g] against 0 and 1, over the number of people."""
    hit = (scores + _EPS).log() * (1 - scores) ** 2 * target
    miss = (1 - scores + _EPS).log() * scores**2 * (1 - target)
    return -(hit.sum() + miss.sum()) / target.sum().clamp(min=1)


def _mean(value: Tensor, weight: Tensor) -> Tensor:
    """Mean of `value` where `weight`, of the same shape, is true; 0 where it is nowhere. The others may be NaN."""
    return torch.where(weight, value, torch.zeros_like(value)).sum() / weight.sum().clamp(min=1)


def losses(
    people: People, placed: Placed, targets: Targets, side: int, with_2d: bool, weights: LossWeights
) -> dict[str, Tensor]:
    """Every term by its name in `LossWeights`, not weighted, and "total", their weighted sum.

    Args:
        people, placed: predictions in the cells of the targets.
        targets: see there.
        side: S; points of the ground truth outside the image do not count in 2D.
        with_2d: whether `j2d` and `v2d` count in the sum; in published training from epoch 10 (of 10,000 steps) on.
        weights: of the terms.
    """
    kept, body = targets.cells.kept, targets.body
    columns = min(people.betas.shape[1], targets.betas.shape[1])

    def per_person(wanted: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: _mean((x - wanted).abs().flatten(1).sum(1), kept)

    def centred(wanted: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        wanted = wanted - body.pelvis[:, None]
        everywhere = kept[:, None].expand(wanted.shape[:2])
        return lambda x, pelvis: _mean((x - pelvis[:, None] - wanted).abs().sum(-1), everywhere)

    def in_image(wanted: Tensor) -> Callable[[Tensor], Tensor]:
        seen = ((wanted > 0) & (wanted < side)).all(-1) & kept[:, None]
        return lambda x: _mean((x - wanted).abs().sum(-1), seen)

    found = {
        "bce": if_finite(lambda x: detection_loss(x, targets.scores), people.score_map),
        "offset": if_finite(per_person(targets.offset), people.offset),
        "rotmat": if_finite(per_person(targets.rotations), people.rotations),
        "shape": if_finite(per_person(targets.betas[:, :columns]), people.betas[:, :columns]),
        "dist": if_finite(per_person(targets.depth_value[:, None]), people.depth_value[:, None]),
        "transl": if_finite(per_person(targets.translation), people.translation),
        "j3d": if_finite(centred(body.j3d), placed.j3d, placed.pelvis),
        "v3d": if_finite(centred(body.v3d), placed.v3d, placed.pelvis),
        "j2d": if_finite(in_image(body.j2d), placed.j2d),
        "v2d": if_finite(in_image(body.v2d), placed.v2d),
    }
    counted = [name for name in found if with_2d or name not in ("j2d", "v2d")]
    found["total"] = torch.stack([getattr(weights, name) * found[name] for name in counted]).sum()
    return found
