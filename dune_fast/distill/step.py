"""The walk of a batch through one distillation step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dune_fast.distill.alignment import RULES, View, side_of, token_mask
from dune_fast.distill.objective import (
    ObjectiveConfig,
    coefficients,
    combine,
    drawn_teachers,
    presampled,
    teacher_losses,
)
from dune_fast.distill.overlap import SideStream
from dune_fast.distill.standardization import AllReduce, Features, TeacherStatistics
from dune_fast.distill.terms import TermStates
from dune_fast.kernels.nn.draws import StepDraws
from dune_fast.kernels.nn.patches import SharedPatches
from dune_fast.kernels.nn.routing import OwnPatches, PatchSubset, Routes, make_routes, select


class PerImage(NamedTuple):
    """What a step knows of every teacher on every image, [T, B] on the device."""

    losses: Tensor
    """Before dropping, detached, float32; 0 on images that the teacher did not get."""
    finite: Tensor
    """Whether all of the teacher's features are finite, bool; true on images that it did not get. One image whose
    features are not spoils the statistics, and with them the losses of all."""


class StepOutput(NamedTuple):
    """Loss of this rank's batch, a scalar with gradient; detached scalars, and values per image, on the device."""

    loss: Tensor
    metrics: dict[str, Tensor]
    images: PerImage


def finite_images(features: Features, routes: Routes | None) -> Tensor:
    """`PerImage.finite` of features, and of the routes where a teacher has not got all images."""
    rows = []
    for name, tokens in features.items():
        # a sum is finite unless one of its terms is not (none comes near float32's limit), and one pass without copies
        sums = torch.stack([x.flatten(1).sum(1, dtype=torch.float32) for x in tokens.values()]).sum(0)
        rows.append(sums if routes is None else routes[name].spread(sums))
    return torch.stack(rows).isfinite()


def of_subset(features: Features, subset: PatchSubset) -> Features:
    """Features of a subset of the patches, all teachers' on one grid; the cls tokens as they are."""
    patches = [tokens["patch"] for tokens in features.values() if "patch" in tokens]
    if not patches:
        return features
    index = subset.index(patches[0].shape[1], patches[0].device)
    return {
        name: {token: select(x, index) if token == "patch" else x for token, x in tokens.items()}
        for name, tokens in features.items()
    }


def own_patches(kept: Tensor, subset: PatchSubset | None) -> OwnPatches:
    """Of every image's kept patches [B, n], all, or those at the places that a subset of n patches has."""
    index = None if subset is None else subset.index(kept.shape[1], kept.device)
    return OwnPatches(kept if index is None else kept[:, index])


def routed(features: Features, routes: Routes) -> Features:
    """Of features of all images, those of the images that each teacher gets."""
    return {name: {kind: routes[name].take(x) for kind, x in kinds.items()} for name, kinds in features.items()}


def views_of(views: Mapping[str, View] | None, routes: Routes | None) -> dict[str, View]:
    """Of views of all images, those of the images that each teacher gets."""
    if routes is None or not views:
        return dict(views or {})
    taken = {name: [None if x is None else routes[name].take(x) for x in view] for name, view in views.items()}
    return {name: View(*parts) for name, parts in taken.items()}


