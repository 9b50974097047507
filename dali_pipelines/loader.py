"""Batches for training and for validation: which images a step holds and what is done to them.

Everything up to the pixels is a pure function of (seed, global batch size, step); how a batch gets decoded and to the
device is `stream`'s part.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from dune_fast.dali_pipelines.augmentation import colour_params, draw_words, train_geometry, validation_geometry
from dune_fast.dali_pipelines.datasets import DataConfig, DataError, Dataset, index_datasets
from dune_fast.dali_pipelines.order import SampleOrder, rank_slots
from dune_fast.dali_pipelines.source import ImageSource
from dune_fast.dali_pipelines.stream import Batch, ImageLoader, Plan

logger = logging.getLogger(__name__)

__all__ = ["Batch", "TrainLoader", "ValLoader", "group_weights"]


class TrainLoader(ImageLoader):
    """Endless training batches.

    Args:
        config: datasets, shares and augmentation.
        image_size: side of the images in pixels.
        global_batch: images of a step over all ranks.
        rank, world_size: this process's part.
        seed: of order and augmentation.
        device: where the batches are wanted.
        datasets: from `index_datasets(config)`, to index them once for several loaders.
        folder: of the run, for the record of broken images (`quarantine`); None keeps it in memory.

    Raises:
        DataError: wrong configuration, no images, a batch that the ranks cannot share, or no DALI.
    """

    def __init__(
        self,
        config: DataConfig,
        image_size: int,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        device: torch.device,
        datasets: Sequence[Dataset] | None = None,
        folder: Path | None = None,
    ) -> None:
        datasets = index_datasets(config) if datasets is None else datasets
        for dataset in datasets:
            if contents := dataset.contents():
                logger.info("dataset %s: %s", dataset.name, contents)
        self._slots = rank_slots(global_batch, rank, world_size)
        source = ImageSource(datasets, "train", config, folder, rank)
        super().__init__(config, image_size, global_batch // world_size, device, datasets, source)
        self.seed = seed
        # a group's images are those of its datasets, one after the other, `repeat` times each
        self._members = [np.flatnonzero(self._group_of == g) for g in range(len(self.groups))]
        self._sizes = np.array([len(dataset.train) for dataset in datasets])
        seen = self._sizes * np.array([dataset.config.repeat for dataset in datasets])
        self._ends = [seen[members].cumsum() for members in self._members]
        weights = group_weights(config, self.groups)
        self.order = SampleOrder([int(ends[-1]) for ends in self._ends], weights, seed, global_batch)
        self.num_images = int(self._sizes.sum())
        """Images in all datasets, those held out not counted."""

    @property
    def steps_per_pass(self) -> float:
        """Steps in which as many images are drawn as there are (repeats counted)."""
        return self.order.steps_per_pass()

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches from any step on, without end.

        They are read and decoded ahead while the caller works; `waited_s` says how long it has waited all the same.

        Raises:
            DataError: too many broken images, or a failure of DALI that no image explains.
            StorageError (a DataError): the storage does not answer.
        """
        return self._iterate(start_step)

    def choose(self, step: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """What this rank's part of a step consists of, before any file is read; B images.

        Returns:
            The group and the draw (`SampleOrder.step`) of each, int64 [B], and (dataset, index in it) of each. Images
            that turn out broken are replaced later.
        """
        group, draw = (values[self._slots] for values in self.order.step(step))
        return group, draw, self._resolve(group, self.order.image(group, draw))

    def _plan(self, step: int) -> Plan:
        group, draw, images = self.choose(step)
        positions = step * self.order.batch + np.arange(self.order.batch)[self._slots]
        read = self._read_good(images)
        for i in (i for i, result in enumerate(read) if result is None):
            images[i], read[i] = self._replacement(group[i : i + 1], draw[i : i + 1])
        sizes, turned = np.array([size for _, size in read]), self._turned(images)
        words = draw_words(self.seed, positions)
        geometry = train_geometry(words, sizes, turned, self.image_size, self.config)
        colour = colour_params(words, self.config) if self.config.colour else None
        return Plan(step, images, positions, group, [data for data, _ in read], geometry, colour)

    def _resolve(self, group: np.ndarray, index: np.ndarray) -> list[tuple[int, int]]:
        """(dataset, index in it) from (group, index in it)."""
        dataset, within = np.empty_like(index), np.empty_like(index)
        for g in np.unique(group).tolist():
            chosen = group == g
            member = np.searchsorted(self._ends[g], index[chosen], side="right")
            dataset[chosen] = self._members[g][member]
            within[chosen] = index[chosen] - np.concatenate([[0], self._ends[g]])[member]
        within %= self._sizes[dataset]  # repeats
        return list(zip(dataset.tolist(), within.tolist(), strict=True))

    def _replacement(
        self, group: np.ndarray, draw: np.ndarray
    ) -> tuple[tuple[int, int], tuple[np.ndarray, tuple[int, int]]]:
        """The next good image in the order of the group's pass, in place of a broken one."""
        for skip in range(1, int(self.order.group_sizes[group[0]])):
            image = self._resolve(group, self.order.image(group, draw, skip))[0]
            if (read := self._read_good([image])[0]) is not None:
                return image, read
        raise DataError(f"no usable image is left in group {self.groups[group[0]]!r}")


class ValLoader(ImageLoader):
    """The held-out images, each exactly once over all ranks: rank r of w has images r, r + w, r + 2 w, ...

    Every `iter` starts from the first. The last batch may be smaller, ranks may differ by one image (and so by one
    batch), and broken images are left out. Without validation images `num_images` is 0 and there is nothing to iterate
    over.

    Args:
        config, image_size, device, datasets: see `TrainLoader`.
        batch: images of a batch, on this rank.
        rank, world_size: this process's part.

    Raises:
        DataError: wrong configuration, no training images, or no DALI.
    """

    def __init__(
        self,
        config: DataConfig,
        image_size: int,
        batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
        datasets: Sequence[Dataset] | None = None,
    ) -> None:
        datasets = index_datasets(config) if datasets is None else datasets
        if batch < 1:
            raise DataError(f"the validation batch is {batch}: at least 1 is needed")
        source = ImageSource(datasets, "val", config)
        super().__init__(config, image_size, batch, device, datasets, source)
        self._ends = np.cumsum([len(dataset.val) for dataset in datasets])
        self.num_images = int(self._ends[-1])
        """Validation images over all ranks, broken ones included."""
        self._positions = np.arange(rank, self.num_images, world_size)

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self._positions) // self._batch)

    def __iter__(self) -> Iterator[Batch]:
        return self._iterate(0)

    def _plan(self, step: int) -> Plan | None:
        if step >= len(self):
            return None
        positions = self._positions[step * self._batch : (step + 1) * self._batch]
        dataset = np.searchsorted(self._ends, positions, side="right")
        index = positions - np.concatenate([[0], self._ends])[dataset]
        images = list(zip(dataset.tolist(), index.tolist(), strict=True))
        read = self._read_good(images)
        kept = [i for i, result in enumerate(read) if result is not None]
        images = [images[i] for i in kept]
        sizes = np.array([read[i][1] for i in kept], np.int64).reshape(-1, 2)
        geometry = validation_geometry(sizes, self._turned(images), self.image_size)
        return Plan(
            step, images, positions[kept], self._group_of[dataset[kept]], [read[i][0] for i in kept], geometry, None
        )


def group_weights(config: DataConfig, groups: Sequence[str]) -> list[float]:
    """The weight of each group, equal ones where none are given.

    Raises:
        DataError: weights are given, but not for exactly the groups there are.
    """
    if not config.group_weights:
        return [1.0] * len(groups)
    if set(config.group_weights) != set(groups):
        raise DataError(
            f"data.group_weights names the groups {sorted(config.group_weights)}, the datasets have {sorted(groups)}; "
            "give every group a weight (0 leaves it out), or leave the weights empty for equal shares"
        )
    return [float(config.group_weights[group]) for group in groups]
