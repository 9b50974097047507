"""The terms of a token's loss: a weighted sum of what the fused kernel gives and of losses in plain torch.

    cosine, smooth_l1, mse     the fused kernel: standardized features exist in registers alone
    dampened_mse, map_cosine   torch: each makes the standardized features, float32, and reads them several times, so
                               it costs a GPU about 5 times the memory traffic of the kernel
    angle, tangent_sphere      torch, of summaries alone; with statistics of the teacher's vectors (`TermStates`)

Smooth-L1 is d^2 / (2 beta) below beta. So with a beta that no difference reaches, 2 beta times it is the squared error,
to the bit where beta is a power of two, and its gradient too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dune_fast.distill.map_cosine import map_cosine
from dune_fast.distill.standardization import AllReduce, Features, Standardizer
from dune_fast.distill.summary import ANGLE_SAMPLES, TANGENT_SAMPLES, AngleDispersion, TangentSphere
from dune_fast.kernels.distill_loss import distill_loss, standardize
from dune_fast.kernels.nn.routing import Routes

WIDE = 2.0**20
"""A beta that no difference of features reaches."""


@dataclass
class TermWeights:
    """Coefficients of the terms of a token's loss."""

    cosine: float = 0.5
    """Of 1 - cos of each token."""
    smooth_l1: float = 0.5
    """Of the mean smooth-L1."""
    mse: float = 0.0
    """Of the mean squared error. PHI-S, RADIOv2.5: 1 on patches."""
    dampened_mse: float = 0.0
    """Of d^2 / 2 within 1 and 2 sqrt(|d|) - 1.5 beyond, the mean over channels."""
    map_cosine: float = 0.0
    """Of 1 - cos of an image's whole map (Theia: 0.9, SAK)."""
    angle: float = 0.0
    """Of the squared angle over the teacher's dispersion (C-RADIOv4), on cls alone."""
    tangent_sphere: float = 0.0
    """Of the distance on the tangent plane at the teacher's mean direction, on cls alone."""


def dampened(d: Tensor) -> Tensor:
    """d^2 / 2 within 1, 2 sqrt(|d| + 1e-8) - 1.5 beyond: the pull of a large difference falls."""
    size = d.abs()
    return (0.5 * d.square()).where(size < 1, 2 * (size + 1e-8).sqrt() - 1.5)


ELEMENTS: dict[str, Callable[[Tensor], Tensor]] = {"mse": Tensor.square, "dampened_mse": dampened}
"""Term -> loss of a difference, element by element; the mean over channels is a position's."""

STATEFUL: dict[str, type[AngleDispersion] | type[TangentSphere]] = {
    "angle": AngleDispersion, "tangent_sphere": TangentSphere,
}  # fmt: skip
"""Term -> its module, which has the statistics of one teacher."""


class TermStates(nn.Module):
    """Statistics of the terms that have some, of every teacher; empty where no such term counts.

    State: `<teacher>.<term>.<buffer>`.

    Args:
        teachers: name -> (channels, token types).
        weights: of the cls token.
        batch: images of a global batch.
        angle_samples, tangent_samples: vectors of a teacher after which its statistics stay.
    """

    def __init__(
        self, teachers: Mapping[str, tuple[int, Sequence[str]]], weights: TermWeights, batch: int,
        angle_samples: float = ANGLE_SAMPLES, tangent_samples: int = TANGENT_SAMPLES,
    ) -> None:  # fmt: skip
        super().__init__()
        self.batch = batch
        for name, (channels, token_types, *_) in teachers.items():
            if "cls" not in token_types:
                continue
            states = nn.ModuleDict()
            if weights.angle:
                states["angle"] = AngleDispersion(channels, angle_samples)
            if weights.tangent_sphere:
                states["tangent_sphere"] = TangentSphere(channels, tangent_samples, batch)
            if states:
                self.add_module(name, states)

    def update(
        self, features: Features, standardizers: Mapping[str, Mapping[str, Standardizer]], positions: Tensor,
        routes: Routes | None, all_reduce: AllReduce | None,
    ) -> None:  # fmt: skip
        """Takes a rank's part of a global batch in.

        Args:
            features: the teachers', `TeacherStatistics.rotated`, of the images of `routes`.
            standardizers: of this step.
            positions: int64 [B], global index of each image in the run.
        """
        slots = positions % self.batch
        for name, states in self.named_children():
            given = slots if routes is None else routes[name].take(slots)
            target = standardize(features[name]["cls"], *standardizers[name]["cls"])
            for state in states.values():
                state.update(target, given, all_reduce)

    def of(self, name: str, token: str) -> Mapping[str, nn.Module]:
        """Term -> its statistics, of a teacher's token type."""
        return getattr(self, name, {}) if token == "cls" else {}

    def live(self) -> list[Tensor]:
        """What a step changes, and gives back where it is skipped."""
        return [x for module in self.modules() if isinstance(module, AngleDispersion | TangentSphere)
                for x in module.live()]  # fmt: skip


