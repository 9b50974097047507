"""`python -m bench.cost [--list] [--only CELLS] [--minutes M] [--table] [--step]`: what spending less loses."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.cost.arithmetic import arithmetic_of_rows
from bench.cost.figure import write_figure
from bench.cost.options import CACHES, LIVE, SEEDS, cache_words, cost_cells, options, smoke_options
from bench.cost.step import measure_steps
from bench.cost.table import guide_table, page, read_step, rows_of
from bench.proof.cells import SMOKE, Cell, Places, Settings, environment, read_results
from bench.proof.driver import Program, add_flags, prepare
from bench.proof.table import between
from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.engine.config import compose_config
from dune_fast.teachers.files import locked

logger = logging.getLogger("bench.cost")
RESULTS = Path(__file__).parents[1] / "results" / "cost"
GUIDE = Path(__file__).parents[2] / "docs" / "training_well.md"
BEGIN = "<!-- bench.cost --table -->"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description=__doc__)
    add_flags(parser, "bench/results/cost")
    parser.add_argument("--step", action="store_true", help="measure a step at DUNE's proportions, run no cell")
    parser.add_argument("--rounds", type=int, default=7, help="with --step: measured steps of each (%(default)s)")
    return parser.parse_args(argv)


def build_cache(cell: Cell, settings: Settings, places: Places) -> None:
    """The cache that a cell reads, by `dune-fast cache build`; does nothing where it is whole."""
    if chosen := cache_words(cell):
        words = [f"experiment={settings.experiment}", f"train.seed={cell.seed}", *settings.overrides, *chosen]
        call = [sys.executable, "-m", "dune_fast", "cache", "build", *words]
        with locked(places.work / f"cache-{cell.seed}.lock", f"the cache of seed {cell.seed}"):
            subprocess.run(call, env=environment(places), check=True)


def write_page(folder: Path, cells: Sequence[Cell], results: Mapping[str, Any], settings: Settings) -> Path:
    """Page, figure and its numbers, for the results of this repository the table in docs/, too; returns the page."""
    found = [cell for cell in cells if cell.name in results]
    arithmetic = arithmetic_of_rows(found, settings)
    batch = compose_config([f"experiment={settings.experiment}", "start.teacher="]).train.global_batch
    path, rows = folder / "README.md", rows_of(cells, results, arithmetic)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, page(cells, results, arithmetic, settings, batch, read_step(folder)).encode())
    if rows:
        write_figure(folder, rows)
    if folder == RESULTS and LIVE in rows:
        GUIDE.write_text(between(GUIDE.read_text(), GUIDE.name, BEGIN, guide_table(rows)))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 1 if a cell failed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    kind = "_smoke" if args.smoke else ""
    settings = SMOKE if args.smoke else Settings()
    settings = dataclasses.replace(settings, scenes=dataclasses.replace(settings.scenes, split="study"))
    rows, seeds = (smoke_options(SMOKE), SMOKE.seeds) if args.smoke else (options(), SEEDS)
    cells = cost_cells(rows, seeds)
    work = args.work / f"cost{kind}"
    results = args.results or (work / "results" if args.smoke else RESULTS)
    if args.step:
        logger.info("%s", measure_steps(results, args.rounds))
        args.table = True

    def write(folder: Path, cells: Sequence[Cell], found: Mapping[str, Any]) -> Path:
        return write_page(folder, cells, found, settings)

    if args.table:
        logger.info("%s", write(results, cells, read_results(results, cells)))
        return 0
    places, mark = prepare(args, settings, work, args.work / f"scenes{kind}_study", results)
    os.environ[CACHES] = str(places.work / "caches")
    program = Program("bench.cost", cells, settings, places, mark, write, build_cache, threads=1)
    return program.drive(args, argv)


if __name__ == "__main__":
    sys.exit(main())
