"""`dune-fast heads train | check`: task heads on a frozen encoder."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from dune_fast import launcher
from dune_fast.console import add_command, console, in_colour


def train(args: argparse.Namespace) -> int:
    """Trains a task head on a frozen encoder, with the engine of the distillation: the same folder, checkpoints, ranks,
    logs and resumption. The head is written to head.safetensors in the run's folder.
    """
    return launcher.launch_training(args, None, head=True)


def check(args: argparse.Namespace) -> int:
    """Says what the training of a head needs and does not find, and where to ask for it; reads some of its examples.

    Exit status 1 if something is missing or cannot be read.
    """
    from dune_fast.tasks.run import doubts, needs
    from dune_fast.train import run_config

    cfg = run_config(None, args.overrides)
    launcher.check_kind(cfg, head=True)
    found, out = needs(cfg), console()
    for what, where, ask in found:
        out.print(in_colour("fail ", "fail").append(f" {what}"))
        out.print(f"      {where}", markup=False)
        out.print(f"      -> {ask}", markup=False)
    wrong = [] if found else doubts(cfg)
    for sentence in wrong:
        out.print(in_colour("warn ", "warn").append(f" {sentence}"))
    if not found and not wrong:
        out.print(in_colour(f"nothing is missing to train {cfg.name}", "ok"))
    return 1 if found or wrong else 0


def add_parser(
    commands: argparse._SubParsersAction, add_launcher_options: Callable[[argparse.ArgumentParser], None]
) -> None:
    """The command `heads` and its own commands."""
    parser = commands.add_parser("heads", help="train task heads on a frozen encoder", description=__doc__)
    own = parser.add_subparsers(dest="heads_command", required=True, metavar="COMMAND")
    example = "example: dune-fast heads train experiment=seg_ade20k head.encoder=runs/mine head.data.root=ade20k"
    sub = add_command(own, "train", train, "train a head", epilog=example)
    sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra overrides, e.g. experiment=seg_ade20k")
    add_launcher_options(sub)
    sub = add_command(own, "check", check, "what a head's training needs and does not find")
    sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra overrides, e.g. experiment=seg_ade20k")
