"""What every set of cells shares: the flags of its command, its images, and the loop that runs a cell a process."""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.proof.cells import Cell, Places, Settings, finished, read_results, run_cell, stereo_folder
from bench.proof.scenes import Sources, make_scenes

Results = dict[str, dict[str, Any]]
"""Name of a cell -> its JSON."""


def add_flags(parser: argparse.ArgumentParser, results: str) -> None:
    """The flags that all of these commands have; `results` is where the results go by default, for the help."""
    parser.add_argument("--list", action="store_true", help="name the cells and which are finished, run nothing")
    parser.add_argument("--only", default="*", metavar="CELLS", help='names or globs: "random-*,student*-0"')
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many minutes")
    parser.add_argument("--jobs", type=int, default=0, help="cells at a time; 0: one a core on a CPU, one on a GPU")
    parser.add_argument("--smoke", action="store_true", help="tiny drawn networks and images: does it run?")
    parser.add_argument("--work", type=Path, default=Path("runs/proof"), help="images and runs (%(default)s)")
    parser.add_argument("--results", type=Path, default=None, help=f"JSONs and the page ({results})")
    parser.add_argument("--table", action="store_true", help="write the tables out of the JSONs, run nothing")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # one cell in this process


def prepare(
    args: argparse.Namespace, settings: Settings, work: Path, scenes: Path, results: Path
) -> tuple[Places, str]:
    """Images, made if need be, and their fingerprint."""
    sources: Sources | None = None
    stereo = None
    if args.smoke:
        from bench.proof.smoke import drawn_sources, drawn_stereo

        sources, stereo = drawn_sources(args.work / "smoke_sources"), drawn_stereo(args.work / "smoke_sources")
    make_scenes(scenes, settings.scenes, sources)
    mark = json.loads((scenes / "scenes.json").read_text())["fingerprint"]
    return Places(work, scenes, stereo or stereo_folder(), results), mark


def matching(cells: Sequence[Cell], only: str) -> list[Cell]:
    """Those that a glob of `only` matches; SystemExit if one matches nothing."""
    globs = [part.strip() for part in only.split(",")]
    for glob in globs:
        if not any(fnmatch.fnmatch(cell.name, glob) for cell in cells):
            raise SystemExit(f"no cell matches {glob!r}; the cells: {', '.join(cell.name for cell in cells)}")
    return [cell for cell in cells if any(fnmatch.fnmatch(cell.name, glob) for glob in globs)]


@dataclass(frozen=True)
class Program:
    """One set of cells."""

    module: str
    """What `python -m` is given: a process a cell."""
    cells: list[Cell]
    settings: Settings
    places: Places
    mark: str
    """Fingerprint of the images."""
    write_page: Callable[[Path, Sequence[Cell], Results], Path]
    """Into the folder of the results."""
    before: Callable[[Cell, Settings, Places], None] = lambda *_: None
    """Called in a cell's process, before it trains."""
    threads: int | None = None
    """Of a cell; None for the cores that the cells at a time leave it."""

    def drive(self, args: argparse.Namespace, argv: Sequence[str]) -> int:
        """Lists, runs one cell in this process, or runs all that is left and writes the page; the exit status."""
        logger = logging.getLogger(self.module)
        cells = matching(self.cells, args.cell or args.only)
        if args.cell:
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
            self.before(cells[0], self.settings, self.places)
            result = run_cell(cells[0], self.settings, self.places, self.mark)
            logger.info("%s: %s", cells[0].name, {key: round(value, 3) for key, value in result["values"].items()})
            return 0
        done = {cell.name: finished(cell, self.settings, self.places, self.mark) for cell in cells}
        if args.list:
            for name, there in done.items():
                logger.info("%-10s %s", "finished" if there else "to run", name)
            return 0
        failed = self._run_all([cell for cell in cells if not done[cell.name]], args, argv, logger)
        page = self.write_page(self.places.results, self.cells, read_results(self.places.results, self.cells))
        logger.info("%s%s", page, f"; failed: {', '.join(failed)}" if failed else "")
        return 1 if failed else 0

    def _run_all(
        self, cells: list[Cell], args: argparse.Namespace, argv: Sequence[str], logger: logging.Logger
    ) -> list[str]:
        """Every cell in a process of its own; returns the names of those that failed."""
        jobs = args.jobs or (1 if torch.cuda.is_available() else max(1, os.cpu_count() or 1))
        threads = self.threads or max(1, (os.cpu_count() or 1) // jobs)
        began, failed = time.monotonic(), []

        def run(cell: Cell) -> None:
            if time.monotonic() - began > 60 * args.minutes:
                return
            started = time.monotonic()
            call = [sys.executable, "-m", self.module, *argv, "--cell", cell.name]
            status = subprocess.run(call, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=False).returncode
            logger.info("%s: %s after %.0f s", cell.name, "failed" if status else "done", time.monotonic() - started)
            if status:
                failed.append(cell.name)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, cells))
        return failed
