"""Checks of what one experiment needs: teachers' files, data, the output folder, disk, the batch."""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dune_fast.dali_pipelines.datasets import Dataset, DatasetConfig, index_dataset
from dune_fast.distill.normalizers import STORED
from dune_fast.distill.objective import ownership
from dune_fast.distill.stored_statistics import read_statistics
from dune_fast.doctor import FAIL, OK, WARN, Check, Finding
from dune_fast.doctor.machine import existing, writable
from dune_fast.engine.accumulation import micro_batch_size
from dune_fast.engine.config import RunConfig
from dune_fast.engine.memory import disk_bytes
from dune_fast.engine.overrides import config_names
from dune_fast.teacher_files import is_cached, load_teacher_config
from dune_fast.teachers.config import RANDOM, TeacherConfig
from dune_fast.teachers.registry import family_class
from dune_fast.teachers.timm_names import SHORTHAND
from dune_fast.teachers.vit import ViTTeacher
from dune_fast.teachers.weights import weights_path

_INDEX_SECONDS = 30.0
"""For all datasets together: to list twenty million files takes longer."""


def _fetching(cfg: TeacherConfig) -> str:
    """How to get a teacher's file."""
    for name in config_names("teachers"):
        if load_teacher_config(name).weights == cfg.weights:
            return f"dune-fast teachers fetch {name}" if cfg.url else f"see the comment in configs/teachers/{name}.yaml"
    return "correct its `weights`"


def teacher(name: str, cfg: TeacherConfig) -> Finding:
    """One teacher's weights: there, readable, of the size and architecture that is expected. Tensors are not read."""
    title = f"teacher {name}"
    if cfg.weights.startswith(RANDOM):
        return Finding(title, WARN, f"weights are drawn ({cfg.weights})", "that serves tests and benchmarks alone")
    if cfg.weights.startswith("asset:"):
        if is_cached(cfg.weights):
            return Finding(title, OK, f"{cfg.weights} is in the cache")
        cure = f"dune-fast fetch {cfg.weights.removeprefix('asset:').partition('/')[0]}"
        return Finding(title, WARN, f"{cfg.weights} will be fetched when a run starts", cure)
    path = Path(cfg.weights).expanduser()
    if path.is_dir():  # of a run or a checkpoint
        try:
            path = weights_path(cfg.weights)
        except ValueError as error:
            return Finding(title, FAIL, str(error), "let the run come to a checkpoint, or correct its `weights`")
        if path.is_dir():
            return Finding(title, OK, f"{path}, a checkpoint (`dune-fast teachers verify` reads it)")
    if not path.is_file():
        return Finding(title, FAIL, f"there is no file {path}", f"{_fetching(cfg)}; DUNE_FAST_WEIGHTS names the folder")
    if not os.access(path, os.R_OK):
        return Finding(title, FAIL, f"{path} may not be read", f"chmod a+r {path}")
    size = path.stat().st_size
    if cfg.bytes is not None and size != cfg.bytes:
        text = f"{path} has {size:,} bytes instead of {cfg.bytes:,}"
        return Finding(title, FAIL, text, f"remove it and get it again: {_fetching(cfg)}")
    family = family_class(cfg.family)
    if path.suffix != ".safetensors" and issubclass(family, ViTTeacher) and cfg.family != "onnx_vit":
        from dune_fast.teachers.containers import TeacherWeightsError, check_archive

        try:
            check_archive(path)
        except TeacherWeightsError as error:
            return Finding(title, FAIL, str(error), f"remove it and get it again: {_fetching(cfg)}")
    return Finding(title, OK, f"{path}, {size / 2**20:,.0f} MiB (`dune-fast teachers verify` reads it)")


def _unfetched(dataset: DatasetConfig) -> bool:
    """Whether a run would have to fetch its images first."""
    return any(root.startswith("asset:") and not is_cached(root) for root in (dataset.root, dataset.val_root))


def _index_all(cfg: RunConfig, seconds: float) -> dict[str, Dataset | Exception | None]:
    """Lists every dataset as a training would, in threads; None for those that are not fetched or not done in time."""
    found: dict[str, Any] = dict.fromkeys(cfg.data.datasets)

    def index(name: str) -> None:
        try:
            found[name] = index_dataset(name, cfg.data.datasets[name])
        except Exception as error:
            found[name] = error

    names = [name for name, dataset in cfg.data.datasets.items() if not _unfetched(dataset)]
    threads = [threading.Thread(target=index, args=(name,), daemon=True) for name in names]
    end = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return dict(found)


