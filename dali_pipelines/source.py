"""The images behind the samples, wherever they are, as DALI gets them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dune_fast.dali_pipelines.datasets import DataConfig, Dataset
from dune_fast.dali_pipelines.errors import BrokenImage
from dune_fast.dali_pipelines.images import for_dali, is_from_pillow
from dune_fast.dali_pipelines.listing import is_turned
from dune_fast.dali_pipelines.quarantine import Quarantine
from dune_fast.dali_pipelines.shrink import shrunk_bytes
from dune_fast.dali_pipelines.storage import Reader
from dune_fast.teachers.files import cache_dir


class ImageSource:
    """Reads the images of one split of all datasets.

    Args:
        datasets: from `index_datasets`.
        split: "train" or "val".
        config: for the limits on broken images, and for how long to wait for the storage.
        folder: of the run, for the record of broken images; None keeps it in memory.
        rank: of this process.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        split: str,
        config: DataConfig,
        folder: Path | None = None,
        rank: int = 0,
    ) -> None:
        self._configs = [dataset.config for dataset in datasets]
        self._images = [getattr(dataset, split) for dataset in datasets]
        self._reader = Reader(config.read_patience)
        self.quarantine = Quarantine([dataset.name for dataset in datasets], self._images, config, folder, rank)
        self._by_pillow: set[tuple[int, int]] = set()  # JPEGs that DALI has refused

    def stop_waiting(self) -> None:
        """From now on, a read that fails is not tried again."""
        self._reader.stop_waiting()

    def path(self, dataset: int, index: int) -> str:
        """The path of an image, or its name in a shard."""
        return self._images[dataset][index]

    def is_turned(self, dataset: int, index: int) -> bool:
        """Whether an image is stored turned (see DatasetConfig.rotate)."""
        return is_turned(self._images[dataset], index, self._configs[dataset].rotate)

    def read(self, dataset: int, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """An image as DALI gets it (see `for_dali`), uint8 [length], and (width, height). Safe to call from several
        threads.

        Raises:
            BrokenImage: the file is gone, empty, cut off, not what its checksum says, or Pillow cannot decode it.
            StorageError: the storage does not answer.
        """
        images, shrink = self._images[dataset], self._configs[dataset].shrink
        if shrink:
            data = shrunk_bytes(images[index], shrink, cache_dir() / "shrunk", self._reader)
        else:
            data = self._reader.read(images.locate(index))
        return for_dali(data, (dataset, index) in self._by_pillow)

    def refused(self, dataset: int, index: int, encoded: np.ndarray, reason: str) -> None:
        """Takes note that DALI cannot decode what `read` has given: Pillow decodes the image from now on.

        Raises:
            BrokenImage: Pillow cannot decode it either, or had decoded it already.
        """
        if is_from_pillow(encoded):
            raise BrokenImage(f"DALI cannot take over its pixels: {reason}")
        self._by_pillow.add((dataset, index))
        self.read(dataset, index)
