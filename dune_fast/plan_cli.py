"""`dune-fast plan`: what runs take, what a machine can do, how many machines scale."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from dune_fast.console import add_command

_STEPS = 50
"""Of a calibration."""
_UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12}


def _positive(name: str, value: float | None, example: str) -> None:
    if value is not None and value <= 0:
        raise ValueError(f"--{name} is {value:g}; give {example}")


def disk_size(text: str) -> float:
    """2TB as bytes; ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(MB|GB|TB)", text.upper())
    if not found or float(found[1]) == 0:
        raise ValueError(f"--disk {text}: give a number with MB, GB or TB, e.g. 2TB")
    return float(found[1]) * _UNITS[found[2]]


def plan(args: argparse.Namespace) -> int:
    """Says what runs take: steps, arithmetic, memory, disk and, with --tflops, hours.

    With --gpu or --calibrate: the longest schedule within --hours on --gpus GPUs, its command, and what else the hours
    buy. With --nodes, too: --gpus GPUs in each of so many machines, and what limits them. Every number says how it is
    known: counted from the configuration, measured here, given, or estimated.
    """
    from dune_fast.engine.config import compose_config

    _positive("tflops", args.tflops, "what one device reaches, e.g. 400")
    _positive("hours", args.hours, "a number of hours, e.g. 72")
    _positive("gpu-memory", args.gpu_memory, "GiB, e.g. 24")
    _positive("images", args.images, "how many images the datasets have, e.g. 1281167")
    for count in args.gpus or []:
        if count < 1:
            raise ValueError(f"--gpus is {' '.join(map(str, args.gpus))}; give numbers of devices, e.g. 1 8")
    given = [argument.removeprefix("experiment=") for argument in args.overrides]
    experiments = [name for name in given if "=" not in name]
    overrides = [name for name in given if "=" in name]
    if not experiments:
        raise ValueError("name an experiment, e.g. `dune-fast plan dune_336 dune_448`")
    machines_wanted = args.gpu or args.calibrate or args.hours or args.nodes or args.gpu_memory
    if not machines_wanted and args.json:
        raise ValueError("--json belongs to a plan for a machine: give --gpu NAME or --calibrate, too")
    documents: list[dict[str, Any]] = []
    for name in experiments:
        cfg = compose_config([f"experiment={name}", *overrides])
        if cfg.head.kind:
            raise ValueError(f"{name} trains a head: what it takes is not worked out here, for distillations alone")
        if machines_wanted:
            lines, found = _for_machines(args, cfg, name, overrides)
            documents += found
        else:
            from dune_fast.planner.describe import describe

            lines = describe(cfg, name, args.gpus or [1, 8], args.tflops)
        if not args.json:
            sys.stdout.write("\n".join(lines) + "\n")
    if args.json:
        sys.stdout.write(json.dumps(documents, indent=1) + "\n")
    return 0


def _machine(args: argparse.Namespace, cfg: Any, count: int) -> Any:
    """The GPUs that the arguments are about."""
    from dune_fast.planner.budget import Machine, of_table
    from dune_fast.planner.gpus import find_gpu
    from dune_fast.planner.numbers import GIVEN, Number

    if args.calibrate is not None and (args.gpu or args.tflops):
        raise ValueError("--calibrate measures this machine's device: leave --gpu and --tflops out")
    if args.calibrate is not None:
        from dune_fast.planner.calibrate import calibrate

        _positive("calibrate", args.calibrate, "a number of steps, e.g. 50")
        machine = calibrate(cfg, args.calibrate, count).machine(count)
    elif args.gpu:
        machine = of_table(args.gpu, find_gpu(args.gpu), count)
    elif args.tflops and args.gpu_memory:
        rate = Number(args.tflops, "TFLOP/s", GIVEN)
        machine = Machine("GPU", count, int(args.gpu_memory * 2**30), rate)
    else:
        raise ValueError("which GPU? give --gpu NAME, --calibrate, or --tflops X with --gpu-memory GIB")
    if args.gpu_memory:
        machine = replace(machine, memory=int(args.gpu_memory * 2**30))
    if args.tflops:
        machine = replace(machine, tflops=Number(args.tflops, "TFLOP/s", GIVEN))
    return machine


