"""The files behind the samples: reading them, their sizes, and the record of those that are broken."""

from __future__ import annotations

import fnmatch
import io
import logging
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from dali_pipelines.datasets import DataConfig, DataError, Dataset

logger = logging.getLogger(__name__)

_PIL_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # for broken files


class BrokenImage(Exception):
    """A file that is no usable image; the text says why."""


class Quarantine:
    """Which images are broken. Counts them per dataset and stops the run when they are too many; one per process.

    Args:
        names: of the datasets.
        sizes: images of each dataset.
        config: the limits.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], config: DataConfig) -> None:
        self._names, self._sizes, self._config = names, sizes, config
        self._broken: dict[tuple[int, int], str] = {}

    def __contains__(self, image: tuple[int, int]) -> bool:
        return image in self._broken

    def add(self, dataset: int, index: int, path: str, reason: str) -> None:
        """Records an image and names it in the log, once.

        Raises:
            DataError: the dataset has more broken images than the configuration allows.
        """
        if (dataset, index) in self._broken:
            return
        self._broken[dataset, index] = path
        name, size = self._names[dataset], self._sizes[dataset]
        count = self.counts()[name]
        logger.warning("dataset %s: broken image %s skipped (%s); %d of %d so far", name, path, reason, count, size)
        allowed = max(int(self._config.max_broken_share * size), min(self._config.max_broken_spared, size // 2))
        if count > allowed:
            raise DataError(
                f"dataset {name!r}: {count} of {size} images are broken, {allowed} are tolerated; "
                f"the last one is {path} ({reason}). "
                "Repair or remove them (the log names each), or raise data.max_broken_share"
            )

    def counts(self) -> dict[str, int]:
        """Broken images so far, by dataset."""
        totals = dict.fromkeys(self._names, 0)
        for dataset, _ in list(self._broken):  # a copy: the loader's thread may add one meanwhile
            totals[self._names[dataset]] += 1
        return totals

    def paths(self) -> list[str]:
        """Broken files so far, in the order in which they were met."""
        return list(self._broken.values())


class ImageSource:
    """Reads the images of one split of all datasets.

    Args:
        datasets: from `index_datasets`.
        split: "train" or "val".
        config: for the limits on broken images.
    """

    def __init__(self, datasets: Sequence[Dataset], split: str, config: DataConfig) -> None:
        self._configs = [dataset.config for dataset in datasets]
        self._roots = [dataset.root if split == "train" else dataset.val_root for dataset in datasets]
        self._paths = [getattr(dataset, split) for dataset in datasets]
        sizes = [len(paths) for paths in self._paths]
        self.quarantine = Quarantine([dataset.name for dataset in datasets], sizes, config)
        # width and height, 0 until the header was read; zeros cost no memory before they are written
        self._sizes = [np.zeros((size, 2), np.int32) for size in sizes]

    def path(self, dataset: int, index: int) -> str:
        """The path of an image."""
        return self._paths[dataset][index]

    def is_turned(self, dataset: int, index: int) -> bool:
        """Whether an image is stored turned (see DatasetConfig.rotate)."""
        pattern, root = self._configs[dataset].rotate, self._roots[dataset]
        return bool(pattern) and fnmatch.fnmatchcase(self.path(dataset, index).removeprefix(root), pattern)

    def read(self, dataset: int, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """The encoded bytes, uint8 [length], and (width, height). Safe to call from several threads.

        Raises:
            BrokenImage: the file is gone, empty, cut off or of no known format.
        """
        path, shrink = self.path(dataset, index), self._configs[dataset].shrink
        try:
            if shrink:
                from dali_pipelines.shrink import shrunk_bytes
                from teachers.assets import cache_dir

                data = np.frombuffer(shrunk_bytes(path, shrink, cache_dir() / "shrunk"), np.uint8)
            else:
                data = np.fromfile(path, np.uint8)
            if not len(data):
                raise BrokenImage("the file is empty")
            size = self._sizes[dataset][index]
            if not size[0]:
                size[:] = read_size(data)
        except _PIL_ERRORS as error:
            raise BrokenImage(str(error) or type(error).__name__) from error
        return data, (int(size[0]), int(size[1]))


def read_size(data: np.ndarray) -> tuple[int, int]:
    """(width, height) from the header of an encoded image, uint8 [length], as it is stored (no EXIF orientation).

    Raises:
        BrokenImage: no known format, or a JPEG without its end (for DALI that may depend on the crop).
        OSError, SyntaxError, ValueError, DecompressionBombError: from PIL.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            size, kind = image.size, image.format
    except UnidentifiedImageError:
        raise BrokenImage("no known image format") from None
    if kind == "JPEG" and data.tobytes().rfind(b"\xff\xd9") < 0:
        raise BrokenImage("the JPEG ends too early")
    return size
