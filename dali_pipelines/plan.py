"""Which images a step holds and what is done to them: step -> `Plan`, for training and for validation.

A plan is a pure function of (seed, global batch size, step), and of which images are broken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dune_fast.dali_pipelines.augmentation import (
    Geometry,
    colour_params,
    draw_words,
    train_geometry,
    validation_geometry,
)
from dune_fast.dali_pipelines.datasets import DataConfig
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.order import SampleOrder
from dune_fast.dali_pipelines.source import Encoded, Image, ImageSource
from dune_fast.dali_pipelines.teacher_views import CropPlan, OwnCrop, own_crops
from dune_fast.kernels import philox
from dune_fast.kernels.augment import ColourParams


@dataclass(frozen=True)
class Plan:
    """What one batch consists of, before decoding; all on the host; B images."""

    step: int
    images: list[Image]
    positions: np.ndarray
    """int64 [B], global."""
    group: np.ndarray
    """int64 [B]."""
    encoded: list[np.ndarray]
    """What DALI gets, uint8 [length] each, see `images.for_dali`."""
    geometry: Geometry
    colour: ColourParams | None
    views: np.ndarray | None = None
    """int64 [B]: number of each image's view, with `data.views`, see `Views`."""
    checksums: np.ndarray | None = None
    """int64 [B]: `source.Encoded.checksum` of each image, with `data.views`."""
    crops: Sequence[CropPlan] = ()
    """The teachers' own, with `data.teacher_views`."""
    part: int = 0
    """Which of the parts of the step that this rank works on one after the other."""
    parts: int = 1

    @property
    def number(self) -> int:
        """Among all plans."""
        return self.step * self.parts + self.part

    @property
    def geometries(self) -> list[Geometry]:
        """Of all that is decoded of the images: the student's, then that of each crop that is wanted."""
        return [self.geometry, *(crop.geometry for crop in self.crops if crop.wanted)]


def _checksums(read: Sequence[Encoded]) -> np.ndarray:
    return np.array([image.checksum for image in read], np.int64)


class Part(NamedTuple):
    """What one rank takes of a step: some slots of the global batch, at one size."""

    slots: slice
    sizes: Callable[[int], int] | None = None
    """Step -> side of the images in pixels; None for that of the run's step."""
    zoom: Sequence[float] = ()
    """In place of `data.teacher_zoom`; empty for that."""


class Groups:
    """The groups of a source's datasets, and which dataset is in which."""

    def __init__(self, source: ImageSource) -> None:
        of_datasets = [dataset.config.group for dataset in source.datasets]
        self.names = sorted(set(of_datasets))
        self.of = np.array([self.names.index(group) for group in of_datasets])  # int64 [datasets]


def colour_of(words: torch.Tensor, config: DataConfig) -> ColourParams | None:
    """Colours by random words, int64 [B, 36]; None where the configuration wants none."""
    return colour_params(words, config) if config.colour else None


class Views:
    """Numbers the fixed views of a source's images: V times the image's number among all, plus which of its V views.

    The augmentation of a view follows from (seed, number) alone.
    """

    def __init__(self, source: ImageSource, per_image: int, seed: int) -> None:
        self.per_image = per_image
        self._ends, self._seed = source.sizes().cumsum(), seed

    def number(self, images: Sequence[Image], passes: np.ndarray) -> np.ndarray:
        """int64 [B] of B images in these passes over their groups, int64 [B]."""
        dataset, index = np.array(images, np.int64).reshape(-1, 2).T
        before = np.concatenate([[0], self._ends])[dataset]
        return (before + index) * self.per_image + passes % self.per_image

    def images(self, numbers: np.ndarray) -> list[Image]:
        """The images that views, int64 [B], belong to."""
        image = numbers // self.per_image
        dataset = np.searchsorted(self._ends, image, side="right")
        return list(zip(dataset.tolist(), (image - np.concatenate([[0], self._ends])[dataset]).tolist(), strict=True))

    def words(self, numbers: np.ndarray) -> torch.Tensor:
        """The random words of views, int64 [B, 36]."""
        return draw_words(self._seed, numbers, philox.VIEW)


