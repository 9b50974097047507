"""`dune-fast doctor` and `dune-fast plan`: before a run is started."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.text import Text

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(args: argparse.Namespace) -> int:
    """Checks this machine and, with overrides, what an experiment needs; one line a check: ok, warn or fail.

    Exit status 1 if a check fails.
    """
    from dune_fast.doctor import FAIL, OK, Finding, examine, machine
    from dune_fast.engine.config import ConfigError, compose_config

    console = Console(highlight=False, soft_wrap=True)
    failed = 0

    def show(finding: Finding) -> None:
        nonlocal failed
        failed += finding.status == FAIL
        line = Text.assemble((f"{finding.status:<5}", _COLOURS[finding.status]), f"{finding.name:<15} {finding.text}")
        console.print(line)
        if finding.status != OK:
            console.print(f"{'':<21}-> {finding.cure}", markup=False)

    for finding in examine(machine.checks()):
        show(finding)
    if args.overrides:
        try:
            cfg = compose_config(args.overrides)
        except ConfigError as error:
            cure = "correct the overrides; `dune-fast config experiment=demo` prints all fields"
            show(Finding("configuration", FAIL, str(error), cure))
        else:
            from dune_fast.doctor import run

            for finding in examine(run.checks(cfg)):
                show(finding)
    console.print(f"{failed} failed" if failed else "nothing failed", style="bold red" if failed else "green")
    return 1 if failed else 0


def plan(args: argparse.Namespace) -> int:
    """Says what runs will take: steps, arithmetic, memory, disk and, on devices that were measured, hours."""
    from dune_fast.engine.config import compose_config
    from dune_fast.plan import describe

    if args.tflops is not None and args.tflops <= 0:
        raise ValueError(f"--tflops is {args.tflops:g}; give what one device reaches, e.g. 400")
    if min(args.gpus) < 1:
        raise ValueError(f"--gpus is {' '.join(map(str, args.gpus))}; give numbers of devices, e.g. 1 8")
    given = [argument.removeprefix("experiment=") for argument in args.overrides]
    experiments = [name for name in given if "=" not in name]
    overrides = [name for name in given if "=" in name]
    if not experiments:
        raise ValueError("name an experiment, e.g. `dune-fast plan dune_336 dune_448`")
    for name in experiments:
        cfg = compose_config([f"experiment={name}", *overrides])
        sys.stdout.write("\n".join(describe(cfg, name, args.gpus, args.tflops)) + "\n")
    return 0


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """The commands `doctor` and `plan`."""
    sub = commands.add_parser("doctor", help="check the machine and an experiment", description=doctor.__doc__)
    sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="e.g. experiment=dune_336 (none: the machine)")
    sub.set_defaults(run_command=doctor)

    sub = commands.add_parser("plan", help="say what runs will take", description=plan.__doc__)
    help_text = "experiments and overrides, e.g. dune_336 train.global_batch=256"
    sub.add_argument("overrides", nargs="+", metavar="EXPERIMENT", help=help_text)
    sub.add_argument("--gpus", type=int, nargs="+", default=[1, 8], metavar="N", help="devices to plan for (1 8)")
    sub.add_argument("--tflops", type=float, default=None, metavar="X", help="plan with X TFLOP/s a device, too")
    sub.set_defaults(run_command=plan)
