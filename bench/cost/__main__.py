"""`python -m bench.cost [--only ROWS] [--minutes M]`: what each way to spend less saves and loses."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.cost.options import CACHES, OPTIONS, SEEDS, cost_cells
from bench.proof.cells import Cell, Places, Settings, environment, finished, run_cell, stereo_folder
from bench.proof.scenes import make_scenes
from dune_fast.teachers.files import locked

logger = logging.getLogger("bench.cost")
RESULTS = Path(__file__).parents[1] / "results" / "cost"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the cells and which are finished, run nothing")
    parser.add_argument("--only", default="*", metavar="CELLS", help='names or globs: "live*,cached-0"')
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many minutes")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, each with one thread")
    parser.add_argument("--work", type=Path, default=Path("runs/proof"), help="images and runs (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSONs, page and plot")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # one cell in this process
    return parser.parse_args(argv)


def build_cache(cell: Cell, settings: Settings, places: Places) -> None:
    """The cache that a cell reads, by `dune-fast cache build`; does nothing where it is whole."""
    chosen = [word for word in cell.overrides if word.startswith(("cache.", "data.views"))]
    if chosen:
        words = [f"experiment={settings.experiment}", f"train.seed={cell.seed}", *chosen]
        call = [sys.executable, "-m", "dune_fast", "cache", "build", *words]
        with locked(places.work / f"cache-{cell.seed}.lock", f"the cache of seed {cell.seed}"):
            subprocess.run(call, env=environment(places), check=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 1 if a cell failed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    settings = Settings()
    settings = dataclasses.replace(settings, scenes=dataclasses.replace(settings.scenes, split="study"))
    scenes = args.work / "scenes_study"
    make_scenes(scenes, settings.scenes)
    mark = json.loads((scenes / "scenes.json").read_text())["fingerprint"]
    places = Places(args.work / "cost", scenes, stereo_folder(), args.results)
    os.environ[CACHES] = str(places.work / "caches")
    globs = args.cell or args.only
    cells = [
        cell
        for cell in cost_cells(OPTIONS, SEEDS)
        if any(fnmatch.fnmatch(cell.name, part.strip()) for part in globs.split(","))
    ]
    if args.cell:
        torch.set_num_threads(1)
        build_cache(cells[0], settings, places)
        result = run_cell(cells[0], settings, places, mark)
        logger.info("%s: %s", cells[0].name, {key: round(value, 3) for key, value in result["values"].items()})
        return 0
    if args.list:
        for cell in cells:
            logger.info("%-10s %s", "finished" if finished(cell, settings, places, mark) else "to run", cell.name)
        return 0
    began, failed = time.monotonic(), []

    def run(cell: Cell) -> None:
        if finished(cell, settings, places, mark) or time.monotonic() - began > 60 * args.minutes:
            return
        call = [sys.executable, "-m", "bench.cost", *argv, "--cell", cell.name]
        if subprocess.run(call, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode:
            failed.append(cell.name)
        logger.info("%s ended", cell.name)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, cells))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