class ViewPlans:
    """Plans of given views, a batch a step: what teachers see when their features are cached.

    Args:
        batches: numbers of views, int64 [B] each.
    """

    def __init__(
        self, source: ImageSource, config: DataConfig, image_size: int, seed: int, batches: Sequence[np.ndarray]
    ) -> None:
        self.groups, self.views = Groups(source), Views(source, config.views, seed)
        self._source, self._config, self._image_size, self._batches = source, config, image_size, batches

    def __call__(self, step: int) -> Plan | None:
        if step >= len(self._batches):
            return None
        numbers = self._batches[step]
        images = self.views.images(numbers)
        read = self._source.read_good(images)
        kept = [i for i, result in enumerate(read) if result is not None]
        images, numbers, found = [images[i] for i in kept], numbers[kept], [read[i] for i in kept]
        sizes = np.array([image.size for image in found], np.int64).reshape(-1, 2)
        words = self.views.words(numbers)
        geometry = train_geometry(words, sizes, self._source.turned(images), self._image_size, self._config)
        colour = None if self._config.fresh_colour else colour_of(words, self._config)
        group = self.groups.of[[dataset for dataset, _ in images]]
        data, checksums = [image.data for image in found], _checksums(found)
        return Plan(step, images, numbers, group, data, geometry, colour, numbers, checksums)


