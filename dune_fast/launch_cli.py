"""`dune-fast launch slurm`: a batch script that trains until the run is done."""

from __future__ import annotations

import argparse
import os
import sys

from dune_fast.console import add_command


def slurm(args: argparse.Namespace) -> int:
    """Prints a batch script for SLURM, or submits it.

    The job saves ahead of its time limit and queues itself again until the run is done. After a node was lost, SLURM
    queues it again; `sbatch --nodes=1 SCRIPT` goes on with fewer nodes.
    """
    from dune_fast.cluster.slurm import Job, script, submit
    from dune_fast.engine.accumulation import micro_batch_size
    from dune_fast.train import run_config

    tasks = args.tasks_per_node or max(1, args.gpus_per_node)
    for name, value, least in (
        ("--nodes", args.nodes, 1), ("--gpus-per-node", args.gpus_per_node, 0), ("--save-ahead", args.save_ahead, 60),
        ("--tasks-per-node", tasks, 1), ("--cpus-per-task", args.cpus_per_task, 0),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name} is {value}; give at least {least}")
    cfg = run_config(None, args.overrides)
    micro_batch_size(cfg, args.nodes * tasks)
    if cfg.train.overwrite:
        raise ValueError("train.overwrite=true would start anew whenever the job is queued again: leave it out")
    job = Job(
        cfg.name, args.nodes, tasks, args.gpus_per_node, args.time, args.partition, args.cpus_per_task,
        args.save_ahead, tuple(args.sbatch),
    )  # fmt: skip
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith("DUNE_FAST_")}
    arguments = [*(["--debug"] if args.debug else []), *args.overrides]
    text = script(job, arguments, cfg.output_dir, variables)
    sys.stdout.write(submit(text) + "\n" if args.submit else text)
    return 0


def add_parser(commands: argparse._SubParsersAction) -> None:
    """The command `launch` and its own commands."""
    parser = commands.add_parser("launch", help="train on a cluster", description=__doc__)
    own = parser.add_subparsers(dest="launch_command", required=True, metavar="COMMAND")
    example = "example: dune-fast launch slurm --nodes 2 --time 24:00:00 experiment=dune_336 > job.sh; sbatch job.sh"
    sub = add_command(own, "slurm", slurm, "a batch script that queues itself again", epilog=example)
    sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra overrides, as of `dune-fast distill`")
    sub.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: %(default)s)")
    help_text = "GPUs of each, a process each (default: %(default)s; 0 trains on CPUs)"
    sub.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help=help_text)
    help_text = "processes on each machine (default: one a GPU)"
    sub.add_argument("--tasks-per-node", type=int, default=0, metavar="N", help=help_text)
    help_text = "processors of each process (default: the cluster's)"
    sub.add_argument("--cpus-per-task", type=int, default=0, metavar="N", help=help_text)
    sub.add_argument("--time", default="", help="limit of one start, e.g. 24:00:00 (default: the partition's)")
    sub.add_argument("--partition", default="", metavar="NAME", help="where it runs (default: the cluster's)")
    help_text = "the run saves so long before the limit (default: %(default)s)"
    sub.add_argument("--save-ahead", type=int, default=300, metavar="SECONDS", help=help_text)
    help_text = "a further option of sbatch, e.g. --sbatch=--account=mine; may be given several times"
    sub.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help=help_text)
    sub.add_argument("--submit", action="store_true", help="give the script to sbatch instead of printing it")
