"""`dune-fast evaluate NAME [--task ...]`, `dune-fast features WEIGHTS IMAGES --out FOLDER`, `dune-fast figures RUN`."""

from __future__ import annotations

import argparse
import logging

from dune_fast.console import add_command
from dune_fast.teachers.local_paths import local, local_path

logger = logging.getLogger(__name__)

_TASKS = ("knn", "linear", "segmentation", "depth")
_MEASURED = ("mapfree", "pose", "hmr")  # on predictions: the keys of `evaluate_predictions.TASKS`
_MORE = ("body_model", "pose_method", "long_side")  # options of theirs
_DENSE = ("segmentation", "depth")
_USED_BY = {
    **dict.fromkeys(("head", "predictions", *_MORE), _MEASURED),
    **dict.fromkeys(("size", "batch", "seed", "projector"), _TASKS),
    **dict.fromkeys(("layout", "iterations", "lr", "layers", "depth_scale", "cached", "threads"), _DENSE),
    "classes": _DENSE[:1], "max_depth": _DENSE[1:],
    **dict.fromkeys(("data", "out", "device", "precision"), (*_TASKS, *_MEASURED)),
}  # fmt: skip
"""Option -> the tasks that it is for."""
_FORMATS = ("npy", "safetensors", "parquet")

EVALUATE = """\
examples:
  dune-fast evaluate runs/demo                                          held-out agreement and figures
  dune-fast evaluate runs/demo --task knn --data /data/imagenet         train/CLASS and val/CLASS, or CLASS alone
  dune-fast evaluate dinov2_vits14 --task linear --data /data/pets      a teacher by its name
  dune-fast evaluate runs/mine --task segmentation --projector dino --data /data/ADEChallengeData2016
  dune-fast evaluate runs/mine --task depth --data /data/nyu            nyu_train.txt and nyu_test.txt
  dune-fast evaluate runs/demo --task segmentation --cached 224 --iterations 500 --data own    quick, on a CPU
  torchrun --nproc-per-node 8 -m dune_fast evaluate runs/mine --task knn --data /data/imagenet
  dune-fast evaluate --task mapfree --data /data/mapfree/val --predictions submission.zip
  dune-fast evaluate runs/mine --task mapfree --head mast3r.safetensors --data /data/mapfree/val
  dune-fast evaluate --task pose --data pairs.txt --predictions poses.txt
  dune-fast evaluate --task hmr --data /data/people/val --predictions found --body-model SMPLX_NEUTRAL.npz

layouts of segmentation and depth (labels: PNG, 255 for none; depths: PNG of 16 bits in mm, or .npy in metres):
  ade20k      images/{training,validation}, annotations/{training,validation}
  cityscapes  leftImg8bit/{train,val}, gtFine/{train,val}
  nyud        nyu_train.txt and nyu_test.txt: an image and its target a line
  scannet     SCENE/{color,depth,label}; scannetv2_{train,val}.txt name the scenes
  plain       images/{train,val}, labels/{train,val} or depth/{train,val}; or train.txt and val.txt as nyud

predictions and truth:
  mapfree     a folder or zip of pose_SCENE.txt: frame qw qx qy qz tx ty tz confidence; DATA is the benchmark's folder
  pose        both: lines `first second qw qx qy qz tx ty tz`, two images and the pose of the second camera
  hmr         both: folders of people files, NAME.npz of NAME.jpg, as `dune-fast infer multihmr` writes them
"""
FEATURES = """\
examples:
  dune-fast features runs/demo /path/to/images --out features
  dune-fast features dune_vitbase14_448 list.txt --out f --tokens patch --dtype fp16 --format safetensors
  dune-fast features encoder.safetensors '/data/train-{0000..0146}.tar' --out f --size 336 --batch 128
"""

FIGURES = """\
examples:
  dune-fast figures runs/demo                                           runs/demo/figures/ and runs/demo/report.html
  dune-fast figures runs/demo --data /data/photos asset:foolbox --images 100
  dune-fast figures runs/demo --out /tmp/demo                           figures and report in that folder
"""