def _for_machines(
    args: argparse.Namespace, cfg: Any, name: str, overrides: Sequence[str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Lines of text and values for JSON, of one experiment."""
    from dune_fast.planner import output
    from dune_fast.planner.alternatives import alternatives

    disk = None if args.disk is None else disk_size(args.disk)
    lines, documents = [], []
    for count in args.gpus or [8 if args.nodes else 1]:
        machine = _machine(args, cfg, count)
        lines += output.machine_lines(machine)
        about = {"experiment": name, "machine": output.machine_values(machine)}
        if args.nodes:
            more, values = _on_nodes(args, cfg, name, machine)
            lines += more
            documents.append(about | {"nodes": values})
            continue
        found = alternatives(cfg, name, overrides, machine, args.hours, disk, args.image_kb, args.images or 0)
        lines += output.budget_lines(name, args.hours, found)
        documents.append(about | {"hours": args.hours, "plans": [output.alternative_values(plan) for plan in found]})
    return lines, documents


def _on_nodes(args: argparse.Namespace, cfg: Any, name: str, machine: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """Many machines of one kind."""
    from dune_fast.planner import output
    from dune_fast.planner.budget import DECODE_MS, IMAGE_KB, image_flops, mildest, too_small
    from dune_fast.planner.gpus import LINK_SHARE, PCIE_GB_S
    from dune_fast.planner.scale import Cluster, node_counts, scaled

    counts = node_counts(args.nodes)
    found = mildest(cfg, machine.gpus, machine.memory) if cfg.train.global_batch % machine.gpus == 0 else None
    if found is None:
        raise too_small(cfg, name, machine)
    kb = IMAGE_KB if args.image_kb is None else args.image_kb
    inside = machine.table.link if machine.table else PCIE_GB_S
    cluster = Cluster(
        machine.gpus, machine.tflops.value, inside * LINK_SHARE * 1e9, args.network * 1e9 / 8,
        args.storage and args.storage * 1e6, args.cores, kb * 1e3, DECODE_MS / 1e3,
    )  # fmt: skip
    rows = [row for count in counts if (row := scaled(found[0], cluster, image_flops(found[0]), count))]
    if not rows:
        raise ValueError(
            f"{cfg.train.global_batch} images a step cannot be shared by {counts[0]} x {machine.gpus} GPUs"
        )
    taken = [
        f"network {args.network:g} Gbit/s a machine", f"{inside * LINK_SHARE:g} GB/s between its GPUs",
        f"{kb:g} kB an image", f"{DECODE_MS} ms to decode it",
        f"storage {args.storage:g} MB/s" if args.storage else "storage not limited (--storage)",
        f"{args.cores} cores a machine" if args.cores else "decoding not limited (--cores)",
    ]  # fmt: skip
    left = [str(count) for count in counts if cfg.train.global_batch % (count * machine.gpus)]
    lines = output.scale_lines(name, rows, machine.tflops.how, taken)
    if left:
        lines.append(f"  left out: {cfg.train.global_batch} images cannot be shared by {', '.join(left)} nodes")
    return lines, [asdict(row) | {"how": "estimated"} for row in rows]


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `plan`."""
    example = "example: dune-fast plan dune_336 --gpu rtx4090 --gpus 2 --hours 72"
    sub = add_command(commands, "plan", plan, "say what runs will take, or what a machine can do", epilog=example)
    help_text = "experiments and overrides, e.g. dune_336 train.global_batch=256"
    sub.add_argument("overrides", nargs="+", metavar="EXPERIMENT", help=help_text)
    sub.add_argument("--gpus", type=int, nargs="+", default=None, metavar="N", help="GPUs to plan for (default: 1 8)")
    sub.add_argument("--tflops", type=float, default=None, metavar="X", help="plan with X TFLOP/s a device, too")
    sub.add_argument("--gpu", metavar="NAME", help="a GPU of the table, e.g. rtx4090, h100, a100")
    sub.add_argument("--hours", type=float, metavar="H", help="that may be spent (default: the whole recipe)")
    sub.add_argument("--disk", metavar="SIZE", help="that a cache of features may take, e.g. 2TB")
    help_text = "that the datasets have, for a cache (default: what the recipe's datasets are known to have)"
    sub.add_argument("--images", type=int, metavar="N", help=help_text)
    sub.add_argument("--gpu-memory", type=float, metavar="GIB", help="of each GPU (default: the table's)")
    help_text = f"measure this machine's device first, for {_STEPS} steps or STEPS"
    sub.add_argument("--calibrate", type=int, nargs="?", const=_STEPS, metavar="STEPS", help=help_text)
    sub.add_argument("--nodes", metavar="N", help="machines of --gpus GPUs (8), e.g. 4 or 1..32")
    sub.add_argument("--network", type=float, default=100.0, metavar="GBIT", help="of a machine (default: 100 Gbit/s)")
    sub.add_argument("--storage", type=float, metavar="MB", help="MB/s that all machines together read, with --nodes")
    sub.add_argument("--cores", type=int, metavar="N", help="CPU cores of a machine, with --nodes")
    sub.add_argument("--image-kb", type=float, metavar="KB", help="mean size of an image file (default: 110)")
    sub.add_argument("--json", action="store_true", help="as JSON")
