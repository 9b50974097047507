"""`dune-fast data shard | check | list-keys`: the images of a run, before it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dune_fast.console import add_command, console, in_colour, table
from dune_fast.dali_pipelines.datasets import DataConfig, DataError
from dune_fast.teachers.local_paths import local


def _chosen(args: argparse.Namespace) -> tuple[DataConfig, list[str]]:
    """The images' configuration, and the names of those datasets that are meant."""
    from dune_fast.engine.config import ConfigError, compose_config

    data = compose_config(args.overrides, complete=False).data
    names = args.only or sorted(data.datasets)
    if unknown := sorted(set(names) - set(data.datasets)):
        known = ", ".join(sorted(data.datasets)) or "none; name them, for instance with data=dune"
        raise ConfigError(f"--only {' '.join(unknown)}: no such dataset is configured, there are: {known}")
    if not names:
        raise ConfigError("no dataset is configured: choose data=dune, data=in1k, or data=folder with its root")
    return data, names


def shard(args: argparse.Namespace) -> int:
    """Turns datasets into tar shards (WebDataset) with a binary index and a manifest, one folder a dataset.

    Every image is decoded once, as in a run; broken ones are left out and listed in quarantine.jsonl. JPEGs are copied
    byte for byte, what DALI does not take becomes a JPEG (quality 95, 4:4:4). After an interruption the same command
    goes on where it was; the result does not depend on the number of workers. Read the shards with data=dune_shards or
    data=shards.
    """
    from dune_fast.dali_pipelines.sharding import ShardSettings, shard_dataset

    data, names = _chosen(args)
    rows = table("dataset", "split", "images", "broken", "shards", "MB")
    for name in names:
        shorter_side = args.shorter_side or data.datasets[name].shrink
        settings = ShardSettings(args.megabytes, shorter_side, args.seed, args.turned_canvas)
        manifest = shard_dataset(name, data, args.out / name, settings, args.workers)
        for split in manifest.splits:
            size = sum(entry.bytes for entry in split.shards) / 1e6
            row = split.name, f"{split.images:,}", str(split.broken), str(len(split.shards)), f"{size:,.1f}"
            rows.add_row(name, *row)
    console().print(rows)
    return 0


def check(args: argparse.Namespace) -> int:
    """Says of every dataset what is there and what is missing, and decodes some of its images.

    Counts are compared with the expected ones of the configuration. The status is 1 if a dataset cannot be used, lacks
    more than 1 % of its images, or has too many broken ones; the others are checked all the same.
    """
    from dune_fast.dali_pipelines.check import FAIL, check_dataset

    data, names = _chosen(args)
    sample = None if args.decode_all else args.sample
    out = console()
    out.width = max(out.width, 120)  # rather lines that wrap than names that are cut
    rows = table("dataset", "group", "status", "train", "val", "decoded", "broken", "pixels")
    reports = [check_dataset(name, data, sample, args.full, args.seed) for name in names]
    for report in reports:
        own, (width, height) = data.datasets[report.name], report.median
        found = (report.train, own.expected_train), (report.val, own.expected_val)
        counts = [f"{count:,}" + (f" of {wanted:,}" if wanted else "") for count, wanted in found]
        pixels = f"{width}x{height}, from {report.smallest}" if width else "-"
        status = in_colour(report.status, report.status)
        rows.add_row(report.name, report.group, status, *counts, str(report.sampled), str(len(report.broken)), pixels)
    out.print(rows)
    for report in reports:
        for note in report.notes:
            out.print(in_colour(report.name, report.status).append(f": {note}"))
        for path, reason in report.broken:
            out.print(f"{report.name}: broken: {path} ({reason})", markup=False)
    failed = [data.datasets[report.name] for report in reports if report.status == FAIL]
    if any(own.root.startswith("data/") for own in failed) and "DUNE_FAST_DATA" not in os.environ:
        out.print("The shipped configurations look below the folder that the variable DUNE_FAST_DATA names: set it.")
    return int(bool(failed))