class TrainPlans:
    """Plans of training, without end: a step has as many as this rank has parts. `sizes`: step -> side of its images.

    Other arguments: see `loader.TrainLoader`.

    Raises:
        DataError: weights that do not fit the groups, or a batch below 1.
    """

    def __init__(
        self, source: ImageSource, config: DataConfig, sizes: Callable[[int], int], global_batch: int,
        parts: Sequence[Part], seed: int, crops: Sequence[OwnCrop] = (), patch: int = 1,
        wanted: Callable[[int, int], Collection[str] | None] | None = None,
    ) -> None:  # fmt: skip
        self.groups = Groups(source)
        self._source, self._config, self._side = source, config, sizes
        self._parts, self._seed = parts, seed
        self._configs = [
            dataclasses.replace(config, teacher_zoom=list(part.zoom)) if part.zoom else config for part in parts
        ]
        self._crops, self._patch, self._wanted = (crops if config.teacher_views else ()), patch, wanted
        self.views = Views(source, config.views, seed) if config.views else None
        self._sizes = source.sizes()
        # a group's images are those of its datasets, one after the other, `repeat` times each
        self._members = [np.flatnonzero(self.groups.of == g) for g in range(len(self.groups.names))]
        seen = self._sizes * np.array([dataset.config.repeat for dataset in source.datasets])
        self._ends = [seen[members].cumsum() for members in self._members]
        weights = group_weights(config, self.groups.names)
        self.order = SampleOrder([int(ends[-1]) for ends in self._ends], weights, seed, global_batch)

    def __call__(self, number: int) -> Plan:
        step, part = divmod(number, len(self._parts))
        group, draw, images = self.choose(step, part)
        own, config = self._parts[part], self._configs[part]
        positions = step * self.order.batch + np.arange(self.order.batch)[own.slots]
        read = self._source.read_good(images)
        for i in (i for i, result in enumerate(read) if result is None):
            images[i], read[i] = self._replacement(group[i : i + 1], draw[i : i + 1])
        sizes, turned = np.array([image.size for image in read]), self._source.turned(images)
        words, views = draw_words(self._seed, positions), None
        at, of = words, words  # crops and colours are drawn from
        if self.views is not None:
            views = self.views.number(images, draw // self.order.group_sizes[group])
            at = self.views.words(views)
            of = words if config.fresh_colour else at
        geometry = train_geometry(at, sizes, turned, (own.sizes or self._side)(step), config)
        crops = own_crops(
            self._crops, self._seed, positions, at, sizes, turned, geometry, self._patch, config,
            None if self._wanted is None else self._wanted(step, part),
        ) if self._crops else ()  # fmt: skip
        colour = colour_of(of, config)
        data, checksums = [image.data for image in read], None if views is None else _checksums(read)
        return Plan(
            step, images, positions, group, data, geometry, colour, views, checksums, crops, part, len(self._parts)
        )

    def choose(self, step: int, part: int = 0) -> tuple[np.ndarray, np.ndarray, list[Image]]:
        """What this rank's part of a step consists of, before any file is read and any broken image replaced.

        Returns:
            The group and the draw (`SampleOrder.step`) of each image, int64 [B], and the B images themselves.
        """
        group, draw = (values[self._parts[part].slots] for values in self.order.step(step))
        return group, draw, self._resolve(group, self.order.image(group, draw))

    def _resolve(self, group: np.ndarray, index: np.ndarray) -> list[Image]:
        """Images from (group, index in it), int64 [B] each."""
        dataset, within = np.empty_like(index), np.empty_like(index)
        for g in np.unique(group).tolist():
            chosen = group == g
            member = np.searchsorted(self._ends[g], index[chosen], side="right")
            dataset[chosen] = self._members[g][member]
            within[chosen] = index[chosen] - np.concatenate([[0], self._ends[g]])[member]
        within %= self._sizes[dataset]  # repeats
        return list(zip(dataset.tolist(), within.tolist(), strict=True))

    def _replacement(self, group: np.ndarray, draw: np.ndarray) -> tuple[Image, Encoded]:
        """The next good image in the order of the group's pass, in place of a broken one."""
        for skip in range(1, int(self.order.group_sizes[group[0]])):
            image = self._resolve(group, self.order.image(group, draw, skip))[0]
            if (read := self._source.read_good([image])[0]) is not None:
                return image, read
        raise DataError(f"no usable image is left in group {self.groups.names[group[0]]!r}")


class ValPlans:
    """Plans of one pass over the validation images, without broken ones. Arguments: see `loader.ValLoader`."""

    def __init__(self, source: ImageSource, image_size: int, batch: int, rank: int, world_size: int) -> None:
        self.groups = Groups(source)
        self._source, self._image_size, self._batch = source, image_size, batch
        self._ends = source.sizes().cumsum()
        self._positions = np.arange(rank, self._ends[-1], world_size)

    def __len__(self) -> int:
        return -(-len(self._positions) // self._batch)

    def __call__(self, step: int) -> Plan | None:
        if step >= len(self):
            return None
        positions = self._positions[step * self._batch : (step + 1) * self._batch]
        dataset = np.searchsorted(self._ends, positions, side="right")
        index = positions - np.concatenate([[0], self._ends])[dataset]
        images = list(zip(dataset.tolist(), index.tolist(), strict=True))
        read = self._source.read_good(images)
        kept = [i for i, result in enumerate(read) if result is not None]
        images, encoded = [images[i] for i in kept], [read[i].data for i in kept]
        sizes = np.array([read[i].size for i in kept], np.int64).reshape(-1, 2)
        geometry = validation_geometry(sizes, self._source.turned(images), self._image_size)
        return Plan(step, images, positions[kept], self.groups.of[dataset[kept]], encoded, geometry, None)


def group_weights(config: DataConfig, groups: Sequence[str]) -> list[float]:
    """The weight of each group, equal ones where none are given. DataError if they are those of other groups."""
    if not config.group_weights:
        return [1.0] * len(groups)
    if set(config.group_weights) != set(groups):
        raise DataError(
            f"data.group_weights names the groups {sorted(config.group_weights)}, the datasets have {sorted(groups)}; "
            "give every group a weight (0 leaves it out), or leave the weights empty for equal shares"
        )
    return [float(config.group_weights[group]) for group in groups]
