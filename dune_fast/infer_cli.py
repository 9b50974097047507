"""`dune-fast infer seg | depth | mast3r | multihmr`: a head at work on images."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from dune_fast.console import add_command
from dune_fast.teachers.local_paths import local

if TYPE_CHECKING:
    import torch

    from dune_fast.heads.head import Head

EXAMPLES = {
    "seg": """\
examples:
  dune-fast infer seg --images photos --encoder runs/mine --head runs/mine/evaluation/segmentation_ade.head.safetensors
  dune-fast infer seg --images a.jpg b.jpg --encoder dinov2_vitb14 --head seg.head.safetensors --out found
""",
    "depth": """\
examples:
  dune-fast infer depth --images photos --encoder runs/mine --head runs/mine/evaluation/depth_nyu.head.safetensors
  dune-fast infer depth --images a.jpg --encoder dinov2_vitb14 --head dinov2_vitb14_nyu_linear_head.pth --size 336
""",
    "mast3r": """\
examples:
  dune-fast infer mast3r --images a.jpg b.jpg --encoder dune_vitbase14_448_paper --head dunemast3r_cvpr25_vitbase.pth
  dune-fast infer mast3r --images a.jpg b.jpg --encoder runs/mine --head mast3r.safetensors
""",
    "multihmr": """\
examples:
  dune-fast infer multihmr --images photos --encoder runs/mine --head hmr.safetensors --body-model SMPLX_NEUTRAL.npz
""",
}
_KINDS = {"seg": "linear_seg", "depth": "linear_depth", "mast3r": "mast3r", "multihmr": "multihmr"}
"""Subcommand -> kind of its head."""


def dense(args: argparse.Namespace) -> int:
    """Segmentation (colours over the photograph, labels) or depth (millimetres, metres, colours) of each image.

    The head is what `dune-fast evaluate --task segmentation | depth` has trained on the encoder, or one of DINOv2's
    linear heads. Images of any size are read as the evaluation reads them.
    """
    from dune_fast.infer.dense import run
    from dune_fast.infer.files import image_files
    from dune_fast.teacher_files import load_teacher_config

    results = run(
        image_files(args.images), args.encoder, _head(args), args.out, device=_device(args),
        precision=args.precision, size=getattr(args, "size", None), teacher=load_teacher_config,
    )  # fmt: skip
    return _say(args, results)


def _head(args: argparse.Namespace) -> Head:
    """The head on the device; HeadError if it is of another kind than the subcommand."""
    from dune_fast.heads.files import load_head
    from dune_fast.heads.head import HeadError

    head = load_head(args.head, _device(args))
    wanted = _KINDS[args.infer_command]
    if head.kind != wanted:
        fitting = [name for name, kind in _KINDS.items() if kind == head.kind]
        raise HeadError(
            f"{args.head} holds a {head.kind} head, and `infer {args.infer_command}` needs a {wanted} head: use "
            f"`dune-fast infer {fitting[0]}`, or give another head"
        )
    return head


def _device(args: argparse.Namespace) -> torch.device:
    """What --device says, a GPU by default; ValueError for one that is not there."""
    from dune_fast.evaluate.ranks import open_ranks

    with open_ranks(args.device) as ranks:
        return ranks.device


def _say(args: argparse.Namespace, results: list[dict[str, Any]]) -> int:
    """Prints what was found, with --json."""
    if args.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
    return 0


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `infer` and what is below it."""
    parser = commands.add_parser("infer", help="a task head at work on images")
    own = parser.add_subparsers(dest="infer_command", required=True, metavar="HEAD")
    for name, about in (("seg", "segmentation"), ("depth", "depth in metres")):
        sub = _command(own, name, dense, about)
        if name == "depth":
            sub.add_argument("--size", type=int, help="pixels of the short side at which images are read (default: "
                             "their own, at most 480)")  # fmt: skip


def _command(commands: argparse._SubParsersAction, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    """A subcommand with the options that all have."""
    raw = argparse.RawDescriptionHelpFormatter
    sub = add_command(commands, name, run, about, epilog=EXAMPLES[name], formatter_class=raw)
    sub.add_argument("--images", nargs="+", required=True, metavar="PATH", help="files and folders")
    sub.add_argument("--encoder", required=True, metavar="NAME", help="that the head was trained on: a run, a weights "
                     "file, a published name" + ("; or a teacher's name" if run is dense else ""))  # fmt: skip
    sub.add_argument("--head", type=local, required=True, metavar="FILE", help="of ours, or an official container")
    sub.add_argument("--out", type=local, default="inferred", metavar="FOLDER", help="(default: %(default)s)")
    sub.add_argument("--json", action="store_true", help="print what was found as JSON")
    sub.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
    if run is dense:
        precisions = ("auto", "fp32", "bf16")
        sub.add_argument("--precision", choices=precisions, default="auto", help="of the encoder's products")
    return sub
