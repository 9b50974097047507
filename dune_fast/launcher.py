"""Starts the ranks of a run on this machine or on those of a hostfile."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dune_fast.engine.config import RunConfig

from dune_fast.cluster.ranks import host_command, run_launcher, visible_devices


def check_kind(cfg: RunConfig, head: bool) -> None:
    """ValueError if a configuration is not of a head's training (`head`), or not of a distillation."""
    if head and not cfg.head.kind:
        raise ValueError(
            "head.kind is empty, so this is a distillation: choose an experiment that trains a head, such as "
            "experiment=seg_ade20k, or `dune-fast distill`"
        )
    if cfg.head.kind and not head:
        raise ValueError(f"head.kind={cfg.head.kind} trains a task head: `dune-fast heads train` does that")


def launch_training(args: argparse.Namespace, run: Path | None, head: bool = False) -> int:
    """Starts the ranks of a new run or, with `run`, of one that goes on; the exit status.

    A new run trains a head with `head`, and else a student. 0 for a run that has finished, `run_state.STOPPED_STATUS`
    for one that was stopped by a signal and saved.
    """
    import torch

    from dune_fast.engine.launch import free_port, new_job
    from dune_fast.engine.run_state import command_status
    from dune_fast.train import run_config

    if args.processes < 0:
        raise ValueError(f"--processes is {args.processes}; give how many to start, at least 1")
    cfg = run_config(run, args.overrides)  # a wrong configuration is said once, before anything is launched
    if run is None:
        check_kind(cfg, head)
    arguments = [*(["--debug"] if args.debug else []), *(["--run", str(run)] if run else []), *args.overrides]
    if args.hostfile is not None:
        from dune_fast.cluster.hosts import launch_on_hosts

        if args.processes:
            raise ValueError("--processes goes without --hostfile, whose lines say how many: `name slots=8`")
        return command_status(Path(cfg.output_dir), lambda: launch_on_hosts(args, cfg, arguments))
    if args.missing_hosts or args.master_addr:
        raise ValueError("--missing-hosts and --master-addr go with --hostfile")
    slots = visible_devices(os.environ, args.processes or max(1, torch.cuda.device_count()))
    command = host_command({"localhost": slots}, 0, "127.0.0.1", args.port or free_port(), arguments, args.debug)
    environment = os.environ | new_job()
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # the launcher would warn that it found no other
    return command_status(Path(cfg.output_dir), lambda: run_launcher(command, environment))
