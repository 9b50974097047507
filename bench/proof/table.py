"""The page of results, out of the cells' JSONs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.proof.cells import TEACHERS, Cell

COLUMNS = {"knn": "k-NN", "knn_patch": "k-NN, mean patch", "iou": "IoU", "match": "match"}
MARGINS = {"knn": 0.10, "iou": 0.10, "match": 0.05}
"""What the student of all teachers has to be above an untrained one by."""
_PARTS = {
    "main": "Real teachers into one student",
    "small": "A wider student",
    "ablation": "The method's parts, on a shorter schedule",
}
BEGIN, END = "<!-- bench.proof --table -->", "<!-- end -->"
_INTRODUCTION = """Made by `make proof` (`python -m bench.proof`). Mean and standard deviation over seeds. Classes,
masks and matches are of cut-outs, photographs and a stereo pair that no student was trained on. A student starts from
weights made out of the semantic teacher in closed form (`start.teacher`), the row `start`, with projectors that fit
(`start.fit_projectors`); the rows `from drawn weights` and `projectors as drawn` do not."""

Spread = tuple[float, float, int]
"""Mean, deviation over seeds (0 for one) and number of seeds."""


def rows(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Spread]]:
    """Row -> measurement -> its spread. `knn` is of cls tokens; of mean patches where a network has no cls."""
    values: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        if cell.name in results:
            found = results[cell.name]["values"]
            found = {"knn": found.get("knn_cls", found["knn_patch"]), **found}
            for key in COLUMNS:
                values.setdefault(cell.row, {}).setdefault(key, []).append(found[key])
    return {row: {key: _spread(found) for key, found in columns.items()} for row, columns in values.items()}


def _spread(values: list[float]) -> Spread:
    return mean(values), stdev(values) if len(values) > 1 else 0.0, len(values)


def verdicts(table: Mapping[str, Mapping[str, Spread]]) -> list[tuple[bool, str]]:
    """What the proof has to show, each as (holds, sentence); empty while a row is missing."""
    students = [f"student of {name}" for name in TEACHERS]
    if any(row not in table for row in ("student of all", "random", *students)):
        return []
    ours, random = table["student of all"], table["random"]
    lines = []
    for key, margin in MARGINS.items():
        gain, spread = ours[key][0] - random[key][0], max(ours[key][1], random[key][1])
        needed = max(margin, 3 * spread)
        lines.append((gain >= needed, f"{COLUMNS[key]}: {gain:+.3f} over random weights; {needed:.3f} is asked for "
                                      f"(at least {margin:.2f} and three times the spread, {spread:.3f})"))  # fmt: skip
    best = {key: max(students, key=lambda row: table[row][key][0]) for key in MARGINS}
    ahead = [key for key, row in best.items() if ours[key][0] >= table[row][key][0]]
    pairs = ((COLUMNS[key], ours[key][0], table[row][key][0], row) for key, row in best.items())
    parts = ", ".join(f"{title} {own:.3f} against {best_one:.3f} ({row})" for title, own, best_one, row in pairs)
    lines.append((len(ahead) >= 2, f"at or above the best student of one teacher on {len(ahead)} of 3: {parts}"))
    if (start := table.get("start")) is not None:  # it may pass the lines above by itself
        lost = [COLUMNS[key] for key in MARGINS if ours[key][0] <= start[key][0]]
        but = f", but for {', '.join(lost)}" if lost else ""
        lines.append((not lost, f"above the weights that it started from{but}"))
    return lines


def part_table(cells: Sequence[Cell], table: Mapping[str, Mapping[str, Spread]], part: str) -> list[str]:
    """The rows of a part that have been measured, lines of Markdown; empty if there are none."""
    of_part = list(dict.fromkeys(cell.row for cell in cells if cell.part == part and cell.row in table))
    lines = [f"| | seeds | {' | '.join(COLUMNS.values())} |", "|---|---|" + "---|" * len(COLUMNS)]
    for row in of_part:
        entries = [f"{m:.3f}" + (f" ± {s:.3f}" if n > 1 else "") for m, s, n in table[row].values()]
        lines.append(f"| {row} | {table[row]['knn'][2]} | {' | '.join(entries)} |")
    return lines if of_part else []


def with_table(text: str, cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> str:
    """README's text with the main table; ValueError if it has not both markers."""
    return between(text, "README.md", BEGIN, part_table(cells, rows(cells, results), "main"))


def between(text: str, name: str, begin: str, lines: Sequence[str]) -> str:
    """A page's text with these lines between the marker `begin` and the next `END`; ValueError if one is not there."""
    before, found, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"{name} lacks the markers {begin} and {END}")
    return "\n".join([before + begin, *lines, end + after])


def page(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page in Markdown."""
    table = rows(cells, results)
    there = [results[cell.name] for cell in cells if cell.name in results]
    lines = ["# Does it distil?", "", _INTRODUCTION, ""]
    for part, title in _PARTS.items():
        if shown := part_table(cells, table, part):
            lines += [f"## {title}", "", *shown, ""]
    if checks := verdicts(table):
        lines += ["## What it has to show", ""]
        lines += [f"- {'pass' if holds else 'FAIL'}: {sentence}" for holds, sentence in checks] + [""]
    seconds = sum(result["seconds"]["training"] + result["seconds"]["evaluation"] for result in there)
    machines = sorted({f"{r['machine']['device']}, {r['machine']['threads']} threads" for r in there})
    missing = [cell.name for cell in cells if cell.name not in results]
    lines += [f"{len(there)} of {len(cells)} cells, {seconds / 60:.0f} minutes of training and evaluation, on "
              f"{'; '.join(machines) or 'no machine yet'}. Commands and values of every cell: `cells/`."]  # fmt: skip
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def write_page(results_folder: Path, cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> Path:
    """Writes README.md; returns its path."""
    path = results_folder / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(cells, results))
    return path
