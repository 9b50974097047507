"""Starts the ranks of a run on this machine or on those of a hostfile."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dune_fast.cluster.ranks import host_command, run_launcher, visible_devices


def launch_training(args: argparse.Namespace, run: Path | None) -> int:
    """Starts the ranks of a new run or, with `run`, of one that goes on; the exit status.

    0 for a run that has finished, `run_state.STOPPED_STATUS` for one that was stopped by a signal and saved.
    """
    import torch

    from dune_fast.engine.launch import free_port, new_job
    from dune_fast.engine.run_state import command_status
    from dune_fast.train import run_config

    if args.processes < 0:
        raise ValueError(f"--processes is {args.processes}; give how many to start, at least 1")
    cfg = run_config(run, args.overrides)  # a wrong configuration is said once, before anything is launched
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
