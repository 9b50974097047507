"""`dune-fast heads train | check | bedlam`: task heads on a frozen encoder, and their data."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from dune_fast import launcher
from dune_fast.console import add_command, console, in_colour
from dune_fast.teachers.local_paths import local


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


def bedlam(args: argparse.Namespace) -> int:
    """Writes BEDLAM's labels as people files, with links to its images beside them: training data of multihmr.

    Images of close-ups, which lie on their side, are turned and written anew. Once a split: OUT is DATA/train or
    DATA/val, and head.data.root=DATA.
    """
    from dune_fast.heads.multihmr.bedlam_files import convert

    count = convert(args.labels, args.images, args.out, args.every)
    console().print(f"{count:,} images with people files in {args.out}", markup=False)
    return 0


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
    sub = add_command(own, "bedlam", bedlam, "BEDLAM's labels as people files")
    help_text = "of a split's processed labels, SCENE.npz"
    sub.add_argument("--labels", type=local, required=True, metavar="FOLDER", help=help_text)
    help_text = "of its images, SCENE_6fps/png/SEQUENCE/NAME.png"
    sub.add_argument("--images", type=local, required=True, metavar="FOLDER", help=help_text)
    sub.add_argument("--out", type=local, required=True, metavar="FOLDER", help="DATA/train or DATA/val")
    help_text = "take every N-th image of a scene (default: %(default)s; published validation: 25)"
    sub.add_argument("--every", type=int, default=1, metavar="N", help=help_text)