def token_loss(
    student: Tensor, target: Tensor, standardizer: Standardizer | None, weights: TermWeights, beta: float,
    states: Mapping[str, nn.Module] | None = None, reduce: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Loss of one teacher's token type on every image, and its parts.

    Args:
        student: [B, C] or [B, N, C].
        target: the teacher's, of the same shape; raw where there is a standardizer, else standardized.
        beta: of smooth-L1.
        states: of `TermStates`, for the terms that have statistics.
        reduce: from a loss of every patch [B, N] to one of every image [B]; the mean by default.

    Returns:
        [B] with gradient; "cosine" and the other terms that count -> [B], detached.
    """
    total, parts = _fused(student, target, standardizer, weights, beta, reduce)
    rest = {term: w for term in ("dampened_mse", "map_cosine", *STATEFUL) if (w := getattr(weights, term))}
    if not rest:
        return total, parts
    y = target.float() if standardizer is None else standardize(target, *standardizer)
    for term, weight in rest.items():
        if term in ELEMENTS:
            tokens = ELEMENTS[term](student.float() - y).mean(-1)
            loss = tokens if tokens.ndim == 1 else tokens.mean(1) if reduce is None else reduce(tokens)
        elif term == "map_cosine":
            if reduce is not None:
                raise ValueError("the loss map_cosine takes whole maps, but a view of a teacher's leaves patches out")
            loss = map_cosine(student, y)
        else:
            assert states is not None, f"the loss {term} needs the statistics of its teacher"
            loss = states[term](student, y)
        total, parts[term] = total + weight * loss, loss.detach()
    return total, parts


def _fused(
    student: Tensor, target: Tensor, standardizer: Standardizer | None, weights: TermWeights, beta: float,
    reduce: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """What the kernel gives; the cosine always, for it says how far a student has got."""
    shape = student.shape[:-1]
    if reduce is not None:  # every patch is an image of its own to the kernel
        student, target = student.flatten(0, 1), target.flatten(0, 1)

    def call(cosine: float, smooth_l1: float, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(cosine or smooth_l1)):
            losses = distill_loss(student, target, *(standardizer or (None, None)), cosine, smooth_l1, beta)
        return tuple(x if reduce is None else reduce(x.view(shape)) for x in losses)

    if weights.mse and not weights.smooth_l1:
        total, cosine, scaled = call(weights.cosine, 2 * WIDE * weights.mse, WIDE)
        return total, {"cosine": cosine, "mse": 2 * WIDE * scaled}
    total, cosine, smooth_l1 = call(weights.cosine, weights.smooth_l1, beta)
    parts = {"cosine": cosine, "smooth_l1": smooth_l1}
    if weights.mse:
        more, _, scaled = call(0.0, 2 * WIDE * weights.mse, WIDE)
        total, parts["mse"] = total + more, 2 * WIDE * scaled
    return total, parts