def list_keys(args: argparse.Namespace) -> int:
    """Writes a pickled list of images as a text file, one a line. The pickle is not executed.

    It may hold a dictionary whose keys are the images (UBody's ubody_intra_train.pkl and ubody_intra_test.pkl), a list
    of paths, or a pair of a folder and a list of paths below it, as the code published with DUNE reads them. --prefix
    takes the place of that folder.
    """
    from dune_fast.dali_pipelines.pickle_keys import pickle_paths

    folder, found = pickle_paths(args.file)
    paths = [str(Path(args.prefix or folder) / path) for path in found]
    try:
        args.out.write_text("".join(f"{path}\n" for path in sorted(paths)), encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(
            f"{args.out} cannot be written ({error.strerror}): give --out a file in a folder that is there"
        ) from error
    sys.stdout.write(f"{args.out}: {len(paths):,} paths, the first one {min(paths)}\n")
    return 0


def add_parser(commands: argparse._SubParsersAction) -> None:
    """The command `data` and its own commands."""
    parser = commands.add_parser("data", help="shard and check datasets", description=__doc__)
    own = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    default, only = "(default: %(default)s)", "these datasets (default: all configured)"
    hydra = "Hydra overrides that name the datasets, e.g. data=dune, data=in1k"

    example = "example: dune-fast data shard data=folder data.datasets.images.root=/path/to/images --out shards"
    sub = add_command(own, "shard", shard, "turn datasets into tar shards with an index", epilog=example)
    sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=hydra)
    sub.add_argument("--out", type=local, required=True, metavar="FOLDER", help="gets a folder for each dataset")
    sub.add_argument("--only", nargs="+", default=[], metavar="NAME", help=only)
    workers = "processes (default: one a core, %(default)s here)"
    sub.add_argument("--workers", type=int, default=os.cpu_count() or 1, help=workers)
    sub.add_argument("--megabytes", type=int, default=500, help=f"size of a shard, about {default}")
    side = "shrink larger images to this shorter side (default: the dataset's `shrink`, else keep the size)"
    sub.add_argument("--shorter-side", type=int, default=0, metavar="PIXELS", help=side)
    sub.add_argument("--seed", type=int, default=0, help=f"of the order inside the shards {default}")
    canvas = (
        "images stored turned (BEDLAM's close-ups) are turned upright: the canvas turns as well (default), or "
        "stays as it is, as in the code published with DUNE, which cuts off what lies outside and leaves black bars"
    )
    sub.add_argument("--turned-canvas", choices=("enlarge", "keep"), default="enlarge", help=canvas)

    example = "example: DUNE_FAST_DATA=/path/to/data dune-fast data check data=dune"
    sub = add_command(own, "check", check, "count, compare with what is expected, decode a sample", epilog=example)
    sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=hydra)
    sub.add_argument("--only", nargs="+", default=[], metavar="NAME", help=only)
    sub.add_argument("--sample", type=int, default=64, metavar="N", help=f"images of each split to decode {default}")
    sub.add_argument("--decode-all", action="store_true", help="decode every image")
    sub.add_argument("--full", action="store_true", help="of shards, compare every byte with the checksums")
    sub.add_argument("--seed", type=int, default=0, help=f"of the sample {default}")

    example = "example: dune-fast data list-keys ubody_intra_train.pkl --prefix ubody/videos --out ubody_train.txt"
    summary = "make a list of images from a pickled one (UBody, DUNE's lists)"
    sub = add_command(own, "list-keys", list_keys, summary, epilog=example)
    sub.add_argument("file", type=local, metavar="PICKLE", help="a pickled dictionary, list, or pair")
    sub.add_argument("--prefix", default="", metavar="FOLDER", help="to put before every path")
    sub.add_argument("--out", type=local, required=True, metavar="FILE", help="the list; its paths start at its folder")