def evaluate(args: argparse.Namespace) -> int:
    """Held-out agreement and figures of a finished run; with --task, a frozen encoder on labelled images.

    k-NN and linear classification read cls and the mean patch; features are computed once and kept in the cache folder.
    Segmentation and depth train a linear head by the published recipe. An interrupted evaluation goes on where it was.
    mapfree and pose measure a file of poses, or those that an encoder and its MASt3R head make of the images; hmr the
    people that a Multi-HMR head finds.
    """
    from dune_fast.evaluate.task import TaskOptions

    fields = TaskOptions.__dataclass_fields__
    defaults = {name: field.default for name, field in fields.items()} | {"data": ""}  # None for the other options
    cure = "leave it out" if args.task else "leave it out, or give --task"
    for name, tasks in _USED_BY.items():
        if args.task not in tasks and getattr(args, name) != defaults.get(name):
            raise ValueError(f"--{name.replace('_', '-')} is for the tasks {', '.join(tasks)}: {cure}")
    if args.task and args.no_figures:
        raise ValueError("--no-figures is for the evaluation of a run: leave it out with --task")
    if args.task in _MEASURED:
        from dune_fast.evaluate_predictions import run_measured

        run_measured(
            args.task, args.run, args.data, args.predictions, args.head, args.out, args.device, args.precision,
            {name: getattr(args, name) for name in _MORE},
        )  # fmt: skip
        return 0
    if not args.run:
        raise ValueError(
            f"--task {args.task} evaluates an encoder: give it first" if args.task else "give a run, e.g. runs/demo"
        )
    if not args.task:
        from dune_fast.evaluate.run import evaluate_run

        evaluate_run(local_path(args.run, "the run"), figures=not args.no_figures)
        return 0
    from dune_fast.engine.run_log import setup_logging
    from dune_fast.evaluate.ranks import open_ranks
    from dune_fast.evaluate.task import run_task
    from dune_fast.teacher_files import load_teacher_config

    options = TaskOptions(**{name: getattr(args, name) for name in fields})
    with open_ranks(args.device) as ranks:
        if ranks.rank:
            setup_logging(args.debug, ranks.rank)  # the others say what is wrong, nothing else
        run_task(args.run, options, args.out, ranks, load_teacher_config)
    return 0


def features(args: argparse.Namespace) -> int:
    """Features of images: cls, mean patch token, patch grid, one row an image, with the images' names beside them.

    Images are resized by their shorter side and cut to a square, as in a run's evaluation. The same command goes on
    after an interruption.
    """
    from dune_fast.engine.run_log import setup_logging
    from dune_fast.evaluate.feature_files import check_format, images_of, write_features
    from dune_fast.evaluate.model import check_size, open_model
    from dune_fast.evaluate.ranks import open_ranks
    from dune_fast.teacher_files import load_teacher_config

    check_format(args.format)
    with open_ranks(args.device) as ranks:
        if ranks.rank:
            setup_logging(args.debug, ranks.rank)  # the others say what is wrong, nothing else
        images = images_of(args.images, args.pattern)
        model = open_model(
            args.weights, ranks.device, teacher=load_teacher_config, projector=args.projector, precision=args.precision
        )
        tokens = args.tokens or (["cls", "mean"] if model.has_cls else ["mean"])
        size = check_size(model, args.size)
        done = write_features(model, images, args.out, size, tokens, args.dtype, args.format, args.batch, ranks)
    shapes = ", ".join(f"{token} {shape}" for token, shape in done["shapes"].items())
    logger.info("%s: %s of %d px, %s", args.out, shapes, size, args.dtype)
    return 0


