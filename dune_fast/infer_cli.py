"""`dune-fast infer seg | depth | mast3r | multihmr`: a head at work on images."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from dune_fast.console import add_command
from dune_fast.teachers.local_paths import local

_EXAMPLES = {
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
  dune-fast infer mast3r --images a.jpg b.jpg --encoder runs/mine --head head.safetensors --intrinsics 590 590 270 360
""",
    "multihmr": """\
examples:
  dune-fast infer multihmr --images photos --encoder runs/mine --head hmr.safetensors --body-model SMPLX_NEUTRAL.npz
  dune-fast infer multihmr --images a.jpg --encoder runs/mine --head hmr.safetensors --body-model bodies --fov 75
""",
}


def dense(args: argparse.Namespace) -> int:
    """Segmentation (colours over the photograph, labels) or depth (millimetres, metres, colours) of each image.

    The head is what `dune-fast evaluate --task segmentation | depth` has trained on the encoder, or one of DINOv2's
    linear heads. Images of any size are read as the evaluation reads them.
    """
    from dune_fast.infer.dense import run
    from dune_fast.infer.files import image_files
    from dune_fast.infer.opening import open_device, open_head
    from dune_fast.teacher_files import load_teacher_config

    kind = {"seg": "linear_seg", "depth": "linear_depth"}[args.infer_command]
    head = open_head(args.head, kind, args.device)
    return _say(args, run(
        image_files(args.images), args.encoder, head, args.out, device=open_device(args.device),
        precision=args.precision, size=getattr(args, "size", None), teacher=load_teacher_config,
    ))  # fmt: skip


def mast3r(args: argparse.Namespace) -> int:
    """Points, matches and the relative pose of two photographs by a MASt3R head.

    The head is one of ours, MASt3R's or DUNE-MASt3R's. Intrinsics make the pose better; without them focal lengths are
    read off the points.
    """
    from dune_fast.infer.files import image_files
    from dune_fast.infer.mast3r import run
    from dune_fast.infer.opening import open_encoder, open_head

    images, head = image_files(args.images), open_head(args.head, "mast3r", args.device)
    encoder = open_encoder(args.encoder, head, args.precision)
    return _say(args, run(
        images, encoder, head, args.out, intrinsics=_intrinsics(args), pose_method=args.pose_method,
        long_side=args.long_side, step=args.step, confidence=args.confidence,
        points_confidence=args.points_confidence,
    ))  # fmt: skip


def multihmr(args: argparse.Namespace) -> int:
    """The people of photographs as SMPL-X bodies, by a Multi-HMR head.

    The head is one of ours or Multi-HMR's. The body model is the user's own: SMPLX_NEUTRAL.npz, which is free for
    research after registration at https://smpl-x.is.tue.mpg.de.
    """
    from dune_fast.infer.files import image_files
    from dune_fast.infer.multihmr import run
    from dune_fast.infer.opening import open_encoder, open_head

    images, head = image_files(args.images), open_head(args.head, "multihmr", args.device)
    encoder = open_encoder(args.encoder, head, args.precision)
    return _say(args, run(
        images, encoder, head, args.body_model, args.out, threshold=args.threshold, nms=args.nms, fov=args.fov,
        intrinsics=_intrinsics(args), meshes=not args.no_meshes,
    ))  # fmt: skip


def _intrinsics(args: argparse.Namespace) -> Any:
    """[3, 3] of --intrinsics, [2, 3, 3] of those of two photographs, None without it. ValueError for other counts."""
    if args.intrinsics is None:
        return None
    import numpy as np

    count = len(args.intrinsics)
    if count not in (4, 8):
        raise ValueError(f"--intrinsics has {count} numbers: give FX FY CX CY, of both photographs or of each")
    found = [[[fx, 0, cx], [0, fy, cy], [0, 0, 1]] for fx, fy, cx, cy in np.reshape(args.intrinsics, (-1, 4))]
    return np.array(found[0] if count == 4 else found)


def _say(args: argparse.Namespace, results: list[dict[str, Any]]) -> int:
    """Prints what was found, with --json."""
    if args.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
    return 0


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `infer` and what is below it."""
    parser = commands.add_parser("infer", help="a task head at work on images", description=__doc__)
    own = parser.add_subparsers(dest="infer_command", required=True, metavar="HEAD")
    _command(own, "seg", dense, "segmentation")
    sub = _command(own, "depth", dense, "depth in metres")
    help_text = "pixels of the short side at which images are read (default: their own, at most 480)"
    sub.add_argument("--size", type=int, help=help_text)

    sub = _command(own, "mast3r", mast3r, "points, matches and the pose of two photographs")
    sub.add_argument("--pose-method", default="pnp", metavar="NAME", help="pnp or essential (default: %(default)s)")
    help_text = "of the resized images, a multiple of the patch (default: about 512)"
    sub.add_argument("--long-side", type=int, metavar="PX", help=help_text)
    sub.add_argument("--step", type=int, default=8, metavar="PX", help="between pixels that matching starts from")
    sub.add_argument("--confidence", type=float, default=1.001, help="of a match, at least (default: %(default)s)")
    help_text = "of a point in points.ply, at least (default: %(default)s)"
    sub.add_argument("--points-confidence", type=float, default=1.5, help=help_text)
    help_text = "FX FY CX CY of both photographs, in their pixels; of each, eight numbers, where their sizes differ"
    sub.add_argument("--intrinsics", type=float, nargs="+", metavar="N", help=help_text)

    sub = _command(own, "multihmr", multihmr, "people as SMPL-X bodies")
    help_text = "SMPLX_NEUTRAL.npz, or its folder"
    sub.add_argument("--body-model", type=local, required=True, metavar="FILE", help=help_text)
    help_text = "score from which a patch holds a person (default: %(default)s)"
    sub.add_argument("--threshold", type=float, default=0.3, help=help_text)
    help_text = "patches of the neighbourhood in which one person is found (default: %(default)s)"
    sub.add_argument("--nms", type=int, default=3, metavar="N", help=help_text)
    help_text = "field of view of the longer side, without --intrinsics (default: %(default)s)"
    sub.add_argument("--fov", type=float, default=60.0, metavar="DEGREES", help=help_text)
    sub.add_argument("--no-meshes", action="store_true", help="write no OBJ files")
    names = ("FX", "FY", "CX", "CY")
    sub.add_argument("--intrinsics", type=float, nargs=4, metavar=names, help="of the photographs, in their pixels")


def _command(commands: argparse._SubParsersAction, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    """A subcommand with the options that all have."""
    raw, more = argparse.RawDescriptionHelpFormatter, "; or a teacher's name" if run is dense else ""
    sub = add_command(commands, name, run, about, epilog=_EXAMPLES[name], formatter_class=raw)
    sub.add_argument("--images", nargs="+", required=True, metavar="PATH", help="files and folders")
    help_text = f"that the head was trained on: a run, a weights file, a published name{more}"
    sub.add_argument("--encoder", required=True, metavar="NAME", help=help_text)
    sub.add_argument("--head", type=local, required=True, metavar="FILE", help="of ours, or an official container")
    sub.add_argument("--out", type=local, default="inferred", metavar="FOLDER", help="(default: %(default)s)")
    sub.add_argument("--json", action="store_true", help="print what was found as JSON")
    sub.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
    choices = ("auto", "fp32", "bf16")
    sub.add_argument("--precision", choices=choices, default="auto", help="of the encoder's products")
    return sub
