"""Datasets into shards, in parallel and again after any interruption with the same result.

A keyed permutation says which image comes at which place of a split, and how many images a shard holds is fixed before
the first is written: every shard is a job of its own, and it does not matter which process does it, or when. Finished
shards are known by their records (`shard_writer.finished`); the manifest comes last, so a folder without one is
unfinished.
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
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from dune_fast.dali_pipelines.datasets import DataConfig, Dataset, DatasetConfig, Images, index_dataset
from dune_fast.dali_pipelines.errors import BrokenImage, DataError
from dune_fast.dali_pipelines.listing import is_turned
from dune_fast.dali_pipelines.order import Permutation
from dune_fast.dali_pipelines.pipeline import import_dali
from dune_fast.dali_pipelines.progress import Progress
from dune_fast.dali_pipelines.shard_writer import (
    Item,
    Job,
    ShardRecord,
    ShardSettings,
    Tally,
    finished,
    prepare,
    records_folder,
    start_worker,
    work,
    write_json,
)
from dune_fast.dali_pipelines.shards import FORMAT, MANIFEST, Manifest, Shard, Split
from dune_fast.dali_pipelines.storage import Reader, write_whole
from dune_fast.dali_pipelines.tar_index import open_index, write_index
from dune_fast.teachers.files import file_sha256, locked

__all__ = ["ShardSettings", "shard_dataset"]

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine.jsonl"
_SAMPLE = 256  # images whose sizes decide how many go into a shard
_OVERHEAD = 2048  # bytes an image: two headers, the JSON and the padding
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Plan:
    """What has to be done for a split; does not change once the first shard is written."""

    split: str
    images: int
    per_shard: int
    """Images of a shard, before broken ones are left out."""
    image_bytes: float
    """Of an image in a shard, as estimated."""

    @property
    def num_shards(self) -> int:
        """Shards of the split."""
        return math.ceil(self.images / self.per_shard)

    def name(self, number: int) -> str:
        """Of a shard, without ".tar"."""
        return f"{self.split}-{number:06d}"


def shard_dataset(name: str, data: DataConfig, folder: Path, settings: ShardSettings, workers: int) -> Manifest:
    """Writes the shards of one dataset, or those that are still missing.

    Args:
        name: of the dataset in `data`.
        data: for its configuration (whatever root it has, shards included) and the patience with the storage.
        folder: of the dataset's shards; made where it is missing.
        settings: of the shards. With those of an earlier call, and the same images, that call is continued.
        workers: processes.

    Returns:
        The manifest that was written.

    Raises:
        DataError: no images, wrong settings, a folder with shards of other images or settings, no room, only broken
            images, a failure of the storage, or no DALI.
    """
    settings.validate()
    if workers < 1:
        raise DataError(f"{workers} workers cannot do anything: at least 1 is needed")
    import_dali()  # fail here, not in a worker
    config = data.datasets[name]
    dataset = index_dataset(name, config)
    splits = {split: images for split, images in (("train", dataset.train), ("val", dataset.val)) if len(images)}
    source = _fingerprint(splits)
    try:
        records_folder(folder).mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", f"the shards in {folder}"):
            for partial in [*folder.glob(".*.part"), *records_folder(folder).glob(".*.part")]:
                partial.unlink()  # of a process that was killed
            plans = _plan(folder, dataset, splits, source, settings, data.read_patience, workers)
            _write_missing(folder, dataset, splits, plans, settings, data.read_patience, workers)
            return _finish(folder, name, plans, source, settings)
    except OSError as error:  # what goes wrong with the source is a DataError
        raise DataError(
            f"{folder} cannot be written: {error.strerror or error}; make room or choose another folder, then start "
            "the same command again: finished shards are kept"
        ) from error


def _fingerprint(splits: dict[str, Images]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for split, images in splits.items():
        digest.update(f"{split} {len(images)}\0".encode())
        for index in range(len(images)):
            digest.update(os.fsencode(images.relative(index)) + b"\0")
    return digest.hexdigest()


def _permutation(images: Images, settings: ShardSettings) -> Permutation:
    return Permutation(len(images), settings.seed)


def _items(images: Images, config: DatasetConfig, settings: ShardSettings, first: int, last: int) -> list[Item]:
    """The images at places first ... last - 1 of the shuffled order."""
    order = _permutation(images, settings)(np.arange(first, min(last, len(images))))
    return [
        Item(first + i, images.locate(index), images.relative(index), is_turned(images, index, config.rotate))
        for i, index in enumerate(order.tolist())
    ]


def _plan(
    folder: Path,
    dataset: Dataset,
    splits: dict[str, Images],
    source: str,
    settings: ShardSettings,
    patience: float,
    workers: int,
) -> list[Plan]:
    """The plan of an earlier call, where there is one, else a new one."""
    path = records_folder(folder) / "plan.json"
    header = {"format": FORMAT, "dataset": dataset.name, "source": source, "settings": asdict(settings)}
    if path.exists():
        try:
            known = json.loads(path.read_text())
            plans = [Plan(**plan) for plan in known.pop("plans")]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} cannot be read ({error}); delete the folder {folder} to start anew") from error
        if known != header:
            other = ", ".join(key for key in header if known.get(key) != header[key])
            raise DataError(
                f"{folder} holds shards that were made otherwise ({other} differs from now): "
                "choose another folder, delete this one, or use the dataset and the settings it was made with"
            )
        return plans
    plans = []
    reader = Reader(patience)
    for split, images in splits.items():

        def encoded_size(item: Item) -> int | BrokenImage:
            try:
                return len(prepare(reader.read(item.location), settings, item.turned)[0])
            except BrokenImage as error:
                return error

        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(encoded_size, _items(images, dataset.config, settings, 0, _SAMPLE)))
        sizes = [size for size in found if isinstance(size, int)]
        if not sizes:
            raise DataError(
                f"dataset {dataset.name!r}: none of the first {len(found)} images of {split} can be decoded, "
                f"for instance: {found[0]}"
            )
        image_bytes = statistics.fmean(sizes) + _OVERHEAD
        num_shards = max(1, round(len(images) * image_bytes / (settings.megabytes * 1e6)))
        plans.append(Plan(split, len(images), math.ceil(len(images) / num_shards), image_bytes))
    write_json(path, {**header, "plans": [asdict(plan) for plan in plans]})
    return plans


def _write_missing(
    folder: Path,
    dataset: Dataset,
    splits: dict[str, Images],
    plans: Sequence[Plan],
    settings: ShardSettings,
    patience: float,
    workers: int,
) -> None:
    everything = [(plan, number) for plan in plans for number in range(plan.num_shards)]
    missing = [(plan, number) for plan, number in everything if finished(folder, plan.name(number)) is None]
    if len(missing) < len(everything):
        logger.info(
            "%s: %d of %d shards are there already", dataset.name, len(everything) - len(missing), len(everything)
        )
    if not missing:
        return
    todo = sum(min(plan.per_shard, plan.images - number * plan.per_shard) for plan, number in missing)
    needed = sum(plan.image_bytes * min(plan.per_shard, plan.images - n * plan.per_shard) for plan, n in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder} has {free / 1e9:.2f} GB free, the {len(missing)} shards still missing need about "
            f"{needed / 1e9:.2f} GB: make room, or choose another folder or a smaller --shorter-side"
        )

    def jobs() -> Iterator[Job]:
        for plan, number in missing:
            first = number * plan.per_shard
            items = _items(splits[plan.split], dataset.config, settings, first, first + plan.per_shard)
            yield Job(folder, plan.name(number), dataset.name, settings, items)

    context = get_context("spawn")
    tally = Tally(context)
    total = sum(plan.images for plan in plans)
    workers = min(workers, len(missing))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(patience, tally))
    with pool, Progress(f"sharding {dataset.name}", total, done=total - todo) as progress:
        try:
            _run(pool, jobs(), workers + 1, tally, progress)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker was ended from outside, maybe for want of memory: start the same command again, with fewer "
                "--workers if it happens again; finished shards are kept"
            ) from error
        except KeyboardInterrupt:
            logger.warning("interrupted; finished shards are kept, the same command goes on with the rest")
            raise
        finally:
            tally.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _run(pool: ProcessPoolExecutor, jobs: Iterator[Job], at_once: int, tally: Tally, progress: Progress) -> None:
    """Does all jobs; a few are handed out ahead, since each names thousands of files."""
    running: set[Future[ShardRecord]] = set()
    images = num_bytes = 0
    while True:
        while len(running) < at_once and (job := next(jobs, None)) is not None:
            running.add(pool.submit(work, job))
        if not running:
            return
        done, running = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        now_images, now_bytes = tally.read()
        progress.advance(now_images - images, now_bytes - num_bytes)
        images, num_bytes = now_images, now_bytes
        for future in done:
            for entry in future.result().broken:
                logger.warning("%(dataset)s: broken image %(path)s left out: %(reason)s", entry)


def _finish(folder: Path, name: str, plans: Sequence[Plan], source: str, settings: ShardSettings) -> Manifest:
    """Joins the records of all shards into indices, the quarantine and the manifest."""
    splits, broken = [], []
    for plan in plans:
        shards, parts, left_out = [], [], []
        for number in range(plan.num_shards):
            record = ShardRecord(**json.loads((records_folder(folder) / f"{plan.name(number)}.json").read_text()))
            shards.append(Shard(f"{plan.name(number)}.tar", record.bytes, record.images, record.sha256))
            part = np.array(open_index(records_folder(folder) / f"{plan.name(number)}.index", 1))
            part["shard"] = number
            parts.append(part)
            left_out += [{"split": plan.split, **entry} for entry in record.broken]
        index = folder / f"{plan.split}.index"
        records = np.concatenate(parts)
        write_index(index, records, len(shards))
        splits.append(Split(plan.split, len(records), len(left_out), index.name, file_sha256(index), shards))
        broken += left_out
    write_whole(folder / QUARANTINE, "".join(json.dumps(entry) + "\n" for entry in broken).encode())
    if broken:
        total = sum(plan.images for plan in plans)
        logger.warning(
            "%s: %d of %d images are broken and left out, see %s", name, len(broken), total, folder / QUARANTINE
        )
    manifest = Manifest(FORMAT, name, source, asdict(settings), splits)
    write_whole(folder / MANIFEST, manifest.dump().encode())
    return manifest
