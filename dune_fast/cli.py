"""`dune-fast`: one command for everything a user runs.

    eval "$(register-python-argcomplete dune-fast)"      in ~/.bashrc or ~/.zshrc: TAB offers experiments and fields
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator

import argcomplete

from dune_fast import (
    __version__,
    cache_cli,
    data_cli,
    evaluate_cli,
    heads_cli,
    infer_cli,
    launch_cli,
    launcher,
    plan_cli,
    teachers_cli,
)
from dune_fast.console import add_command, console, in_colour
from dune_fast.engine.overrides import config_names
from dune_fast.export import TARGETS
from dune_fast.teachers.local_paths import local

logger = logging.getLogger(__name__)

_GROUPS = ("experiment", "data", "student", "projector", "deepspeed")
"""Folders of `configs/` from which an override chooses one file."""


def distill(args: argparse.Namespace) -> int:
    """Launches the training on this machine's accelerators, or on those of the machines of a hostfile."""
    return launcher.launch_training(args, None)


def resume(args: argparse.Namespace) -> int:
    """Goes on with a run, or finishes it, under the configuration that its folder holds.

    Overrides change what a run may change when it goes on, e.g. deepspeed.zero_stage=2.
    """
    return launcher.launch_training(args, args.run)


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


def export(args: argparse.Namespace) -> int:
    """Writes a trained encoder in another library's format, reads it back with that library and compares."""
    from dune_fast.export.check import LIMIT
    from dune_fast.export.run import export

    exported = export(args.run, args.to, args.output)
    for path in exported.files:
        logger.info("%s", path)
    logger.info(
        "%s: read back, the largest difference is %.1e of the output's largest value (at most %.0e is allowed)",
        exported.target, exported.difference, LIMIT,
    )  # fmt: skip
    for note in exported.notes:
        logger.info("%s", note)
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Checks this machine and, with overrides, what an experiment needs; one line a check: ok, warn or fail.

    Exit status 1 if a check fails.
    """
    from dune_fast.doctor import FAIL, OK, Finding, examine, machine
    from dune_fast.engine.config import ConfigError, compose_config

    def findings() -> Iterator[Finding]:
        yield from examine(machine.checks())
        if not args.overrides:
            return
        try:
            cfg = compose_config(args.overrides)
        except ConfigError as error:
            cure = "correct the overrides; `dune-fast config experiment=demo` prints all fields"
            yield Finding("configuration", FAIL, str(error), cure)
            return
        from dune_fast.doctor import run  # imports what the machine may lack

        yield from examine(run.checks(cfg))

    out, failed = console(), 0
    for finding in findings():
        failed += finding.status == FAIL
        out.print(in_colour(f"{finding.status:<5}", finding.status).append(f"{finding.name:<15} {finding.text}"))
        if finding.status != OK:
            out.print(f"{'':<21}-> {finding.cure}", markup=False)
    out.print(in_colour(f"{failed} failed", FAIL) if failed else in_colour("nothing failed", OK))
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = argparse.ArgumentParser(prog="dune-fast", description="Multi-teacher distillation of vision encoders.")
    parser.add_argument("--version", action="version", version=f"dune-fast {__version__}")
    _add_common_options(parser, False, None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    hydra = {"nargs": "*", "metavar": "OVERRIDE", "help": "Hydra overrides, e.g. experiment=demo train.steps=100"}

    sub = add_command(commands, "distill", distill, "train a student")
    sub.add_argument("overrides", **hydra)
    _add_launcher_options(sub)

    sub = add_command(commands, "resume", resume, "go on with a run")
    sub.add_argument("run", type=local, help="folder of the run, e.g. runs/mine")
    sub.add_argument("overrides", **hydra)
    _add_launcher_options(sub)

    heads_cli.add_parser(commands, _add_launcher_options)
    launch_cli.add_parser(commands)

    evaluate_cli.add_parsers(commands)
    infer_cli.add_parser(commands)

    sub = add_command(commands, "config", config, "print a configuration")
    sub.add_argument("overrides", **hydra)

    sub = add_command(commands, "fetch", fetch, "fetch the demo's assets")
    sub.add_argument("names", nargs="*", metavar="NAME", help="assets (default: all)")

    teachers_cli.add_parser(commands)

    sub = add_command(commands, "export", export, "a trained encoder for other libraries")
    sub.add_argument("run", help="folder of a run or of a checkpoint, a weights file, or a published name")
    listed = "; ".join(f"{name}: {what}" for name, what in TARGETS.items())
    sub.add_argument("--to", required=True, metavar="TARGET", help=listed)
    sub.add_argument("--output", type=local, help="folder for the files (default: RUN/export/TARGET)")

    data_cli.add_parser(commands)
    cache_cli.add_parser(commands)

    sub = add_command(commands, "doctor", doctor, "check the machine and an experiment")
    sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="e.g. experiment=dune_336 (none: the machine)")

    plan_cli.add_parser(commands)

    for sub in all_commands(commands):
        _add_common_options(sub, argparse.SUPPRESS, argparse.SUPPRESS)
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


def _add_common_options(parser: argparse.ArgumentParser, debug: object, config_dir: object) -> None:
    """Options that stand before or after the command; the arguments are their defaults."""
    parser.add_argument("--debug", action="store_true", default=debug, help="log more, show tracebacks")
    help_text = "a folder of your own files, like configs/"
    parser.add_argument("--config-dir", metavar="DIR", default=config_dir, help=help_text)


def _add_launcher_options(parser: argparse.ArgumentParser) -> None:
    help_text = "processes on this machine (default: one a GPU, else one)"
    parser.add_argument("-n", "--processes", type=int, default=0, help=help_text)
    parser.add_argument("--port", type=int, default=0, help="port of the rendezvous (default: a free one)")
    help_text = "run on the machines of this file, reached by ssh: a line `name slots=8` each"
    parser.add_argument("-H", "--hostfile", type=local, default=None, metavar="FILE", help=help_text)
    help_text = "of the hostfile, leave out machines that do not answer"
    parser.add_argument("--missing-hosts", action="store_true", help=help_text)
    help_text = "where the others reach the first machine (default: an address that they all do)"
    parser.add_argument("--master-addr", default="", metavar="ADDRESS", help=help_text)


def complete_overrides(prefix: str, **_: object) -> list[str]:
    """Overrides that begin with `prefix`: "experiment=" with all its names, or fields up to their equals sign."""
    from dune_fast.engine.config import RunConfig
    from dune_fast.engine.overrides import field_names

    group, equals, _value = prefix.partition("=")
    if equals:
        offered = [f"{group}={name}" for name in sorted(config_names(group))] if group in _GROUPS else []
    else:
        offered = [f"{name}=" for name in sorted({*_GROUPS, *field_names(RunConfig)})]
    return [text for text in offered if text.startswith(prefix)]


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
