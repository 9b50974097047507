"""Makes a run's folder ready: starts anew, goes on from the newest whole checkpoint, or refuses to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from dune_fast.engine import checkpoints
from dune_fast.engine.config import RunConfig, dump_config
from dune_fast.engine.config_identity import refuse_changes
from dune_fast.engine.container import Manifest

logger = logging.getLogger(__name__)


def open_run(cfg: RunConfig, device: torch.device, parts: Callable[[], int]) -> int | None:
    """Rank 0 prepares the folder; all ranks call it.

    Args:
        cfg: the run's. Where `train.accumulation` is 0 it becomes that of the checkpoint, or `parts()` at the start:
            it is a part of what is computed.
        device: of this rank.
        parts: says into how many a step's images are best split here.

    Returns:
        The step of the checkpoint to go on from, None at the start.

    Raises:
        ValueError: `output_dir` is a file, or holds a run that is neither to be resumed nor overwritten.
        ConfigError: the configuration has changed since the checkpoint.
        CheckpointError: there are checkpoints, all of them broken.
    """
    step = (_prepare(cfg, parts) if dist.get_rank() == 0 else None) or -1
    found = torch.tensor([step, cfg.train.accumulation], device=device)
    dist.broadcast(found, 0)
    step, accumulation = found.tolist()
    if cfg.train.accumulation == 0:
        cfg.train.accumulation = accumulation
    return step if step >= 0 else None


def _prepare(cfg: RunConfig, parts: Callable[[], int]) -> int | None:
    run = Path(cfg.output_dir)
    if run.exists() and not run.is_dir():
        raise ValueError(f"output_dir={run} is a file; choose a folder")
    holds_run = (run / "metrics.jsonl").exists() or bool(checkpoints.complete_steps(run))
    if holds_run and cfg.train.overwrite:
        logger.info("starting anew in %s: what the earlier run left there is deleted", run)
        checkpoints.clear(run)
    elif holds_run and not cfg.train.resume:
        raise ValueError(
            f"{run} holds a run: go on with train.resume=true, start anew with train.overwrite=true, "
            "or choose another name=..."
        )
    run.mkdir(parents=True, exist_ok=True)
    checkpoints.clear_partial(run)
    step = checkpoints.newest_good(run)
    if step is not None:
        manifest = Manifest.read(checkpoints.folder(run) / checkpoints.tag(step))
        if cfg.train.accumulation == 0:
            cfg.train.accumulation = manifest.config["train"].get("accumulation", 1)
        try:
            refuse_changes(manifest.config, cfg)
        except ValueError as error:
            if not cfg.train.allow_config_change:
                raise
            logger.warning("%s", error)
    if cfg.train.accumulation == 0:
        cfg.train.accumulation = parts()
    dump_config(cfg, run / "config.yaml")
    return step
