"""The images behind the samples, wherever they are, as DALI gets them; and smaller copies of large photographs.

Two CPU cores decode and resize 54 photographs of 1920 x 2880 pixels a second, and 250 of their copies with a shorter
side of 512 pixels (`DatasetConfig.shrink`). The pixels change a little: on the demo's photographs a crop of three
quarters of each side differs by 0.4 levels on average at 112 pixels and by 0.7 at 224.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dune_fast.dali_pipelines.datasets import DataConfig, Dataset
from dune_fast.dali_pipelines.errors import BrokenImage
from dune_fast.dali_pipelines.images import decode, encode, for_dali, is_from_pillow, plain_jpeg, shrink
from dune_fast.dali_pipelines.listing import is_turned
from dune_fast.dali_pipelines.quarantine import Quarantine
from dune_fast.dali_pipelines.storage import Location, Reader, write_whole
from dune_fast.teachers.files import cache_dir

logger = logging.getLogger(__name__)

Image = tuple[int, int]
"""(dataset, index in it)."""


class Encoded(NamedTuple):
    """An image that was read."""

    data: np.ndarray
    """As DALI gets it (see `images.for_dali`), uint8 [length]."""
    size: tuple[int, int]
    """Its (width, height)."""
    checksum: int
    """With `data.views`: CRC-32 of its bytes as they were read; where a smaller copy is read in its place, the bytes
    that the image itself has. Else 0."""


class ImageSource:
    """Reads the images of one split ("train" or "val") of all datasets, with threads of its own.

    `folder`, of the run, and `rank` are for the record of broken images; without a folder it is kept in memory.
    """

    def __init__(
        self, datasets: Sequence[Dataset], split: str, config: DataConfig, folder: Path | None = None, rank: int = 0
    ) -> None:
        self.datasets = datasets
        self._images = [getattr(dataset, split) for dataset in datasets]
        self._reader = Reader(config.read_patience, threads=config.read_threads)
        self.quarantine = Quarantine([dataset.name for dataset in datasets], self._images, config, folder, rank)
        self._by_pillow: set[Image] = set()  # JPEGs that DALI has refused
        self._checked = bool(config.views)
        self._pool = ThreadPoolExecutor(config.num_threads, thread_name_prefix="prepare-images")

    def sizes(self) -> np.ndarray:
        """int64 [datasets]: how many images each has."""
        return np.array([len(images) for images in self._images])

    def path(self, dataset: int, index: int) -> str:
        """The path of an image, or its name in a shard."""
        return self._images[dataset][index]

    def turned(self, images: Sequence[Image]) -> np.ndarray:
        """bool [B]: which are stored turned, see `DatasetConfig.rotate`."""
        patterns = [dataset.config.rotate for dataset in self.datasets]
        return np.array([is_turned(self._images[d], i, patterns[d]) for d, i in images], dtype=bool)

    def read_all(self, images: Sequence[Image]) -> list[Encoded | BrokenImage]:
        """Several images at once; why one is broken stands in its place: gone, empty, cut off, other bytes, no pixels.

        Threads that wait for the storage are others than those that work on the bytes. StorageError if the storage does
        not answer. Thread-safe.
        """
        reading = [None if self._shorter_side(d) else self._reader.start(self._images[d].locate(i)) for d, i in images]
        working: list[Future[Encoded | BrokenImage] | BrokenImage] = []
        for image, read in zip(images, reading, strict=True):
            try:
                data = None if read is None else read.result()
                working.append(self._pool.submit(self._prepare, image, data))
            except BrokenImage as error:
                working.append(error)
        return [work.result() if isinstance(work, Future) else work for work in working]

    def read_good(self, images: Sequence[Image]) -> list[Encoded | None]:
        """Several at once; None stands for a broken image, which is then on record."""
        good = [image for image in images if image not in self.quarantine]
        found = dict(zip(good, self.read_all(good), strict=True))
        for image, result in found.items():
            if isinstance(result, BrokenImage):
                self.quarantine.add(*image, str(result), result.lasting)
        return [None if image in self.quarantine else found[image] for image in images]

    def refused(self, image: Image, encoded: np.ndarray, reason: str) -> BrokenImage | None:
        """Takes note that DALI cannot decode what was read: Pillow decodes the image from now on.

        Returns:
            Why the image is broken, if Pillow cannot decode it either, or has done so already.
        """
        if is_from_pillow(encoded):
            return BrokenImage(f"DALI cannot take over its pixels: {reason}")
        self._by_pillow.add(image)
        (result,) = self.read_all([image])
        return result if isinstance(result, BrokenImage) else None

    def stop_waiting(self) -> None:
        """From now on, a read that fails is not tried again."""
        self._reader.stop_waiting()

    def close(self, wait: bool = True) -> None:
        """Ends the threads; waits until they have ended, unless a read of theirs may never return."""
        self._pool.shutdown(wait=wait, cancel_futures=True)
        self._reader.close()

    def _shorter_side(self, dataset: int) -> int:
        """Of the smaller copies that are read, or made, in place of the images; 0 where there are none."""
        return self.datasets[dataset].config.shrink

    def _prepare(self, image: Image, data: np.ndarray | None) -> Encoded | BrokenImage:
        """An image from its bytes, uint8 [length]; from its smaller copy where they are None."""
        dataset, index = image
        try:
            checksum = 0
            if data is None:
                path, cache = self._images[dataset][index], cache_dir() / "shrunk"
                data, checksum = shrunk_bytes(path, self._shorter_side(dataset), cache, self._reader)
            elif self._checked:
                checksum = zlib.crc32(data)
            return Encoded(*for_dali(data, image in self._by_pillow), checksum)
        except BrokenImage as error:
            return error


def shrunk_bytes(path: str, shorter_side: int, cache: Path, reader: Reader) -> tuple[np.ndarray, int]:
    """The encoded bytes, uint8 [length], of an image with at most `shorter_side` pixels on its shorter side, and the
    length of its own file.

    Images that are not larger are returned as they are in the file. A copy's name is made of the original's path, size
    and time of change: an image that changes is shrunk again, and several processes may work at once. Raises what
    `Reader.read` and `images.decode` raise.
    """
    try:
        status = reader.patiently(lambda: os.stat(path), path)
    except OSError as error:
        raise BrokenImage(error.strerror or str(error), lasting=False) from error
    key = f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}\0{shorter_side}"
    copy = cache / f"{hashlib.blake2b(os.fsencode(key), digest_size=16).hexdigest()}.jpg"
    if os.access(copy, os.R_OK):  # another user's copy may be there and yet be closed to this one
        return reader.read(Location(str(copy))), status.st_size
    data = reader.read(Location(path))
    size = plain_jpeg(data.tobytes())
    if size and min(size) <= shorter_side:
        return data, status.st_size
    image = decode(data)
    if min(image.size) <= shorter_side:
        return data, status.st_size
    encoded = encode(shrink(image, shorter_side))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_whole(copy, encoded)
    except OSError as error:  # the image is good all the same
        _warn_once(str(cache), str(error))
    return np.frombuffer(encoded, np.uint8), status.st_size


@functools.cache
def _warn_once(cache: str, reason: str) -> None:
    logger.warning("cannot keep shrunk images in %s (%s): each is shrunk again whenever it is used", cache, reason)
