"""What the raw channels of MASt3R's two heads mean: points, confidences, descriptors.

    points  x / max(|x|, 1e-8) * f(|x|):   exp: f(r) = exp(r) - 1,   square: r^2,   linear: x itself
    confidence of z                        exp: low + min(exp(z), high - low),   sigmoid: low + (high - low) sigmoid(z)
    descriptor                             divided by its length
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dune_fast.heads.head import HeadError

POINT_MODES = ("exp", "square", "linear")
CONFIDENCE_MODES = ("exp", "sigmoid")


class Mode(NamedTuple):
    """How a raw value becomes an output within [low, high]."""

    kind: str
    low: float = -math.inf
    high: float = math.inf

    def plain(self) -> list[Any]:
        """As JSON: an infinite bound is null."""
        return [self.kind, *(bound if math.isfinite(bound) else None for bound in (self.low, self.high))]


class Modes(NamedTuple):
    """Of all outputs."""

    depth: Mode = Mode("exp")
    """Of the points; it has no bounds."""
    conf: Mode = Mode("exp", 1.0)
    desc_conf: Mode | None = Mode("exp", 0.0)
    """None: as `conf`."""
    two_confs: bool = True
    """Whether the descriptors have a confidence of their own, the last channel; else theirs is that of the points."""


def read_mode(name: str, value: Any, kinds: Sequence[str]) -> Mode:
    """A mode of (kind, low, high) as an option says it; a missing or None bound is infinite. HeadError."""
    unbounded = [None, None]
    try:
        kind, low, high = [*([value] if isinstance(value, str) else value), *unbounded][:3]
        mode = Mode(kind, -math.inf if low is None else float(low), math.inf if high is None else float(high))
    except (TypeError, ValueError) as error:
        raise HeadError(f"{name} is {value!r}; give (kind, low, high), the kind one of {', '.join(kinds)}") from error
    if mode.kind not in kinds:
        raise HeadError(f"{name} is {value!r}; the kinds are {', '.join(kinds)}")
    finite = math.isfinite(mode.low) and (math.isfinite(mode.high) or mode.kind == "exp")
    if kinds is POINT_MODES and (mode.low, mode.high) != (-math.inf, math.inf):
        raise HeadError(f"{name} is {value!r}; points have no bounds: give -inf and inf")
    if kinds is CONFIDENCE_MODES and not (finite and mode.low < mode.high):
        raise HeadError(f"{name} is {value!r}; a confidence needs low < high, both finite (high may be inf for exp)")
    return mode


def points(raw: Tensor, mode: Mode) -> Tensor:
    """[..., 3] -> [..., 3]; a point at zero stays there."""
    if mode.kind == "linear":
        return raw
    length = torch.linalg.vector_norm(raw, dim=-1, keepdim=True)
    return raw / length.clamp(min=1e-8) * (torch.expm1(length) if mode.kind == "exp" else length.square())


def confidence(raw: Tensor, mode: Mode) -> Tensor:
    """Any shape -> the same, within [low, high]."""
    if mode.kind == "exp":
        return mode.low + raw.exp().clamp(max=mode.high - mode.low)
    return mode.low + (mode.high - mode.low) * torch.sigmoid(raw)


def activate(raw: Tensor, modes: Modes) -> dict[str, Tensor]:
    """The outputs of raw channels: 3 of the point, 1 of its confidence, d of the descriptor, 1 of its confidence.

    Args:
        raw: [B, 4 + d + 1, H, W], without the last channel where `two_confs` is False.

    Returns:
        `pts3d` [B, H, W, 3], `conf` [B, H, W], `desc` [B, H, W, d] of length 1, `desc_conf` [B, H, W].
    """
    raw = raw.movedim(1, -1)
    end = raw.shape[-1] - int(modes.two_confs)
    desc = raw[..., 4:end]
    conf = confidence(raw[..., 3], modes.conf)
    return {
        "pts3d": points(raw[..., :3], modes.depth),
        "conf": conf,
        "desc": desc / torch.linalg.vector_norm(desc, dim=-1, keepdim=True),
        "desc_conf": confidence(raw[..., end], modes.desc_conf or modes.conf) if modes.two_confs else conf.clone(),
    }
