"""One shard: images read, decoded once, encoded where they must be, and written as a tar file with its records.

A JPEG that DALI decodes keeps its bytes, everything else becomes a JPEG. The same job gives the same bytes: no time, no
user, no machine is in them. A shard appears under its name only when it is whole and on the disk; the record of what it
holds comes after it and marks it as finished.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import tarfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from dune_fast.dali_pipelines.errors import BrokenImage, DataError, StorageError
from dune_fast.dali_pipelines.images import decode, encode, plain_jpeg, shrink
from dune_fast.dali_pipelines.patience import Pending
from dune_fast.dali_pipelines.pipeline import Decoder, whole_images
from dune_fast.dali_pipelines.storage import Location, Reader, sync_folder, write_whole
from dune_fast.dali_pipelines.tar_index import RECORD, open_index, write_index

RECORDS = "records"  # the folder of what marks shards as finished
_MOST_VANISHED = 10  # files of a shard, or half of them: with more missing, something else is wrong
_BATCH = 16  # images that DALI decodes at a time
_SIZE = 64  # pixels; the whole image is decoded, only the resize is cheap


@dataclass(frozen=True)
class ShardSettings:
    """How shards are made. Raises DataError for values that make no sense."""

    megabytes: float = 500
    """Size of a shard, about: the number of images in it comes from the size of the first 256."""
    shorter_side: int = 0
    """Larger images are shrunk to this shorter side in pixels; 0 keeps their size."""
    seed: int = 0
    """Of the order of the images, which are shuffled over all shards of a split."""
    turned_canvas: str = "enlarge"
    """What happens to images that are stored turned: "enlarge" turns the canvas with the image; "keep" keeps the
    canvas, cuts off what lies outside and leaves black bars, as in the code published with DUNE."""

    def __post_init__(self) -> None:
        if not self.megabytes > 0 or self.shorter_side < 0:
            raise DataError(
                f"shards of {self.megabytes} MB with a shorter side of {self.shorter_side} pixels cannot be made: "
                "the first must be above 0, the second at least 0"
            )
        if self.turned_canvas not in ("enlarge", "keep"):
            raise DataError(f"the turned canvas is {self.turned_canvas!r}: allowed are 'enlarge' and 'keep'")


@dataclass(frozen=True)
class Item:
    """One image of a job."""

    key: int
    """Its place in the shuffled order of its split; the members are called after it."""
    location: Location
    path: str
    """What it was called below its root."""
    turned: bool


@dataclass(frozen=True)
class Job:
    """One shard to be written, FOLDER/NAME.tar."""

    folder: Path
    name: str
    dataset: str
    settings: ShardSettings
    items: Sequence[Item]


@dataclass(frozen=True)
class ShardRecord:
    """What a finished shard holds, besides its index."""

    bytes: int
    images: int
    sha256: str
    broken: list[dict]
    """dataset, path, reason and lasting (see `BrokenImage`) of each."""


class Stopped(Exception):
    """The work was called off; nothing of the shard is left."""


class Tally:
    """How far all workers are together, and whether they should stop; shared between processes."""

    def __init__(self, context) -> None:
        self.counts = context.Array("q", 2)  # images, bytes
        self.stop = context.Event()

    def add(self, num_bytes: int) -> None:
        """One image more; Stopped if the work was called off."""
        with self.counts.get_lock():
            self.counts[0] += 1
            self.counts[1] += num_bytes
        if self.stop.is_set():
            raise Stopped


Prepared = tuple[bytes, tuple[int, int]]
"""The JPEG (or PNG, see `images.encode`) that goes into a shard, and its (width, height)."""


def prepare(data: np.ndarray, settings: ShardSettings, turned: bool, by_pillow: bool = False) -> Prepared:
    """What goes into a shard; a plain JPEG that needs no change is returned as it is, and has yet to be decoded.

    Args:
        data: an encoded image, uint8 [length].
        settings: of the shards.
        turned: whether it is stored turned and has to be turned clockwise by 90 degrees.
        by_pillow: also decode a plain JPEG, and encode it anew.

    Raises:
        BrokenImage: it cannot be decoded.
    """
    size, longest = plain_jpeg(data.tobytes()), settings.shorter_side or math.inf
    if size and min(size) <= longest and not turned and not by_pillow:
        return data.tobytes(), size
    result = decode(data)
    if turned:
        result = result.rotate(-90, expand=settings.turned_canvas == "enlarge")
    result = shrink(result, longest)
    return encode(result), result.size


def _decoded(job: Job, reader: Reader, decoder: Decoder) -> Iterator[tuple[Item, Prepared | BrokenImage]]:
    """Every item with what `prepare` makes of it, decoded in batches, or why it is broken; a batch is read ahead."""

    def attempt(item: Item, read: Pending, by_pillow: bool = False) -> Prepared | BrokenImage:
        try:
            return prepare(read.result(), job.settings, item.turned, by_pillow)
        except BrokenImage as error:
            return error

    batches = [job.items[start : start + _BATCH] for start in range(0, len(job.items), _BATCH)]
    ahead: list[Pending] = []
    for items, following in itertools.pairwise([(), *batches, ()]):
        reads, ahead = ahead, [reader.start(item.location) for item in following]
        results = [attempt(*pair) for pair in zip(items, reads, strict=True)]
        good = [i for i, result in enumerate(results) if not isinstance(result, BrokenImage)]
        encoded = [np.frombuffer(results[i][0], np.uint8) for i in good]
        for k in decoder.refused(encoded, whole_images([results[i][1] for i in good], decoder.image_size)):
            results[good[k]] = attempt(items[good[k]], reads[good[k]], by_pillow=True)
        yield from zip(items, results, strict=True)


def write_shard(job: Job, reader: Reader, decoder: Decoder, tally: Tally) -> ShardRecord:
    """Writes a shard, its index and its record.

    Raises:
        StorageError: images cannot be read, or most of them are gone.
        OSError: the shard cannot be written.
        Stopped: see `Tally`.
    """
    final, partial = job.folder / f"{job.name}.tar", job.folder / f".{job.name}.tar.part"
    rows, broken, vanished = [], [], 0
    try:
        with open(partial, "wb") as file:
            sink = _Sink(file)
            with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for item, result in _decoded(job, reader, decoder):
                    if isinstance(result, BrokenImage):
                        gone = isinstance(result.__cause__, FileNotFoundError)
                        vanished += gone
                        if vanished > max(_MOST_VANISHED, len(job.items) // 2):
                            raise StorageError(
                                f"{vanished} files of dataset {job.dataset!r} are not there, the last one is "
                                f"{item.location}: is its folder still mounted? Then start the same command again"
                            ) from result
                        # a list may name files that never were: their shards should not be made again every time
                        entry = {"dataset": job.dataset, "path": item.path, "reason": str(result)}
                        broken.append({**entry, "lasting": result.lasting or gone})
                        tally.add(0)
                        continue
                    encoded, (width, height) = result
                    about = {"dataset": job.dataset, "path": item.path, "width": width, "height": height}
                    suffix = "jpg" if encoded[0] == 0xFF else "png"
                    offset = _append(archive, f"{item.key:09d}.{suffix}", encoded)
                    _append(archive, f"{item.key:09d}.json", json.dumps(about).encode())
                    known = (width, height) if max(width, height) < 1 << 16 else (0, 0)  # a record has 16 bits for each
                    rows.append((offset, len(encoded), 0, zlib.crc32(encoded), *known))
                    tally.add(len(encoded))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)
        sync_folder(job.folder)
        record = ShardRecord(sink.tell(), len(rows), sink.digest.hexdigest(), broken)
        write_index(job.folder / RECORDS / f"{job.name}.index", np.array(rows, RECORD), 1)
        write_json(job.folder / RECORDS / f"{job.name}.json", asdict(record))
        return record
    finally:
        partial.unlink(missing_ok=True)


class _Sink:
    """A file being written, with its size and its hash."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self._size += len(data)

    def tell(self) -> int:
        return self._size