def figures(args: argparse.Namespace) -> int:
    """Figures of a run as PNG, their numbers as CSV, and report.html, one file that holds them all.

    Curves of the losses, teachers' keep rates, correlation of the losses' changes; PCA maps of teachers and student,
    attention maps, explained variance of features and projections. The run may still be going on.
    """
    from dune_fast.evaluate.draw import draw_run
    from dune_fast.evaluate.ranks import open_ranks

    with open_ranks(args.device) as ranks:
        if ranks.rank == 0:
            for path in draw_run(args.run, args.out, args.data, args.images, ranks.device):
                logger.info("%s", path)
    return 0


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """The commands `evaluate`, `features` and `figures`."""
    raw = argparse.RawDescriptionHelpFormatter
    about = "evaluate a run or any encoder"
    sub = add_command(commands, "evaluate", evaluate, about, epilog=EVALUATE, formatter_class=raw)
    sub.add_argument("run", nargs="?", default="", help="folder of a run, e.g. runs/demo; with --task also a weights "
                     "file, an export, a published name, a teacher's name; with --predictions none")  # fmt: skip
    sub.add_argument("--no-figures", action="store_true", help="without --task: numbers only")
    task = sub.add_argument_group("tasks")
    task.add_argument("--task", choices=(*_TASKS, *_MEASURED), help="what to evaluate on")
    task.add_argument("--data", default="", metavar="FOLDER", help="knn, linear: class folders (or a list, shards, "
                      "asset:NAME); segmentation, depth: one of the layouts; the others: the truth")  # fmt: skip
    task.add_argument("--out", type=local, metavar="FILE", help="result as JSON (default: RUN/evaluation/...json)")
    task.add_argument("--projector", default="", metavar="TEACHER", help="read this teacher's projector of a student")
    task.add_argument("--size", type=int, help="side of the images in pixels (default: the encoder's; segmentation: "
                      "512, of crops and windows; depth: 416, height of crops)")  # fmt: skip
    task.add_argument("--batch", type=int, help="images (default: 32 at a time; of a training step 16, over all "
                      "processes)")  # fmt: skip
    task.add_argument("--seed", type=int, default=0, help="of splits and heads (default: %(default)s)")
    _add_machine_options(task)
    measured = sub.add_argument_group("mapfree, pose and hmr")
    measured.add_argument("--predictions", type=local, metavar="FILE", help="to measure, in place of an encoder")
    measured.add_argument("--head", type=local, metavar="FILE", help="on the encoder, which makes the predictions: a "
                          "file of ours or an official container")  # fmt: skip
    measured.add_argument("--body-model", type=local, metavar="FILE", help="hmr: the user's SMPLX_NEUTRAL.npz, where "
                          "files hold no vertices")  # fmt: skip
    measured.add_argument("--pose-method", metavar="NAME", help="pnp or essential (default: pnp)")
    measured.add_argument("--long-side", type=int, metavar="PX", help="of the images that the head sees, a multiple of "
                          "the patch (default: about 512)")  # fmt: skip
    dense = sub.add_argument_group("segmentation and depth")
    dense.add_argument("--layout", default="", metavar="NAME", help="ade20k, cityscapes, nyud, scannet or plain "
                       "(default: what the folder looks like)")  # fmt: skip
    dense.add_argument("--iterations", type=int, help="steps of the head's training (default: 40,000 and 38,400)")
    dense.add_argument("--lr", type=float, help="learning rate (default: 1e-3 and 1e-4)")
    dense.add_argument("--layers", type=int, choices=(1, 4), default=1, help="blocks that the head reads")
    dense.add_argument("--classes", type=int, default=0, help="of labels (default: the layout's, or as labels say)")
    dense.add_argument("--max-depth", type=float, default=10.0, metavar="M", help="metres (default: %(default)s)")
    dense.add_argument("--depth-scale", type=float, default=1000.0, metavar="N", help="units of a depth PNG in a metre "
                       "(default: %(default)s)")  # fmt: skip
    dense.add_argument("--cached", type=int, default=0, metavar="SIZE", help="train and evaluate on squares of this "
                       "size whose tokens are computed once: quick, not the published protocol")  # fmt: skip
    dense.add_argument("--threads", type=int, default=4, help="that read and cut images (default: %(default)s)")

    sub = add_command(commands, "features", features, "features of images", epilog=FEATURES, formatter_class=raw)
    sub.add_argument("weights", help="folder of a run, weights file, export, published name or teacher's name")
    sub.add_argument("images", help="folder, glob, text file of paths, shards, tar files or asset:NAME")
    sub.add_argument("--out", type=local, required=True, metavar="FOLDER", help="gets the files")
    sub.add_argument("--tokens", nargs="+", choices=("cls", "mean", "patch"), help="(default: cls mean)")
    sub.add_argument("--format", choices=_FORMATS, default="npy", help="(default: %(default)s; parquet needs pyarrow)")
    sub.add_argument("--dtype", choices=("fp16", "fp32"), default="fp32", help="of the features (default: %(default)s)")
    sub.add_argument("--size", type=int, help="side of the images in pixels (default: the encoder's)")
    sub.add_argument("--batch", type=int, default=32, help="images at a time (default: %(default)s)")
    sub.add_argument("--pattern", default="", metavar="GLOB", help="images below the folder, such as 'train/**/*.png'")
    sub.add_argument("--projector", default="", metavar="TEACHER", help="read this teacher's projector of a student")
    _add_machine_options(sub)

    about = "figures and a report of a run"
    sub = add_command(commands, "figures", figures, about, epilog=FIGURES, formatter_class=raw)
    sub.add_argument("run", type=local, help="folder of a run, e.g. runs/demo")
    sub.add_argument("--out", type=local, metavar="FOLDER", help="for figures and report (default: RUN/figures, and "
                     "the report in RUN)")  # fmt: skip
    sub.add_argument("--data", nargs="+", default=[], metavar="IMAGES", help="folders, lists, globs, shards or "
                     "asset:NAME in place of the run's held-out images")  # fmt: skip
    sub.add_argument("--images", type=int, default=256, metavar="N", help="of each dataset, for explained variance "
                     "(default: %(default)s)")  # fmt: skip
    sub.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU where there is one)")


def _add_machine_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
    precisions = ("auto", "fp32", "bf16")
    parser.add_argument("--precision", choices=precisions, default="auto", help="of the encoder's products")