def data(cfg: RunConfig, seconds: float = _INDEX_SECONDS) -> Iterator[Finding]:
    """Every dataset, listed as a training lists it, and whether every teacher gets images."""
    if not cfg.data.datasets:
        cure = "for instance data=folder data.datasets.images.root=/path/to/images"
        yield Finding("data", FAIL, "no dataset is configured", cure)
        return
    for name, found in _index_all(cfg, seconds).items():
        dataset = cfg.data.datasets[name]
        title = f"data {name}"
        if isinstance(found, Dataset):
            text = f"{len(found.train):,} images to train on, {len(found.val):,} held out, group {dataset.group}"
            yield Finding(title, OK, text)
        elif isinstance(found, Exception):
            reason, parted, cure = str(found).removeprefix(f"dataset {name!r}: ").rpartition("; ")
            cure = f"{cure} (DUNE_FAST_DATA names the folder of the published recipes)"
            if not parted:
                reason, cure = str(found), f"correct data.datasets.{name}"
            yield Finding(title, FAIL, reason, cure)
        elif _unfetched(dataset):
            asset = dataset.root.removeprefix("asset:")
            yield Finding(title, WARN, "will be fetched when a run starts", f"dune-fast fetch {asset}")
        else:
            cure = "wait for it once with `dune-fast data shard`, whose result needs no listing"
            yield Finding(title, WARN, f"is there, but was not listed in {seconds:.0f} s", cure)
    groups = cfg.data.groups
    try:
        own = {name: t.groups for name, t in cfg.teachers.items()}
        ownership(own, groups, cfg.objective)
    except ValueError as error:
        yield Finding("data sharing", FAIL, str(error), "correct teachers.*.groups, data.datasets.*.group or `data`")


def statistics(cfg: RunConfig) -> Iterator[Finding]:
    """The stored statistics of teachers' features, where the standardization takes some."""
    stored = {n: [t for t in c.token_types if cfg.standardization.of(t) in STORED] for n, c in cfg.teachers.items()}
    wanted = {name: (cfg.teachers[name].num_features, tokens) for name, tokens in stored.items() if tokens}
    if not wanted:
        return
    try:
        read_statistics(cfg.standardization.file, cfg.standardization.files, wanted)
    except ValueError as error:
        cure = "`dune-fast cache statistics` measures them (a run that goes on has them in its checkpoint)"
        yield Finding("statistics", FAIL, str(error).partition(": measure it")[0], cure)
    else:
        yield Finding("statistics", OK, f"of the features of {', '.join(wanted)}")


def start(cfg: RunConfig) -> Iterator[Finding]:
    """Whether there is what the student starts from; its tensors are not read."""
    given = cfg.student_weights
    if given and not given.startswith(("asset:", SHORTHAND)) and not Path(given).expanduser().exists():
        cure = "put it there, or leave it out for drawn weights: student_weights=''"
        yield Finding("start", FAIL, f"student_weights={given}: there is no such file or folder", cure)


def output(cfg: RunConfig) -> Finding:
    """Whether the run's folder can be written."""
    return writable("output", Path(cfg.output_dir), FAIL, "choose another output_dir, or change the folder's rights")


def disk(cfg: RunConfig) -> Finding:
    """Free space against what the run will write."""
    folder = existing(Path(cfg.output_dir))
    free, needed = shutil.disk_usage(folder).free, disk_bytes(cfg)
    text = f"{free / 2**30:.1f} GiB free, checkpoints and weights take up to {needed / 2**30:.2f} GiB"
    cure = "free some space, choose another output_dir, or lower train.keep_checkpoints"
    if free < needed:
        return Finding("disk", FAIL, text, cure)
    return Finding("disk", WARN, f"{text}: little is left", cure) if free < 1.5 * needed else Finding("disk", OK, text)


def batch(cfg: RunConfig, processes: int | None = None) -> Finding:
    """Whether the batch can be shared out over this machine's GPUs."""
    count, size = processes or max(1, torch.cuda.device_count()), cfg.train.global_batch
    parts = max(1, cfg.train.accumulation)  # 0: the run works it out, so that it divides the batch
    if cfg.partitions:
        try:
            at_once = micro_batch_size(cfg, count)
        except ValueError as error:
            return Finding("batch", FAIL, str(error), "another number of processes, or partition_by=steps")
        text = f"{size} images a step in {len(cfg.partitions)} partitions, {at_once} and more at once on each process"
        return Finding("batch", OK, text)
    shared = f"{count} processes" + (f" in {parts} parts (train.accumulation)" if parts > 1 else "")
    if size % (count * parts):
        cure = f"for example train.global_batch={math.ceil(size / (count * parts)) * count * parts}"
        return Finding("batch", FAIL, f"{size} images cannot be shared by {shared}", cure)
    text = f"{size} images a step, {size // count // parts} at once for each of {shared} on this machine"
    return Finding("batch", OK, text)


def head(cfg: RunConfig) -> Iterator[Finding]:
    """What a head's training needs: see `tasks.run.needs`."""
    from dune_fast.tasks.run import needs  # which imports DeepSpeed

    missing = needs(cfg)
    yield from (Finding("head", FAIL, f"{what}: not found at {where}", ask) for what, where, ask in missing)
    if not missing:
        yield Finding("head", OK, f"encoder and data of the {cfg.head.kind} head are there")


def checks(cfg: RunConfig) -> list[tuple[str, Check]]:
    """All checks of an experiment."""
    if cfg.head.kind:
        return [("head", lambda: list(head(cfg))), ("batch", lambda: batch(cfg)), ("output", lambda: output(cfg))]
    return [
        *((f"teacher {name}", lambda name=name, t=t: teacher(name, t)) for name, t in cfg.teachers.items()),
        ("data", lambda: list(data(cfg))),
        ("statistics", lambda: list(statistics(cfg))),
        ("start", lambda: list(start(cfg))),
        ("batch", lambda: batch(cfg)),
        ("output", lambda: output(cfg)),
        ("disk", lambda: disk(cfg)),
    ]