def _append(archive: tarfile.TarFile, name: str, data: bytes) -> int:
    """Adds a member without time and owner; returns the offset of its bytes."""
    info = tarfile.TarInfo(name)
    info.size, offset = len(data), archive.offset + tarfile.BLOCKSIZE
    archive.addfile(info, io.BytesIO(data))
    archive.members.clear()  # tarfile would keep every header
    return offset


def finished(folder: Path, name: str) -> ShardRecord | None:
    """The record of a shard that is there with the right size; None if it has to be written (again)."""
    records = folder / RECORDS
    try:
        record = ShardRecord(**json.loads((records / f"{name}.json").read_text()))
        whole = (folder / f"{name}.tar").stat().st_size == record.bytes
        whole = whole and len(open_index(records / f"{name}.index", 1)) == record.images
    except (OSError, ValueError, TypeError):  # DataError is a ValueError
        return None
    return record if whole and all(entry["lasting"] for entry in record.broken) else None


def write_json(path: Path, value: object) -> None:
    """A value as JSON; see `storage.write_whole`."""
    write_whole(path, f"{json.dumps(value)}\n".encode())


_worker: tuple[Reader, Decoder, Tally] | None = None


def start_worker(patience: float, tally: Tally) -> None:
    """Makes a process ready for `work`."""
    global _worker
    _worker = Reader(patience), Decoder(_BATCH, _SIZE, 1, torch.device("cpu")), tally
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent calls the work off

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # it was killed: nobody would ever end this process, or read what it writes

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()


def work(job: Job) -> ShardRecord:
    """`write_shard` in a worker process."""
    return write_shard(job, *_worker)
