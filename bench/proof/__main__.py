"""`python -m bench.proof [--list] [--only CELLS] [--minutes M] [--smoke]`: the proof, or what is left of it."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.proof.cells import SMOKE, Settings, all_cells, read_results
from bench.proof.driver import Program, add_flags, prepare
from bench.proof.table import with_table, write_page

logger = logging.getLogger("bench.proof")
RESULTS = Path(__file__).parents[1] / "results" / "proof"
README = Path(__file__).parents[2] / "README.md"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.proof", description=__doc__)
    add_flags(parser, "bench/results/proof")
    parser.add_argument("--study", action="store_true", help="split the training part once more, to make choices on")
    parser.add_argument("--set", action="append", default=[], metavar="X=Y", help="of every training, with --study")
    parser.add_argument("--steps", type=int, help="of the main students, with --study")
    return parser.parse_args(argv)


def chosen_settings(args: argparse.Namespace) -> Settings:
    """Sizes by the flags."""
    settings = SMOKE if args.smoke else Settings(small=torch.cuda.is_available())
    if not args.study and (args.set or args.steps):
        raise SystemExit("--set and --steps change what is proven: use them with --study")
    if args.study:
        settings = dataclasses.replace(settings, scenes=dataclasses.replace(settings.scenes, split="study"))
    if args.steps:
        settings = dataclasses.replace(settings, steps=args.steps)
    return dataclasses.replace(settings, overrides=(*settings.overrides, *args.set))


def folders(args: argparse.Namespace) -> tuple[Path, Path, Path]:
    """Work, scenes and results: those of a study and of a smoke test are their own."""
    kind = "".join(f"_{name}" for name in ("smoke", "study") if getattr(args, name))
    work = args.work / f"cells{kind}"
    results = args.results or (work / "results" if kind else RESULTS)
    return work, args.work / f"scenes{kind}", results


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 1 if a cell failed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    settings = chosen_settings(args)
    everything = all_cells(settings)
    if args.table:
        results = folders(args)[2]
        found = read_results(results, everything)
        logger.info("%s", write_page(results, everything, found))
        if results == RESULTS:
            README.write_text(with_table(README.read_text(), everything, found))
        return 0
    work, scenes, results = folders(args)
    places, mark = prepare(args, settings, work, scenes, results)
    return Program("bench.proof", everything, settings, places, mark, write_page).drive(args, argv)


if __name__ == "__main__":
    sys.exit(main())
