"""`python -m bench.proof [--list] [--only CELLS] [--minutes M] [--smoke]`: the proof, or what is left of it."""

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

from bench.proof.cells import (
    SMOKE,
    Cell,
    Places,
    Settings,
    all_cells,
    finished,
    read_results,
    run_cell,
    stereo_folder,
)
from bench.proof.scenes import Sources, make_scenes
from bench.proof.table import with_table, write_page

logger = logging.getLogger("bench.proof")
RESULTS = Path(__file__).parents[1] / "results" / "proof"
README = Path(__file__).parents[2] / "README.md"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.proof", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the cells and which are finished, run nothing")
    parser.add_argument("--only", default="*", metavar="CELLS", help='names or globs: "random-*,student*-0"')
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many minutes")
    parser.add_argument("--jobs", type=int, default=0, help="cells at a time; 0: one a core on a CPU, one on a GPU")
    parser.add_argument("--smoke", action="store_true", help="tiny drawn networks and images: does it run?")
    parser.add_argument("--study", action="store_true", help="split the training part once more, to make choices on")
    parser.add_argument("--work", type=Path, default=Path("runs/proof"), help="images and runs (%(default)s)")
    parser.add_argument("--results", type=Path, default=None, help="JSONs and the page (bench/results/proof)")
    parser.add_argument("--table", action="store_true", help="write the tables out of the JSONs, run nothing")
    parser.add_argument("--set", action="append", default=[], metavar="X=Y", help="of every training, with --study")
    parser.add_argument("--steps", type=int, help="of the main students, with --study")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # one cell in this process
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


def prepare(args: argparse.Namespace, settings: Settings) -> tuple[Places, str]:
    """Images, made if need be, and their fingerprint."""
    work, scenes, results = folders(args)
    sources: Sources | None = None
    stereo = None
    if args.smoke:
        from bench.proof.smoke import drawn_sources, drawn_stereo

        sources, stereo = drawn_sources(args.work / "smoke_sources"), drawn_stereo(args.work / "smoke_sources")
    make_scenes(scenes, settings.scenes, sources)
    mark = json.loads((scenes / "scenes.json").read_text())["fingerprint"]
    return Places(work, scenes, stereo or stereo_folder(), results), mark


def chosen_cells(settings: Settings, only: str) -> list[Cell]:
    """Those that a glob of `only` matches; SystemExit if one matches nothing."""
    cells = all_cells(settings)
    globs = [part.strip() for part in only.split(",")]
    for glob in globs:
        if not any(fnmatch.fnmatch(cell.name, glob) for cell in cells):
            raise SystemExit(f"no cell matches {glob!r}; the cells: {', '.join(cell.name for cell in cells)}")
    return [cell for cell in cells if any(fnmatch.fnmatch(cell.name, glob) for glob in globs)]


def run_all(args: argparse.Namespace, argv: Sequence[str], cells: list[Cell], jobs: int) -> list[str]:
    """Every cell in a process of its own; returns the names of those that failed."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    began, failed = time.monotonic(), []

    def run(cell: Cell) -> None:
        if time.monotonic() - began > 60 * args.minutes:
            return
        started = time.monotonic()
        call = [sys.executable, "-m", "bench.proof", *argv, "--cell", cell.name]
        status = subprocess.run(call, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=False).returncode
        logger.info("%s: %s after %.0f s", cell.name, "failed" if status else "done", time.monotonic() - started)
        if status:
            failed.append(cell.name)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, cells))
    return failed


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
    cells = chosen_cells(settings, args.cell or args.only)
    places, mark = prepare(args, settings)
    if args.list:
        for cell in cells:
            logger.info("%-10s %s", "finished" if finished(cell, settings, places, mark) else "to run", cell.name)
        return 0
    if args.cell:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        result = run_cell(cells[0], settings, places, mark)
        logger.info("%s: %s", cells[0].name, {key: round(value, 3) for key, value in result["values"].items()})
        return 0
    jobs = args.jobs or (1 if torch.cuda.is_available() else max(1, os.cpu_count() or 1))
    failed = run_all(args, argv, [cell for cell in cells if not finished(cell, settings, places, mark)], jobs)
    page = write_page(places.results, everything, read_results(places.results, everything))
    logger.info("%s%s", page, f"; failed: {', '.join(failed)}" if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
