"""Fills a cache: every view of every training image, through the teachers, once."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dune_fast.cache.store import MANIFEST, VERSION, shard_path, write_shard
from dune_fast.dali_pipelines.datasets import index_datasets
from dune_fast.dali_pipelines.loader import Batch, ViewLoader
from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.engine.cache_basis import cache_basis
from dune_fast.engine.cache_fingerprint import fingerprint, refuse_other
from dune_fast.engine.cache_shard import ShardRows, bytes_per_view
from dune_fast.engine.config import ConfigError, RunConfig
from dune_fast.engine.devices import autocast_dtype
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.progress import Progress

logger = logging.getLogger(__name__)

_BATCH = 64  # images of a forward pass


def build(cfg: RunConfig, part: int = 0, parts: int = 1) -> Path:
    """Builds what is missing of a cache, or of one part of it; returns its folder.

    Shards are shared out, so parts can be built by as many processes, on any machines that share the folder. A build
    that was killed goes on at the shard where it was.

    Args:
        cfg: of the run that will read it; `cache.folder` and `data.views` say where and how many views.
        part, parts: this process builds shards part, part + parts, ...

    Raises:
        ConfigError: the configuration does not suit, the folder holds another cache, or the disk is too small.
        DataError: the images cannot be read.
    """
    if not cfg.cache.folder or not cfg.data.views:
        raise ConfigError(
            f"cache.folder={cfg.cache.folder!r}, data.views={cfg.data.views}: a cache needs a folder and a number of "
            "fixed views of every image, e.g. cache.folder=cache data.views=2"
        )
    folder, datasets = Path(cfg.cache.folder).expanduser(), index_datasets(cfg.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    views, size = sum(len(dataset.train) for dataset in datasets) * cfg.data.views, bytes_per_view(cfg)
    rows = min(views, max(1, int(cfg.cache.shard_megabytes * 2**20) // size))
    manifest = {
        "version": VERSION, "views": views, "rows": rows, "bytes_per_view": size,
        "fingerprint": fingerprint(cfg, datasets, device),
    }  # fmt: skip
    manifest = json.loads(json.dumps(manifest))
    _refuse_other(folder, manifest)
    shards = range(part, -(-views // rows), parts)
    todo = [index for index in shards if not shard_path(folder, index).exists()]
    needed, free = len(todo) * rows * size, shutil.disk_usage(folder).free
    logger.info(
        "%s: %d views of %s bytes, %d shards; %d of this part are missing, %.2f GiB", folder, views, f"{size:,}",
        -(-views // rows), len(todo), needed / 2**30,
    )  # fmt: skip
    if needed > free:
        raise ConfigError(
            f"cache.folder={folder} has {free / 2**30:.1f} GiB free, the cache needs {needed / 2**30:.1f}: choose "
            "another folder, fewer data.views, cache.format=int8, cache.components or cache.patch_share"
        )
    if not (folder / MANIFEST).exists():
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    if todo:
        _fill(cfg, folder, datasets, todo, manifest, device)
    return folder


def _refuse_other(folder: Path, manifest: dict[str, Any]) -> None:
    """Makes the folder, or compares the manifest that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if not path.exists():
        return
    there = json.loads(path.read_text())
    plain = [{k: v for k, v in values.items() if k != "fingerprint"} for values in (there, manifest)]
    refuse_other(str(folder), plain[0] | there["fingerprint"], plain[1] | manifest["fingerprint"])


def _fill(
    cfg: RunConfig, folder: Path, datasets: list, todo: list[int], manifest: dict[str, Any], device: torch.device
) -> None:
    views, rows = manifest["views"], manifest["rows"]
    dtype = autocast_dtype(cfg.train.precision, device)
    teachers = TeacherEnsemble(cfg.teachers, cfg.student.patch_size, dtype, device)
    bases, basis = {}, ""
    if cfg.cache.components:
        bases, basis = cache_basis(cfg, folder, datasets, views, teachers, device)
    batches = [
        np.arange(start, min(start + _BATCH, (index + 1) * rows, views))
        for index in todo for start in range(index * rows, min((index + 1) * rows, views), _BATCH)
    ]  # fmt: skip
    total = sum(map(len, batches))
    loader = ViewLoader(cfg.data, cfg.image_size, cfg.train.seed, batches, device, datasets)
    with loader, Progress("caching features", total, "views") as progress:
        began = time.monotonic()
        for index, found in _by_shard(loader.batches(), todo, rows):
            shard = ShardRows(cfg, min(rows, views - index * rows), bases)
            for batch in found:
                shard.add(index * rows, batch.views, batch.checksums, teachers(batch.images))
                progress.advance(len(batch))
            seconds, began = time.monotonic() - began, time.monotonic()
            about = shard.about(seconds, basis)
            write_shard(shard_path(folder, index), shard.tensors, shard.present, about, shard.moments)


def _by_shard(batches: Iterator[Batch], todo: list[int], rows: int) -> Iterator[tuple[int, Iterator[Batch]]]:
    """Each shard with its batches, which are in the shards' order; a shard of broken images alone has none."""
    waiting = next(batches, None)

    def of(index: int) -> Iterator[Batch]:
        nonlocal waiting
        while waiting is not None and waiting.views[0] // rows == index:
            yield waiting
            waiting = next(batches, None)

    for index in todo:
        yield index, of(index)
