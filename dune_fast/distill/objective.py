"""From projections and teachers' features to one scalar: per-image losses, which of them count, their mean.

    L[t, b] = mean (or sum) over token types of the token loss;   loss = sum(c * L) / sum(c),   c in {0, 1}

Everything is a tensor on the device: no value is read by the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dune_fast.distill.alignment import RULES, View, align_tokens, image_losses, sums_of
from dune_fast.distill.standardization import AllReduce, Features, Standardizer
from dune_fast.distill.summary import ANGLE_SAMPLES, TANGENT_SAMPLES
from dune_fast.distill.terms import STATEFUL, TermStates, TermWeights, token_loss
from dune_fast.kernels.nn.routing import Routes
from dune_fast.kernels.teacher_drop import drop_uniforms, teacher_drop, teacher_drop_reference

SHARING = ("full", "none", "generic")


@dataclass
class ObjectiveConfig:
    """The loss and which teacher's loss counts on which image."""

    cls: TermWeights = field(default_factory=TermWeights)
    """Of the cls token. AM-RADIO: 1 and 0; C-RADIOv4: the angle alone."""
    patch: TermWeights = field(default_factory=TermWeights)
    """Of patch tokens. AM-RADIO: 0.9 and 0.1."""
    beta: float = 1.0
    """Where smooth-L1 turns from quadratic to linear."""
    tokens: str = "mean"
    """What a teacher's loss on an image is of those of its token types: their "mean" (DUNE), or their "sum" (RADIO)."""
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    """teacher -> token type -> what its loss is multiplied by, e.g. {sam: {cls: 0.0, patch: 2.0}}; 1 where missing."""
    align: str = ""
    """How the student's and a teacher's patches of different grids, or views, are brought together; one of
    `dune_fast.distill.alignment.RULES`. Empty: all have the student's grid and see the same."""
    angle_samples: int = ANGLE_SAMPLES
    """The angle loss takes the dispersion of so many vectors of a teacher, which then stays."""
    tangent_samples: int = TANGENT_SAMPLES
    """The tangent-sphere loss is the cosine until so many vectors have been seen; its statistics then stay. Until then
    the vectors are kept, 4 bytes a channel, also in checkpoints."""
    sharing: str = "full"
    """Data sharing: "full" (every teacher on every image), "none" (a teacher on images of its own datasets only),
    "generic" (its own and the generic ones)."""
    drop_probability: float = 0.5
    """With sharing "full": every teacher but the hardest of an image is dropped with this probability."""
    generic_group: str = "generic"
    """The dataset group that sharing "generic" opens to every teacher."""
    route_by_dataset: bool = False
    """With sharing "none" or "generic": a teacher, and the student's projector for it, run on the images that count for
    it alone, a third of a balanced batch. Losses are the same for the same statistics; the statistics of a batch differ
    from the published method's, being taken over what the teacher saw."""
    presample: bool = False
    """With sharing "full": which teachers an image drops is drawn before the forward pass, so without its losses, and a
    dropped teacher, and the student's projector for it, do not run on it. Every teacher is dropped with
    `drop_probability` p, and where all would be one stays: of T teachers each runs on 1 - p + p^T / T of the images.
    Departs from the paper, which keeps the hardest and runs all; statistics are taken over what a teacher saw."""
    teachers_per_step: int = 0
    """With sharing "full": in every step so many teachers, drawn anew, run on the whole batch and the others not at all
    (Theia draws 2); `drop_probability` then has no say. 0 for all teachers in every step."""
    patch_share: float = 1.0
    """The share of an image's patches that the patches' loss, and with it the projectors and the teachers' statistics,
    are taken on: in each step other ones, the same for all its images. Below 1 it departs from the paper."""

    def __post_init__(self) -> None:
        if self.sharing not in SHARING:
            raise ValueError(f"objective.sharing is {self.sharing!r}; choose one of {', '.join(SHARING)}")
        if not 0.0 <= self.drop_probability <= 1.0:
            raise ValueError(f"objective.drop_probability is {self.drop_probability}; it must lie in [0, 1]")
        if not 0.0 < self.patch_share <= 1.0:
            raise ValueError(f"objective.patch_share is {self.patch_share}; it must lie above 0, up to 1")
        drawn = [f"objective.teachers_per_step={self.teachers_per_step}"] if self.teachers_per_step else []
        drawn += ["objective.presample=true"] if self.presample else []
        drawn += ["objective.route_by_dataset=true"] if self.route_by_dataset else []
        if len(drawn) > 1 and self.teachers_per_step:
            raise ValueError(f"{' and '.join(drawn)} each say which teachers run: choose one of them")
        if self.teachers_per_step and self.sharing != "full":
            raise ValueError(
                f"objective.teachers_per_step={self.teachers_per_step} with objective.sharing={self.sharing}: set the "
                "sharing to full, or leave teachers_per_step at 0"
            )
        if self.tokens not in ("mean", "sum"):
            raise ValueError(f"objective.tokens is {self.tokens!r}; choose mean or sum")
        if self.align and self.align not in RULES:
            raise ValueError(f"objective.align is {self.align!r}; leave it empty, or choose one of {', '.join(RULES)}")
        if not any(any(vars(weights).values()) for weights in (self.cls, self.patch)):
            raise ValueError("no term of objective.cls and objective.patch has a weight; set one above 0")
        if found := [term for term in STATEFUL if getattr(self.patch, term)]:
            raise ValueError(
                f"objective.patch.{found[0]} is {getattr(self.patch, found[0])}, but it is a loss of summaries: put it "
                f"on objective.cls.{found[0]}"
            )
        if self.patch_share < 1 and (self.align or self.patch.map_cosine):
            option = f"objective.align={self.align}" if self.align else "objective.patch.map_cosine"
            raise ValueError(
                f"objective.patch_share is {self.patch_share}, but {option} takes whole maps: leave one of them out"
            )
        if self.presample and self.sharing != "full":
            raise ValueError(
                f"objective.presample is true, but objective.sharing={self.sharing} drops no teacher at random: set "
                "the sharing to full, or choose objective.route_by_dataset=true in place of presample"
            )
        if self.route_by_dataset and self.sharing == "full":
            raise ValueError(
                "objective.route_by_dataset is true, but with objective.sharing=full every teacher counts on every "
                "image: set it to false, or the sharing to none or generic"
            )


