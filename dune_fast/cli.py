"""`dune-fast`: one command for everything a user runs."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import argcomplete

from dune_fast import __version__, data_cli, evaluate_cli, export_cli, planning_cli, teachers_cli
from dune_fast.completion import complete_overrides

logger = logging.getLogger(__name__)

TRAIN_SCRIPT = Path(__file__).with_name("train.py")


def distill(args: argparse.Namespace) -> int:
    """Launches the training on this machine's accelerators, through DeepSpeed's launcher."""
    return launch_training(args, None)


def resume(args: argparse.Namespace) -> int:
    """Goes on with a run, or finishes it, under the configuration that its folder holds.

    Overrides change what a run may change when it goes on, e.g. deepspeed.zero_stage=2.
    """
    return launch_training(args, args.run)


def launch_training(args: argparse.Namespace, run: Path | None) -> int:
    """Starts the ranks of a new run or, with `run`, of one that goes on; the exit status."""
    import torch

    from dune_fast.engine.launch import free_port
    from dune_fast.train import run_config

    if args.processes < 0:
        raise ValueError(f"--processes is {args.processes}; give how many to start, at least 1")
    run_config(run, args.overrides)  # a wrong configuration is said once, before anything is launched
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--log_level",
        "info" if args.debug else "critical",  # the ranks say what is wrong
        "--num_accelerators",
        str(args.processes or max(1, torch.cuda.device_count())),
    ]
    command += ["--master_port", str(args.port or free_port())]
    command += [str(TRAIN_SCRIPT), *(["--debug"] if args.debug else []), *(["--run", str(run)] if run else [])]
    command += args.overrides  # --config-dir reaches the ranks as a variable
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # the launcher would warn that it found no other
    return run_launcher(command, environment)


def run_launcher(command: list[str], environment: dict[str, str]) -> int:
    """Runs DeepSpeed's launcher to its end, so that the ranks save and end before this process does.

    Ctrl-C reaches all processes of the terminal: everybody ignores it but the launcher's second process, which sends
    SIGTERM to the ranks. SIGTERM and SIGUSR1 may reach this process alone (`kill`, a container's end), which passes
    them on to the ranks.
    """
    import psutil  # the launcher needs it too

    def pass_on(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(launcher.pid)
            ranks = [rank for second in first.children() for rank in second.children()]
            for process in ranks or [*first.children(), first]:
                process.send_signal(number)

    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}  # the launcher inherits it
    try:
        with subprocess.Popen(command, env=environment) as launcher:
            before |= {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
            status = launcher.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if name := ended_by(status):
        logger.error("a process of the run was ended by %s%s", name, _BY_SIGNAL.get(name, ""))
    return status


_BY_SIGNAL = {
    "SIGKILL": ": often the system's, for want of memory (`dmesg` says so); `dune-fast plan` estimates the need",
    "SIGSEGV": ", in compiled code: `dune-fast doctor` looks for packages that do not fit each other",
}


def ended_by(status: int) -> str | None:
    """The signal that ended a rank, from the launcher's exit status; None for a program's own status."""
    number = 256 - status if status > 192 else -status  # the launcher passes on -number, of which a byte is left
    return signal.Signals(number).name if number in set(signal.Signals) else None


def config(args: argparse.Namespace) -> int:
    """Prints the resolved configuration."""
    from omegaconf import OmegaConf

    from dune_fast.engine.config import compose_config

    sys.stdout.write(OmegaConf.to_yaml(OmegaConf.structured(compose_config(args.overrides)), resolve=True))
    return 0


def fetch(args: argparse.Namespace) -> int:
    """Fetches the demo's weights and photographs into the cache."""
    from dune_fast.teachers.assets import ASSETS
    from dune_fast.teachers.assets import fetch as fetch_asset

    for name in args.names or list(ASSETS):
        sys.stdout.write(f"{name}: {fetch_asset(name)}\n")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = argparse.ArgumentParser(prog="dune-fast", description="Multi-teacher distillation of vision encoders.")
    parser.add_argument("--version", action="version", version=f"dune-fast {__version__}")
    add_common_options(parser, False, None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    hydra = {"nargs": "*", "metavar": "OVERRIDE", "help": "Hydra overrides, e.g. experiment=demo train.steps=100"}

    sub = commands.add_parser("distill", help="train a student", description=distill.__doc__)
    sub.add_argument("overrides", **hydra)
    _add_launcher_options(sub)
    sub.set_defaults(run_command=distill)

    sub = commands.add_parser("resume", help="go on with a run", description=resume.__doc__)
    sub.add_argument("run", type=Path, help="folder of the run, e.g. runs/mine")
    sub.add_argument("overrides", **hydra)
    _add_launcher_options(sub)
    sub.set_defaults(run_command=resume)

    evaluate_cli.add_parsers(commands)

    sub = commands.add_parser("config", help="print a configuration", description=config.__doc__)
    sub.add_argument("overrides", **hydra)
    sub.set_defaults(run_command=config)

    sub = commands.add_parser("fetch", help="fetch the demo's assets", description=fetch.__doc__)
    sub.add_argument("names", nargs="*", metavar="NAME", help="assets (default: all)")
    sub.set_defaults(run_command=fetch)

    teachers_cli.add_parser(commands)
    export_cli.add_parser(commands)
    data_cli.add_parser(commands)
    planning_cli.add_parsers(commands)
    for sub in all_commands(commands):
        add_common_options(sub, argparse.SUPPRESS, argparse.SUPPRESS)
        for action in sub._actions:
            if action.dest == "overrides":
                action.completer = complete_overrides
    return parser


def all_commands(commands: argparse._SubParsersAction) -> Iterator[argparse.ArgumentParser]:
    """The parsers of all commands, and of theirs."""
    for sub in commands.choices.values():
        yield sub
        for action in sub._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from all_commands(action)


def add_common_options(parser: argparse.ArgumentParser, debug: object, config_dir: object) -> None:
    """Options that stand before or after the command; the arguments are their defaults."""
    parser.add_argument("--debug", action="store_true", default=debug, help="log more, show tracebacks")
    parser.add_argument(
        "--config-dir", metavar="DIR", default=config_dir, help="a folder of your own files, like configs/"
    )


def _add_launcher_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-n", "--processes", type=int, default=0, help="processes on this machine (default: one a GPU, else one)"
    )
    parser.add_argument("--port", type=int, default=0, help="port of the rendezvous (default: a free one)")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    from dune_fast.engine.launch import set_openmp
    from dune_fast.engine.run_log import setup_logging
    from dune_fast.train import explain_system_error, logger, parse_mixed

    set_openmp(os.environ)  # of this process, and of the ranks that it launches
    parser = build_parser()
    argcomplete.autocomplete(parser)
    args = parse_mixed(parser, argv)
    setup_logging(args.debug, rank=0)
    try:
        return args.run_command(args)
    except ValueError as error:
        logger.error("%s", error, exc_info=args.debug)
        return 2
    except OSError as error:
        if (sentence := explain_system_error(error, "")) is None:
            raise
        logger.error("%s", sentence, exc_info=args.debug)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
