"""`dune-fast cache build | report | statistics`: teachers' features on disk."""

from __future__ import annotations

import argparse
import json
import logging
import sys

from dune_fast.console import add_command
from dune_fast.teachers.local_paths import local

logger = logging.getLogger(__name__)


def build(args: argparse.Namespace) -> int:
    """Runs the teachers once over fixed views of every training image, and stores their features.

    A run with the same overrides and `cache.folder` then reads them instead of running the teachers. After an
    interruption the same command goes on where it was. `--part 1/4` to `--part 4/4` share the work among processes or
    machines.
    """
    from dune_fast.cache.report import lines, summarize
    from dune_fast.cache.store import Store
    from dune_fast.engine.cache_build import build as build_cache
    from dune_fast.engine.config import ConfigError, compose_config

    number, _, count = args.part.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--part {args.part}: give NUMBER/COUNT, e.g. 1/4 for the first of four parts")
    folder = build_cache(compose_config(args.overrides), int(number) - 1, int(count))
    if count == "1":
        sys.stdout.write("\n".join(lines(summarize(Store(str(folder))))) + "\n")
    return 0


def report(args: argparse.Namespace) -> int:
    """Says what a cache holds: bytes an image, how close stored features are to the teachers', seconds it took."""
    from dune_fast.cache.report import lines, summarize
    from dune_fast.cache.store import Store

    found = summarize(Store(args.folder))
    sys.stdout.write((json.dumps(found, indent=1) if args.json else "\n".join(lines(found))) + "\n")
    return 0


def statistics(args: argparse.Namespace) -> int:
    """Measures mean and deviation of every teacher's features, for standardization.convention=stored.

    Of a cache (`--cache`) those of all its views; else the teachers run over the first images of the run: `--images`,
    by default as many as there are to train on.
    """
    from dune_fast.cache.store import Store
    from dune_fast.distill.stored_statistics import write_statistics
    from dune_fast.engine.config import ConfigError, compose_config

    if bool(args.cache) == bool(args.overrides):
        raise ConfigError("give the overrides of a run, e.g. experiment=theia, or --cache FOLDER: one of the two")
    if args.cache and args.images:
        raise ConfigError("--images is of a run's images; of a cache all views are measured: leave one of them out")
    if args.file.is_dir():
        raise ConfigError(f"{args.file} is a folder; name the safetensors file that is to be written")
    args.file.parent.mkdir(parents=True, exist_ok=True)  # what fails here fails before the teachers run
    if args.cache:
        found = Store(str(args.cache)).moments()
    else:
        from dune_fast.engine.feature_statistics import measure

        found = measure(compose_config(args.overrides), args.images)
    write_statistics(args.file, found)
    logger.info("%s: statistics of %s", args.file, ", ".join(found))
    return 0


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `cache` and what is below it."""
    parser = commands.add_parser("cache", help="teachers' features on disk")
    own = parser.add_subparsers(dest="cache_command", required=True, metavar="COMMAND")
    example = "example: dune-fast cache build experiment=demo data.views=2 cache.folder=runs/cache"
    sub = add_command(own, "build", build, "compute and store features", epilog=example)
    sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of the run that will read the cache")
    sub.add_argument("--part", default="1/1", metavar="I/N", help="build one of N parts (default: all)")
    sub = add_command(own, "report", report, "what a cache holds")
    sub.add_argument("folder", help="the cache")
    sub.add_argument("--json", action="store_true", help="as JSON")
    example = "example: dune-fast cache statistics runs/statistics.safetensors experiment=demo --images 200"
    sub = add_command(own, "statistics", statistics, "measure what features are standardized with", epilog=example)
    sub.add_argument("file", type=local, help="the safetensors file that is written")
    sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of the run that will read it")
    sub.add_argument("--cache", type=local, metavar="FOLDER", help="a cache whose features are measured")
    sub.add_argument("--images", type=int, default=0, metavar="N", help="of the run's first images (default: all)")
