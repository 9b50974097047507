"""`python -m bench.siblings [--list] [--only CELLS] [--table]`: recipes of other systems in small, beside DUNE's.

All students have the proof's size, teachers, images, steps and first weights. Tasks and split are those of the study:
the final images stay unseen.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.proof.cells import Cell, Places, Settings, environment, read_results
from bench.proof.driver import Program, add_flags, prepare
from bench.proof.table import COLUMNS, rows
from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.teachers.files import locked

logger = logging.getLogger("bench.siblings")
RESULTS = Path(__file__).parents[1] / "results" / "siblings"
SEEDS, STEPS = 3, 120
DRAWN = ("student_weights=", "start.teacher=semantic", "start.fit_projectors=false")
"""The start without its fitted projectors: what the others' heads and translators begin with."""
STATISTICS = "theia_statistics.safetensors"
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "DUNE": ("", ("objective.drop_probability=0",)),
    "DUNE, projectors as drawn": ("", ("objective.drop_probability=0", *DRAWN)),
    "Theia": ("theia_demo", DRAWN[:2]),  # a ViT without registers, so it makes its start itself
    "RADIO": ("radio_demo", ()),
}
"""Row -> experiment, the settings' own by default, and overrides."""


def sibling_cells(settings: Settings, places: Places | None = None) -> list[Cell]:
    """Cells of the proof, seed by seed; they train with `places` alone."""
    cells = []
    for seed in range(SEEDS):
        for row, (experiment, words) in ROWS.items():
            chosen = (f"experiment={experiment}",) if experiment else ()
            if experiment == "theia_demo" and places is not None:
                chosen += (f"standardization.file={places.work / STATISTICS}",)
            cells.append(Cell(row, "student", seed, "siblings", settings.ablation_steps, (*chosen, *words)))
    return cells


def measure_statistics(cell: Cell, settings: Settings, places: Places) -> None:
    """Theia's statistics of the teachers, once for all its cells; does nothing for the others."""
    if cell.row == "Theia":
        path = places.work / STATISTICS
        with locked(path.with_suffix(".lock"), "Theia's statistics"):
            if not path.is_file():
                call = [sys.executable, "-m", "dune_fast", "cache", "statistics", str(path), "experiment=theia_demo"]
                subprocess.run([*call, "--images", "512"], env=environment(places), check=True)


def write_page(folder: Path, cells: Sequence[Cell], results: Mapping[str, Any]) -> Path:
    """The page of results, out of the JSONs."""
    table = rows(cells, results)
    lines = [
        "# Recipes of other systems in small", "",
        "Made by `python -m bench.siblings`; `--table` writes this page again from the JSONs in `cells/`. Three real",
        f"teachers into a ViT-Ti/14, 112 px, {STEPS} steps of 16 images, on the study's split; mean and standard",
        "deviation over seeds. All rows start from the same weights, made out of the semantic teacher; `DUNE` alone",
        "has projectors that are fitted before the first step. A recipe is its file's in `configs/experiment/`; this",
        "schedule is a thousandth of theirs.", "",
        f"| recipe | {' | '.join(COLUMNS.values())} | seeds |", "|---|" + "---|" * (len(COLUMNS) + 1),
    ]  # fmt: skip
    for row, columns in table.items():
        shown = [f"{mean:.3f} ± {spread:.3f}" for mean, spread, _ in columns.values()]
        lines.append(f"| {row} | {' | '.join(shown)} | {columns['knn'][2]} |")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "README.md"
    write_whole(path, ("\n".join(lines) + "\n").encode())
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 1 if a cell failed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m bench.siblings", description=__doc__)
    add_flags(parser, "bench/results/siblings")
    args = parser.parse_args(argv)
    if args.smoke:
        parser.error("--smoke: these recipes have the proof's real teachers; `python -m bench.proof --smoke` has drawn")
    settings = Settings(ablation_steps=STEPS)
    settings = dataclasses.replace(settings, scenes=dataclasses.replace(settings.scenes, split="study"))
    work = args.work / "siblings"
    results = args.results or RESULTS
    if args.table:
        cells = sibling_cells(settings)
        logger.info("%s", write_page(results, cells, read_results(results, cells)))
        return 0
    places, mark = prepare(args, settings, work, args.work / "scenes_study", results)
    cells = sibling_cells(settings, places)
    return Program("bench.siblings", cells, settings, places, mark, write_page, measure_statistics, 1).drive(args, argv)


if __name__ == "__main__":
    sys.exit(main())
