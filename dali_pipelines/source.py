"""The encoded bytes behind the samples, wherever they are, and the sizes in their headers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from dali_pipelines.datasets import DataConfig, Dataset
from dali_pipelines.errors import BrokenImage, StorageError
from dali_pipelines.listing import is_turned
from dali_pipelines.quarantine import Quarantine
from dali_pipelines.storage import Reader

PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, Image.DecompressionBombError)
"""What PIL raises for broken files."""


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
        # width and height from headers, 0 until one was read, and for ever where the index knows them; zeros cost no
        # memory before they are written
        self._sizes = [np.zeros((len(images), 2), np.int32) for images in self._images]

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
        """The encoded bytes, uint8 [length], and (width, height). Safe to call from several threads.

        Raises:
            BrokenImage: the file is gone, empty, cut off, of no known format, or not what its checksum says.
            StorageError: the storage does not answer.
        """
        images, shrink = self._images[dataset], self._configs[dataset].shrink
        try:
            if shrink:
                from dali_pipelines.shrink import shrunk_bytes
                from teachers.assets import cache_dir

                data = shrunk_bytes(images[index], shrink, cache_dir() / "shrunk", self._reader)
            else:
                data = self._reader.read(images.locate(index))
            size = images.size(index)
            if not size[0]:
                size = self._sizes[dataset][index]
                if not size[0]:
                    size[:] = read_size(data)
        except StorageError:
            raise
        except PIL_ERRORS as error:
            unread = isinstance(error, OSError) and error.errno is not None  # PIL's own have no number
            raise BrokenImage(str(error) or type(error).__name__, lasting=not unread) from error
        return data, (int(size[0]), int(size[1]))


def read_size(data: np.ndarray | bytes) -> tuple[int, int]:
    """(width, height) from the header of an encoded image, uint8 [length], as it is stored (no EXIF orientation).

    Raises:
        BrokenImage: no known format, or a JPEG without its end (for DALI that may depend on the crop).
        One of PIL_ERRORS: from PIL.
    """
    data = bytes(data)
    try:
        with Image.open(stream := io.BytesIO(data)) as image:
            size, kind, pixels = image.size, image.format, stream.tell()
    except UnidentifiedImageError:
        raise BrokenImage("no known image format") from None
    # where the pixels begin: a thumbnail before them has an end of its own
    if kind in ("JPEG", "MPO") and data.find(b"\xff\xd9", pixels) < 0:
        raise BrokenImage("the JPEG ends too early")
    return size