def ownership(
    own_groups: Mapping[str, Sequence[str]], groups: Sequence[str], cfg: ObjectiveConfig
) -> Tensor:
    """Which dataset groups count for which teacher under `cfg.sharing`, bool [T, G] on the host.

    Args:
        own_groups: teacher -> the groups of its own datasets.
        groups: all groups, in the order of a batch's group indices.

    Raises:
        ValueError: a teacher would never get an image.
    """
    rows = []
    for name, own in own_groups.items():
        allowed = {"full": set(groups), "none": set(own), "generic": {*own, cfg.generic_group}}[cfg.sharing]
        row = [group in allowed for group in groups]
        if not any(row):
            raise ValueError(
                f"teacher {name!r} never gets an image: its groups {sorted(allowed)} with objective.sharing="
                f"{cfg.sharing!r} are none of the data's groups {list(groups)}"
            )
        rows.append(row)
    return torch.tensor(rows)


def teacher_losses(
    projections: Features,
    features: Features,
    standardizers: Mapping[str, Mapping[str, Standardizer]] | None,
    cfg: ObjectiveConfig,
    routes: Routes | None = None,
    states: TermStates | None = None,
    views: Mapping[str, View] | None = None,
    all_reduce: AllReduce | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of every teacher on every image, and its parts.

    Args:
        projections: the student's, teacher -> token type -> [B, C] or [B, N, C].
        features: the teachers', raw; already standardized where `standardizers` is None.
        routes: the n images that `projections` and `features` of each teacher are of, where it is not all B.
        states: statistics of the terms that have some.
        views: of the teachers that see other crops than the student, of the same n images.
        all_reduce: sums a float64 tensor over ranks; called once, where there are views.

    Returns:
        L float32 [T, B] in the order of `features`, 0 on images that a teacher did not get, and parts
        `<teacher>/<token>/<term>` and `.../total` -> [B] or [n], detached.
    """
    pairs = _aligned(projections, features, cfg, views or {}, all_reduce)
    losses, parts = [], {}
    for name, tokens in features.items():
        per_token = []
        for token in tokens:
            student, target, reduce = pairs[name, token]
            standardizer = standardizers[name][token] if standardizers is not None else None
            own = {} if states is None else states.of(name, token)
            weights: TermWeights = getattr(cfg, token)
            total, terms = token_loss(student, target, standardizer, weights, cfg.beta, own, reduce)
            weight = cfg.weights.get(name, {}).get(token, 1.0)
            per_token.append(total if weight == 1 else weight * total)
            parts |= {f"{name}/{token}/{term}": value for term, value in terms.items()}
            parts[f"{name}/{token}/total"] = total.detach()
        stacked = torch.stack(per_token)
        loss = stacked.mean(0) if cfg.tokens == "mean" else stacked.sum(0)
        losses.append(loss if routes is None else routes[name].spread(loss))
    return torch.stack(losses), parts


def _aligned(
    projections: Features, features: Features, cfg: ObjectiveConfig, views: Mapping[str, View],
    all_reduce: AllReduce | None,
) -> dict[tuple[str, str], tuple[Tensor, Tensor, Callable[[Tensor], Tensor] | None]]:  # fmt: skip
    """(teacher, token type) -> both tokens of one grid, and what makes images' losses of patches' losses."""
    pairs: dict[tuple[str, str], tuple[Tensor, Tensor, Callable[[Tensor], Tensor] | None]] = {}
    weights: dict[tuple[str, str], Tensor] = {}
    for name, tokens in features.items():
        for token, target in tokens.items():
            student = projections[name][token]
            if token == "patch" and cfg.align:
                student, target, weight = align_tokens(student, target, RULES[cfg.align], views.get(name))
                if weight is not None:
                    weights[name, token] = weight
            elif token == "patch" and student.shape[1] != target.shape[1]:
                raise ValueError(
                    f"teacher {name!r} gives {target.shape[1]} patches of an image, the student {student.shape[1]} for "
                    f"it: choose objective.align ({', '.join(RULES)}), or teachers.{name}.grid=student"
                )
            pairs[name, token] = student, target, None
    if weights:
        rule = RULES[cfg.align]
        sums = torch.stack([sums_of(weight, rule) for weight in weights.values()])
        if all_reduce is not None:
            all_reduce(sums)
        for (key, weight), of_all in zip(weights.items(), sums, strict=True):
            reduce = functools.partial(image_losses, weight=weight, rule=rule, sums=of_all)
            pairs[key] = (*pairs[key][:2], reduce)
    return pairs


def term_states(
    cfg: ObjectiveConfig, teachers: Mapping[str, tuple[int, Sequence[str]]], global_batch: int
) -> TermStates:
    """Statistics of the terms that count; see `TermStates`."""
    return TermStates(teachers, cfg.cls, global_batch, cfg.angle_samples, cfg.tangent_samples)


def coefficients(
    losses: Tensor, own: Tensor, groups: Tensor, positions: Tensor, step: int, seed: int, cfg: ObjectiveConfig,
    routes: Routes | None = None,
) -> Tensor:  # fmt: skip
    """c of the formula, float32 [T, B].

    Args:
        losses: [T, B].
        own: bool [T, G] of `ownership`.
        groups: int64 [B], dataset group of each image.
        positions: int64 [B], global index of each image in the run.
        step, seed: of the run.
        routes: the images of each teacher, in the order of `losses`: all of them count, and no others.
    """
    if routes is not None:
        return torch.stack([route.spread(losses.new_ones(len(route))) for route in routes.values()])
    if cfg.sharing == "full":
        return teacher_drop(losses, positions, step, seed, cfg.drop_probability)
    return teacher_drop(losses, positions, step, seed, 0.0, own, groups)


def presampled(positions: np.ndarray, teachers: int, step: int, seed: int, cfg: ObjectiveConfig) -> np.ndarray:
    """Which teachers run on which image with `cfg.presample`, bool [T, B], on the host.

    A random number stands where dropping by losses has the loss: the largest of an image keeps its teacher.

    Args:
        positions: int64 [B], global index of each image in the run.
    """
    at = torch.from_numpy(positions)
    drawn = drop_uniforms(seed, step, at, teachers)
    kept = np.empty(drawn.shape, bool)
    torch.from_numpy(kept).copy_(teacher_drop_reference(drawn, at, None, None, step, seed, cfg.drop_probability))
    return kept


def drawn_teachers(teachers: int, count: int, step: int, seed: int) -> np.ndarray:
    """`count` of the teachers, for a whole step, bool [T], on the host: the largest of a random number each."""
    drawn = drop_uniforms(seed, step, torch.zeros(1, dtype=torch.int64), teachers)[:, 0]
    kept = np.zeros(teachers, bool)
    kept[drawn.argsort(descending=True)[:count].numpy()] = True
    return kept


def combine(losses: Tensor, c: Tensor) -> Tensor:
    """sum(c * L) / sum(c), a scalar; 0 where no loss counts."""
    return (c * losses).sum() / c.sum().clamp_min(1.0)