@dataclass
class DistillationStep:
    """Images in, loss out.

    No I/O, nothing read by the host, no logic of ranks but the one all-reduce that is passed in.
    """

    student: Callable[..., Features]
    """The student, wrapped or not: images, routes or None, patches, subset of patches or None, draws -> teacher ->
    token type -> projection."""
    teachers: Callable[..., Features]
    """The frozen teachers: images, routes or None, patches, and pictures and sizes if there are some -> teacher ->
    token type -> raw features."""
    statistics: TeacherStatistics
    """Updated in place by every step."""
    own: Tensor
    """Which dataset group counts for which teacher, bool [T, G] on the host, of `objective.ownership`."""
    objective: ObjectiveConfig
    seed: int = 0
    all_reduce: AllReduce | None = None
    side: SideStream | None = None
    """Where the teachers run beside the student; None for after it, on the same stream."""
    states: TermStates | None = None
    """Statistics of the loss's terms, updated in place by every step; None where no term has any."""
    sizes: Callable[[int], Mapping[str, int]] | None = None
    """Step -> teacher -> side in pixels of its images; None where no teacher's changes from step to step."""
    loss_reduce: AllReduce | None = None
    """In place of `all_reduce` for the loss, where a mean over images is not one over those of all ranks."""

    def __post_init__(self) -> None:
        self._own_on_host = np.array(self.own.tolist())  # where the table is: no device is read
        self._own_on = functools.cache(self.own.to)

    def __call__(
        self,
        images: Tensor,
        groups: Tensor,
        positions: Tensor,
        step: int,
        momentum: float,
        groups_on_host: np.ndarray | None = None,
        features: Features | None = None,
        positions_on_host: np.ndarray | None = None,
        kept: Tensor | None = None,
        views: Mapping[str, View] | None = None,
        pictures: Mapping[str, Tensor] | None = None,
        active: Collection[str] = (),
    ) -> StepOutput:
        """One forward pass.

        Args:
            images: ImageNet-normalised [B, 3, H, W].
            groups: int64 [B], dataset group of each image.
            positions: int64 [B], global index of each image in the run.
            step: of the run.
            momentum: of the teachers' running statistics.
            groups_on_host: `groups` where the host can look at them; needed with `objective.route_by_dataset`.
            features: of all images, from a cache: the teachers do not run.
            positions_on_host: the same of `positions`; needed with `objective.presample`.
            kept: the n patches of every image that `features` are of, int64 [B, n], where a cache has not kept all.
            views: of the teachers that see other crops than the student, of all B images.
            pictures: teacher -> what it sees in place of `images`, [B, 3, h, w].
            active: the teachers that take part, by default all; the others get no image.
        """
        routes = self.routes(images, step, groups_on_host, positions_on_host, active)
        share = self.objective.patch_share
        subset = PatchSubset(share, self.seed, step) if share < 1 else None
        patches, draws = SharedPatches(), StepDraws(self.seed, step, positions)
        sizes = None if self.sizes is None else self.sizes(step)
        given = (pictures, sizes) if pictures or sizes else ()  # what teachers see of their own
        if features is not None:
            chosen = subset if kept is None else own_patches(kept, subset)
            projections = self.student(images, routes, patches, chosen, draws)
            features = features if routes is None else routed(features, routes)
        elif self.side is None:
            # teacher -> token type -> [B, C] or [B, N, C]
            projections = self.student(images, routes, patches, subset, draws)
            features = self.teachers(images, routes, patches, *given)
        else:
            with self.side.fork():  # with patches of their own: the student's belong to the other stream
                features = self.teachers(images, routes, SharedPatches(), *given)
            projections = self.student(images, routes, patches, subset, draws)
            self.side.join()
        if subset is not None:
            features = of_subset(features, subset)
        views = views_of(views, routes)
        standardizers = self.statistics.update(features, momentum, self.all_reduce, self.valid(features, views))
        features = self.statistics.rotated(features)  # the same shapes
        if self.states is not None:
            self.states.update(features, standardizers, positions, routes, self.all_reduce)
        losses, parts = teacher_losses(
            projections, features, standardizers, self.objective, routes, self.states, views,
            self.loss_reduce or self.all_reduce,
        )  # [T, B]
        own = self._own_on(losses.device)
        c = coefficients(losses, own, groups, positions, step, self.seed, self.objective, routes)  # [T, B]
        loss = combine(losses, c)
        seen = [len(images) if routes is None else len(routes[name]) for name in features]
        metrics = self.metrics(loss, losses, c, parts, dict(zip(features, seen, strict=True)))
        return StepOutput(loss, metrics, PerImage(losses.detach(), finite_images(features, routes)))

    def valid(self, features: Features, views: Mapping[str, View]) -> dict[str, Tensor]:
        """teacher -> which of its patches show the image, bool [n, N], where a view says so."""
        found = {}
        for name, view in views.items():
            if view.teacher_valid is not None and "patch" in features[name]:
                side = side_of(features[name]["patch"])
                rule = RULES[self.objective.align]
                found[name] = token_mask(view.teacher_valid, side, side, rule.whole).flatten(1) > 0
        return found

    def routes(
        self, images: Tensor, step: int, groups_on_host: np.ndarray | None, positions_on_host: np.ndarray | None,
        active: Collection[str] = (),
    ) -> Routes | None:  # fmt: skip
        """The images that count for each teacher; None where all teachers get all images."""
        names = [name for name, _ in self.statistics.named_children()]  # in the order of `own`'s rows
        if self.objective.presample:
            assert positions_on_host is not None, "objective.presample needs the positions on the host"
            kept = presampled(positions_on_host, len(names), step, self.seed, self.objective)
        elif count := self.objective.teachers_per_step:
            kept = np.repeat(drawn_teachers(len(names), count, step, self.seed)[:, None], len(images), axis=1)
        elif self.objective.route_by_dataset or (active and len(active) < len(names)):
            assert groups_on_host is not None, "objective.route_by_dataset needs the groups on the host"
            kept = self._own_on_host[:, groups_on_host]
        else:
            return None
        if active:
            kept = kept & np.array([name in active for name in names])[:, None]
        indices = {name: np.flatnonzero(row) for name, row in zip(names, kept, strict=True)}
        return make_routes(indices, len(images), images.device)

    @staticmethod
    def metrics(
        loss: Tensor, losses: Tensor, c: Tensor, parts: dict[str, Tensor], seen: dict[str, int]
    ) -> dict[str, Tensor]:
        """Means over this rank's batch: the loss and, for every teacher, its loss before dropping over the images that
        it has `seen`, its share of the kept pairs (`share`), the images that it was kept on as a share of all (`kept`),
        and its parts. A teacher that has seen none has losses of 0."""
        metrics = {"loss": loss.detach()}
        sums, shares, kept = losses.detach().sum(1), c.sum(1) / c.sum().clamp_min(1.0), c.mean(1)
        for i, (name, images) in enumerate(seen.items()):
            metrics[f"loss/{name}"] = sums[i] / max(images, 1)
            metrics[f"share/{name}"] = shares[i]
            metrics[f"kept/{name}"] = kept[i]
        metrics.update({f"loss/{key}": value.sum() / max(len(value), 1) for key, value in parts.items()})
        return metrics
