"""Makes a run's folder ready: starts anew, goes on from the newest whole checkpoint, or refuses to."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shlex
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dune_fast.dali_pipelines.datasets import Dataset
from dune_fast.engine.checkpoints import clear_partial
from dune_fast.engine.config import ConfigError, RunConfig, dump_config
from dune_fast.engine.config_identity import refuse_changes
from dune_fast.engine.run_log import open_run_log
from dune_fast.teachers.run_files import Manifest, complete_steps, folder, newest_good, tag

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""In the run's folder: held by its process of rank 0."""


def how_to_go_on(cfg: RunConfig) -> str:
    """What goes on with an interrupted run, for messages."""
    same = "" if cfg.train.overwrite else ", or the same command,"
    return f"`dune-fast resume {shlex.quote(cfg.output_dir)}`{same} goes on from the newest checkpoint"


def open_run(
    cfg: RunConfig, precision: str, parts: Callable[[], int], checkpoint_bytes: Callable[[], int]
) -> int | None:
    """Rank 0 prepares the folder; all ranks call it.

    Args:
        cfg: the run's. Where `train.precision` is "auto" and where `train.accumulation` is 0, it becomes that of the
            checkpoint, or `precision` and `parts()` at the start: they are a part of what is computed.
        precision: what "auto" means here, "bf16" or "fp32".
        parts: says into how many a step's images are best split here; called once the precision is known.
        checkpoint_bytes: says how many a checkpoint takes.

    Returns:
        The step of the checkpoint to go on from, None at the start.

    Raises (on every rank):
        ValueError: `output_dir` is a file, is in use, or holds a run that is neither to be resumed nor overwritten.
        ConfigError: the configuration has changed since the checkpoint, or the disk has no room for a checkpoint.
        CheckpointError: there are checkpoints, all of them broken.
        OSError: the folder cannot be written.
    """
    found: list[Any] = [None, None, None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = _prepare(cfg, precision, parts, checkpoint_bytes())
        except (ValueError, OSError) as error:
            found[1] = error
        found[2:] = cfg.train.precision, cfg.train.accumulation
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(found)
    step, error, *chosen = found
    if error is not None:
        raise error
    if [cfg.train.precision, cfg.train.accumulation] != chosen:  # a frozen configuration has them already
        cfg.train.precision, cfg.train.accumulation = chosen
    return step


def _hold(run: Path) -> None:
    """Locks the folder until this process ends: two runs in it would delete each other's checkpoints."""
    # never closed, nor opened elsewhere in this process: closing any descriptor of it would give the lock back
    held = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.debug("the file system of %s has no locks", run, exc_info=True)
            return
        holder = os.pread(held, 200, 0).decode(errors="replace").strip()
        os.close(held)
        raise ValueError(
            f"{run} is in use by another training ({holder}): wait until it has ended, end it, or choose another "
            "name=..."
        ) from None
    os.ftruncate(held, 0)
    os.pwrite(held, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


_RESULTS = (
    "checkpoints", "tensorboard", "metrics.jsonl", "log.txt", "run.json", "state.json", "config.yaml",
    "encoder.safetensors", "student.safetensors", "student_raw.safetensors", "start.safetensors",
    "head.safetensors", "head_raw.safetensors",
    "drift.json", "held_out.json", "pca.png",
    "loss.png", "report.html", "quarantine.rank*.jsonl", "nonfinite_step_*.safetensors",
)  # fmt: skip
"""What a run writes into its folder."""


def _clear(run: Path) -> None:
    """Deletes what an earlier run has left in the folder; other files stay."""
    for path in [path for pattern in _RESULTS for path in run.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _settle(cfg: RunConfig, run: Path, step: int | None, precision: str, parts: Callable[[], int]) -> None:
    """Fixes precision and accumulation, the checkpoint's if there is one, and refuses a changed configuration."""
    if step is not None:
        manifest = Manifest.read(folder(run) / tag(step))
        if cfg.train.accumulation == 0:
            cfg.train.accumulation = manifest.config["train"].get("accumulation", 1)
        if cfg.train.precision == "auto":
            cfg.train.precision = manifest.config["train"]["precision"]  # "auto", if it is an old one
        try:
            refuse_changes(manifest.config, cfg)
        except ValueError as error:
            if not cfg.train.allow_config_change:
                raise
            logger.warning("%s", error)
    if cfg.train.precision == "auto":
        cfg.train.precision = precision
    if cfg.train.accumulation == 0:
        cfg.train.accumulation = parts()


def _prepare(cfg: RunConfig, precision: str, parts: Callable[[], int], needed: int) -> int | None:
    if not cfg.output_dir:
        raise ValueError("output_dir is empty; give the run's folder, e.g. output_dir=runs/mine")
    run = Path(cfg.output_dir)
    if run.exists() and not run.is_dir():
        raise ValueError(f"output_dir={run} is a file; choose a folder")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL, errno.ELOOP, errno.ENOTSUP):
            raise  # the others are explained where the command ends
        raise ValueError(f"output_dir={run} cannot be made ({error.strerror}): choose another folder") from None
    _hold(run)
    holds_run = (run / "metrics.jsonl").exists() or bool(complete_steps(run))
    if holds_run and cfg.train.overwrite:
        logger.info("starting anew in %s: what the earlier run left there is deleted", run)
        _clear(run)
    elif holds_run and not cfg.train.resume:
        raise ValueError(
            f"{run} holds a run: go on with train.resume=true, start anew with train.overwrite=true, "
            "or choose another name=..."
        )
    open_run_log(run)
    clear_partial(run)
    step = newest_good(run)
    _settle(cfg, run, step, precision, parts)
    free = shutil.disk_usage(run).free
    if free < needed:
        raise ConfigError(
            f"a checkpoint of this run takes {needed / 2**30:.2f} GiB, and {run} has {free / 2**30:.2f} GiB left: make "
            "room, or choose another output_dir"
        )
    dump_config(cfg, run / "config.yaml")
    return step


def count_images(datasets: Sequence[Dataset]) -> dict[str, int]:
    """Dataset -> images to train on: with the configuration, what the order of all images follows from."""
    return {dataset.name: len(dataset.train) for dataset in datasets}


def refuse_other_images(saved: dict[str, int], found: dict[str, int], allowed: bool) -> None:
    """Raises ConfigError if a run would go on with more or fewer images: every further step would have others.

    `saved` is `count_images` at the checkpoint, empty if that is an old one; `allowed` warns instead.
    """
    other = [f"{name}: {count} -> {found.get(name, 0)}" for name, count in saved.items() if found.get(name, 0) != count]
    if not other:
        return
    changed = f"the number of images has changed since the checkpoint was written: {'; '.join(other)}"
    if not allowed:
        raise ConfigError(
            f"{changed}. The steps to come would be of other images: bring the old ones back, go on all the same by "
            "train.allow_config_change=true, or start anew with train.overwrite=true"
        )
    logger.warning("%s", changed)
