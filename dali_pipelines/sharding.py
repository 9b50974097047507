"""Datasets into shards, in parallel and again after any interruption with the same result.

A keyed permutation says which image comes at which place of a split, and how many images a shard holds is fixed before
the first is written: it does not matter which process writes a shard, or when. Finished shards are known by their
records (`shard_writer.finished`); the manifest comes last, so a folder without one is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from dune_fast.dali_pipelines import shard_writer
from dune_fast.dali_pipelines.datasets import DataConfig, Dataset, Images, index_dataset
from dune_fast.dali_pipelines.errors import BrokenImage, DataError
from dune_fast.dali_pipelines.listing import is_turned
from dune_fast.dali_pipelines.order import Permutation
from dune_fast.dali_pipelines.patience import Pending
from dune_fast.dali_pipelines.pipeline import import_dali
from dune_fast.dali_pipelines.shard_writer import Item, Job, ShardRecord, ShardSettings, Tally, finished, prepare
from dune_fast.dali_pipelines.shards import FORMAT, MANIFEST, Manifest, Shard, Split
from dune_fast.dali_pipelines.storage import Reader, write_whole
from dune_fast.dali_pipelines.tar_index import open_index, write_index
from dune_fast.teachers.files import file_sha256, locked
from dune_fast.teachers.progress import Progress

__all__ = ["ShardSettings", "shard_dataset"]

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine.jsonl"
_SAMPLE = 256  # images whose sizes decide how many go into a shard
_OVERHEAD = 2048  # bytes an image: two headers, the JSON and the padding
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class SplitPlan:
    """What has to be done for a split; does not change once the first shard is written."""

    split: str
    images: int
    per_shard: int
    """Images of a shard, before broken ones are left out."""
    image_bytes: float
    """Of an image in a shard, as estimated."""

    def shards(self) -> dict[str, range]:
        """name of each shard, without ".tar" -> places of its images in the shuffled order."""
        starts = range(0, self.images, self.per_shard)
        return {f"{self.split}-{i:06d}": range(self.images)[at : at + self.per_shard] for i, at in enumerate(starts)}


def shard_dataset(name: str, data: DataConfig, folder: Path, settings: ShardSettings, workers: int) -> Manifest:
    """Writes the shards of the dataset `data.datasets[name]`, whatever root it has, and returns their manifest.

    Args:
        folder: of the dataset's shards; made where it is missing.
        settings: of the shards. With those of an earlier call, and the same images, that call is continued.
        workers: processes.

    Raises:
        DataError: no images, a folder with shards of other images or settings, no room, only broken images, a failure
            of the storage, or no DALI.
    """
    if workers < 1:
        raise DataError(f"{workers} workers cannot do anything: at least 1 is needed")
    import_dali()  # fail here, not in a worker
    dataset = index_dataset(name, data.datasets[name])
    try:
        (folder / shard_writer.RECORDS).mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", f"the shards in {folder}"):
            for partial in [*folder.glob(".*.part"), *(folder / shard_writer.RECORDS).glob(".*.part")]:
                partial.unlink()  # of a process that was killed
            sharding = _Sharding(dataset, folder, settings, data.read_patience, workers)
            plans = sharding.plan()
            sharding.write_missing(plans)
            return sharding.finish(plans)
    except OSError as error:  # what goes wrong with the source is a DataError
        raise DataError(
            f"{folder} cannot be written: {error.strerror or error}; make room or choose another folder, then start "
            "the same command again: finished shards are kept"
        ) from error


class _Sharding:
    """One dataset on its way into shards."""

    def __init__(
        self, dataset: Dataset, folder: Path, settings: ShardSettings, patience: float, workers: int
    ) -> None:
        self.dataset, self.folder, self.settings = dataset, folder, settings
        self.patience, self.workers = patience, workers
        splits = {"train": dataset.train, "val": dataset.val}
        self.splits = {split: images for split, images in splits.items() if len(images)}
        self.source = _fingerprint(self.splits)

    def plan(self) -> list[SplitPlan]:
        """The plan of an earlier call, where there is one, else a new one."""
        path, settings = self.folder / shard_writer.RECORDS / "plan.json", asdict(self.settings)
        header = {"format": FORMAT, "dataset": self.dataset.name, "source": self.source, "settings": settings}
        if not path.exists():
            plans = [self._plan_split(split, images) for split, images in self.splits.items()]
            shard_writer.write_json(path, {**header, "plans": [asdict(plan) for plan in plans]})
            return plans
        try:
            known = json.loads(path.read_text())
            plans = [SplitPlan(**plan) for plan in known.pop("plans")]
        except (ValueError, TypeError, KeyError) as error:
            remedy = f"delete the folder {self.folder} to start anew"
            raise DataError(f"{path} cannot be read ({error}); {remedy}") from error
        if known != header:
            other = ", ".join(key for key in header if known.get(key) != header[key])
            raise DataError(
                f"{self.folder} holds shards that were made otherwise ({other} differs from now): "
                "choose another folder, delete this one, or use the dataset and the settings it was made with"
            )
        return plans

    def _plan_split(self, split: str, images: Images) -> SplitPlan:
        """From the sizes of the first images."""
        items = self._items(images, range(min(_SAMPLE, len(images))))

        def encoded_size(item: Item, read: Pending) -> int | BrokenImage:
            try:
                return len(prepare(read.result(), self.settings, item.turned)[0])
            except BrokenImage as error:
                return error

        with closing(Reader(self.patience)) as reader, ThreadPoolExecutor(self.workers) as pool:
            found = list(pool.map(encoded_size, items, [reader.start(item.location) for item in items]))
        sizes = [size for size in found if isinstance(size, int)]
        if not sizes:
            raise DataError(
                f"dataset {self.dataset.name!r}: none of the first {len(found)} images of {split} can be decoded, "
                f"for instance: {found[0]}"
            )
        image_bytes = statistics.fmean(sizes) + _OVERHEAD
        num_shards = max(1, round(len(images) * image_bytes / (self.settings.megabytes * 1e6)))
        return SplitPlan(split, len(images), math.ceil(len(images) / num_shards), image_bytes)

    def _items(self, images: Images, places: range) -> list[Item]:
        """The images at some places of the shuffled order."""
        order, rotate = Permutation(len(images), self.settings.seed)(np.array(places)), self.dataset.config.rotate
        return [
            Item(place, images.locate(index), images.relative(index), is_turned(images, index, rotate))
            for place, index in zip(places, order.tolist(), strict=True)
        ]

    def write_missing(self, plans: Sequence[SplitPlan]) -> None:
        """Writes the shards that are not finished."""
        everything = [(plan, *shard) for plan in plans for shard in plan.shards().items()]
        missing = [shard for shard in everything if finished(self.folder, shard[1]) is None]
        there, title = len(everything) - len(missing), self.dataset.name
        if there:
            logger.info("%s: %d of %d shards are there already", title, there, len(everything))
        if not missing:
            return
        needed = sum(plan.image_bytes * len(places) for plan, _, places in missing)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise DataError(
                f"{self.folder} has {free / 1e9:.2f} GB free, the {len(missing)} shards still missing need about "
                f"{needed / 1e9:.2f} GB: make room, or choose another folder or a smaller --shorter-side"
            )
        jobs = (  # made when their turn comes: each names thousands of files
            Job(self.folder, name, title, self.settings, self._items(self.splits[plan.split], places))
            for plan, name, places in missing
        )
        total, todo = sum(plan.images for plan in plans), sum(len(places) for *_, places in missing)
        context, workers = get_context("spawn"), min(self.workers, len(missing))
        tally = Tally(context)
        pool = ProcessPoolExecutor(workers, context, shard_writer.start_worker, (self.patience, tally))
        with pool, Progress(f"sharding {title}", total, done=total - todo) as progress:
            try:
                _run(pool, jobs, workers + 1, tally, progress)
            except BrokenProcessPool as error:
                raise DataError(
                    "a worker was ended from outside, maybe for want of memory: start the same command again, with "
                    "fewer --workers if it happens again; finished shards are kept"
                ) from error
            except KeyboardInterrupt:
                logger.warning("interrupted; finished shards are kept, the same command goes on with the rest")
                raise
            finally:
                tally.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def finish(self, plans: Sequence[SplitPlan]) -> Manifest:
        """Joins the records of all shards into indices, the quarantine and the manifest."""
        splits, broken, records = [], [], self.folder / shard_writer.RECORDS
        for plan in plans:
            shards, parts, left_out = [], [], []
            for number, name in enumerate(plan.shards()):
                record = ShardRecord(**json.loads((records / f"{name}.json").read_text()))
                shards.append(Shard(f"{name}.tar", record.bytes, record.images, record.sha256))
                part = np.array(open_index(records / f"{name}.index", 1))
                part["shard"] = number
                parts.append(part)
                left_out += [{"split": plan.split, **entry} for entry in record.broken]
            index, rows = self.folder / f"{plan.split}.index", np.concatenate(parts)
            write_index(index, rows, len(shards))
            splits.append(Split(plan.split, len(rows), len(left_out), index.name, file_sha256(index), shards))
            broken += left_out
        quarantine = self.folder / QUARANTINE
        write_whole(quarantine, "".join(json.dumps(entry) + "\n" for entry in broken).encode())
        if broken:
            total, name = sum(plan.images for plan in plans), self.dataset.name
            logger.warning("%s: %d of %d images are broken and left out, see %s", name, len(broken), total, quarantine)
        manifest = Manifest(FORMAT, self.dataset.name, self.source, asdict(self.settings), splits)
        write_whole(self.folder / MANIFEST, manifest.dump().encode())
        return manifest


def _fingerprint(splits: dict[str, Images]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for split, images in splits.items():
        digest.update(f"{split} {len(images)}\0".encode())
        for index in range(len(images)):
            digest.update(os.fsencode(images.relative(index)) + b"\0")
    return digest.hexdigest()


def _run(pool: ProcessPoolExecutor, jobs: Iterator[Job], at_once: int, tally: Tally, progress: Progress) -> None:
    """Does all jobs, a few of them handed out ahead."""
    running: set[Future[ShardRecord]] = set()
    images = num_bytes = 0
    while True:
        while len(running) < at_once and (job := next(jobs, None)) is not None:
            running.add(pool.submit(shard_writer.work, job))
        if not running:
            return
        done, running = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        now_images, now_bytes = tally.counts
        progress.advance(now_images - images, now_bytes - num_bytes)
        images, num_bytes = now_images, now_bytes
        for future in done:
            for entry in future.result().broken:
                logger.warning("%(dataset)s: broken image %(path)s left out: %(reason)s", entry)
