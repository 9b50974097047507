"""`dune-fast cache build | report`: teachers' features on disk."""

from __future__ import annotations

import argparse
import json
import sys

from dune_fast.console import add_command


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
