"""What each row costs and how good its students are; the page, out of JSONs alone.

Seeds share start and images' order between rows, so rows are compared seed by seed. One deviation of such a difference
serves all rows, pooled over them: of three seeds alone it would be a poor estimate. A mean over n seeds is level with
the live row where it lies within

    2 * deviation / sqrt(n)

and below or above it elsewhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.cost.arithmetic import Arithmetic, pays_off_after
from bench.cost.options import DRAWN, FEW, LIVE, views
from bench.proof.cells import Cell, Settings

METRICS = {"knn": "k-NN", "iou": "IoU", "match": "match"}
SHARE = 3
"""The best combination takes at most one part in so many of the live run's arithmetic."""
CACHED_STEP = 3.0
"""A cached step takes at most one part in so many of a live one's time at DUNE's proportions."""
_ERRORS = 2.0
_FREEDOM = 10  # differences beyond one a row that a deviation is taken from, at least
_INTRODUCTION = """Made by `python -m bench.cost`; `python -m bench.cost --table` writes this page, the figure and its
numbers again from the JSONs in `cells/`. Each row is the proof's training (`configs/experiment/proof.yaml`: three real
teachers into a ViT-Ti/14, 112 px, 16 images a step) with some options, on the study's split, so that the final images
stay unseen. Mean and standard deviation over seeds.

- **teachers**, **all**: operations of the run's steps, 10^12. The first weights are not counted; all rows but one share
  them.
- **of live**: of all operations, those of the row `live` being 1. **With its build**: the same for a run that has to
  build its cache first. **In `dune_336`**: the same options there, where teachers are 73 % of the arithmetic and not
  49 %; its cache is taken to be there.
- **s**: seconds of the steps, one thread, several cells at a time on a shared machine: no measurement of speed."""

Diff = tuple[float, float | None, float | None]
"""Of a row from the live one: mean, deviation over seeds and limit of what is level; None below two seeds."""


@dataclass(frozen=True)
class Row:
    """One row's results."""

    name: str
    steps: int
    arithmetic: Arithmetic
    values: Mapping[str, Mapping[int, float]]
    """Metric -> seed -> value."""
    seconds: Sequence[float]

    @property
    def seeds(self) -> int:
        """How many are there."""
        return len(self.values["knn"])


def rows_of(
    cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]], arithmetic: Mapping[str, Arithmetic]
) -> dict[str, Row]:
    """The rows that have a result, in the cells' order."""
    rows: dict[str, Row] = {}
    for cell in (cell for cell in cells if cell.name in results):
        row = rows.setdefault(
            cell.row, Row(cell.row, cell.steps, arithmetic[cell.row], {key: {} for key in METRICS}, [])
        )
        found = results[cell.name]["values"]
        for key in METRICS:
            row.values[key][cell.seed] = found["knn_cls" if key == "knn" else key]
        row.seconds.append(results[cell.name]["seconds"]["steps"])
    return rows


def paired(row: Row, live: Row, key: str) -> list[float]:
    """Differences of a metric from the live row, of the seeds that both have."""
    ours, theirs = row.values[key], live.values[key]
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def pooled_deviation(rows: Mapping[str, Row], key: str) -> float | None:
    """Of a paired difference, over all rows with the live row's start; None while there are too few seeds."""
    squares, freedom = 0.0, 0
    for row in rows.values():
        found = paired(row, rows[LIVE], key) if row.name not in (LIVE, DRAWN) else []
        if len(found) > 1:
            squares, freedom = squares + sum((x - mean(found)) ** 2 for x in found), freedom + len(found) - 1
    return math.sqrt(squares / freedom) if freedom >= _FREEDOM else None


def differences(rows: Mapping[str, Row]) -> dict[str, dict[str, Diff]]:
    """Row -> metric -> difference from the live row, of the rows that share a seed with it."""
    found: dict[str, dict[str, Diff]] = {}
    if LIVE not in rows:
        return found
    for key in METRICS:
        deviation = pooled_deviation(rows, key)
        for row in rows.values():
            values = [] if row.name == LIVE else paired(row, rows[LIVE], key)
            if values:
                own = stdev(values) if len(values) > 1 else None
                limit = None if deviation is None else _ERRORS * deviation / math.sqrt(len(values))
                found.setdefault(row.name, {})[key] = (mean(values), own, limit)
    return found


def standing(diff: Diff) -> str:
    """ "level", "above", "below", or "" while nothing says how much seeds differ."""
    value, _, limit = diff
    return "" if limit is None else "level" if abs(value) <= limit else "above" if value > 0 else "below"


def verdicts(rows: Mapping[str, Row], step: Mapping[str, Any] | None = None) -> list[tuple[bool, str]]:
    """What the options have to show, each as (holds, sentence); those for which something is missing are left out."""
    diffs, lines = differences(rows), []
    if LIVE not in rows:
        return lines
    live = rows[LIVE].arithmetic.run
    costs = {row.name: row.arithmetic for row in rows.values() if row.name not in (LIVE, DRAWN)}
    alone = {name: cost.run / live for name, cost in costs.items() if SHARE * cost.first <= live}
    further = {name: cost.run / live for name, cost in costs.items() if cost.build and SHARE * cost.run <= live}
    at_dune = {name: cost.at_dune for name, cost in costs.items() if SHARE * cost.at_dune <= 1 + 1e-9}
    lines += _best(f"at most 1/{SHARE} of the arithmetic of `{LIVE}`, a run by itself", alone, diffs)
    lines += _best(f"at most 1/{SHARE}, each further run of a cache that is there", further, diffs)
    lines += _best(f"at most 1/{SHARE} with `dune_336`'s arithmetic, caches being there", at_dune, diffs)
    if DRAWN in diffs and (found := _margins(alone, diffs)):
        best = max(found, key=found.__getitem__)
        parts = {key: diffs[best][key][0] - diffs[DRAWN][key][0] for key in METRICS}
        text = ", ".join(f"{METRICS[key]} {value:+.3f}" for key, value in parts.items())
        lines.append((min(parts.values()) >= 0, f"`{best}` against `{DRAWN}`, the published way: {text}"))
    if step is not None:
        for name, ratio in step["ratios"].items():
            line = f"`{name}` step: the live one takes {ratio:.2f} times as long; {CACHED_STEP:.0f} is asked for"
            lines.append((ratio >= CACHED_STEP, line))
    return lines


def _margins(names: Iterable[str], diffs: Mapping[str, Mapping[str, Diff]]) -> dict[str, float]:
    """Row -> its worst metric's difference over the limit, -1 being the least that is level; those that have limits."""
    found = {}
    for name in names:
        metrics = diffs.get(name, {})
        if len(metrics) == len(METRICS) and all(limit for _, _, limit in metrics.values()):
            found[name] = min(value / limit for value, _, limit in metrics.values() if limit)
    return found


def _best(what: str, shares: Mapping[str, float], diffs: Mapping[str, Mapping[str, Diff]]) -> list[tuple[bool, str]]:
    """Whether the best of some rows, name -> share of the arithmetic, is nowhere below the live one."""
    margins = _margins(shares, diffs)
    if not margins:
        return []
    best = max(margins, key=margins.__getitem__)
    parts = [
        f"{METRICS[key]} {value:+.3f} (level within {limit:.3f})" for key, (value, _, limit) in diffs[best].items()
    ]
    return [(margins[best] >= -1, f"{what}: the best is `{best}` ({shares[best]:.2f}), {', '.join(parts)}")]


def _spread(values: Mapping[int, float]) -> str:
    found = list(values.values())
    return f"{mean(found):.3f}" + (f" ± {stdev(found):.3f}" if len(found) > 1 else "")


def main_table(rows: Mapping[str, Row]) -> list[str]:
    """Lines of Markdown: cost and quality."""
    live = rows[LIVE].arithmetic.run if LIVE in rows else None
    columns = [
        "seeds",
        "steps",
        "teachers",
        "all",
        "of live",
        "with its build",
        "in `dune_336`",
        "s",
        *METRICS.values(),
    ]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for row in rows.values():
        cost = row.arithmetic
        entries = [str(row.seeds), str(row.steps), f"{cost.teachers / 1e12:.2f}", f"{cost.run / 1e12:.2f}"]
        entries += [f"{cost.run / live:.2f}", f"{cost.first / live:.2f}" if cost.build else ""] if live else ["", ""]
        entries += [f"{cost.at_dune:.2f}", f"{mean(row.seconds):.0f}", *(_spread(row.values[key]) for key in METRICS)]
        lines.append(f"| {row.name} | {' | '.join(entries)} |")
    return lines


def difference_table(rows: Mapping[str, Row]) -> list[str]:
    """Lines of Markdown: differences from the live row and what they say."""
    lines = [f"| | seeds | {' | '.join(METRICS.values())} |", "|---|---|" + "---|" * len(METRICS)]
    for name, found in differences(rows).items():
        entries = []
        for value, own, _ in found.values():
            entries.append(f"{value:+.3f}" + (f" ± {own:.3f}" if own is not None else ""))
        marks = [f"{entry} {standing(diff)}".strip() for entry, diff in zip(entries, found.values(), strict=True)]
        lines.append(f"| {name} | {len(paired(rows[name], rows[LIVE], 'knn'))} | {' | '.join(marks)} |")
    return lines


def guide_table(rows: Mapping[str, Row]) -> list[str]:
    """Lines of Markdown, for docs/: the live row's values and the others' differences, in bold where not level."""
    columns = ["seeds", "arithmetic", "in `dune_336`", *METRICS.values()]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    live, diffs = rows[LIVE], differences(rows)
    for row in (live, *(row for row in rows.values() if row.name in diffs)):
        cost = row.arithmetic
        entries = [str(row.seeds), f"{cost.run / live.arithmetic.run:.2f}", f"{cost.at_dune:.2f}"]
        if row is live:
            entries += [_spread(row.values[key]) for key in METRICS]
        else:
            found = [(f"{diff[0]:+.3f}", standing(diff)) for diff in diffs[row.name].values()]
            entries += [f"**{text}**" if stands in ("above", "below") else text for text, stands in found]
        lines.append(f"| {row.name} | {' | '.join(entries)} |")
    return lines


def cache_lines(rows: Mapping[str, Row], settings: Settings, batch: int) -> list[str]:
    """When the build of a cache of all images pays off; what the rows do not show of caches."""
    if LIVE not in rows or "cached" not in rows:
        return []
    live, cached = rows[LIVE], rows["cached"].arithmetic
    count, images, few = views(Cell(LIVE, "student"), settings), live.steps * batch, sum(n for _, n in FEW.values())
    return [
        f"The cache of `cached` has {count} views, one of every image. Its build takes {cached.build / 1e12:.1f} x "
        f"10^12 operations. A run of {live.steps} steps sees {images} images, less than one pass. So the build pays "
        f"off after {pays_off_after(cached, live.arithmetic):.1f} such runs, or within one long run from its second "
        f"pass on (step {count // batch}).", "",
        f"Only the rows of few images see an image twice: {few} images, {images / few:.1f} times on average. What "
        "fixed views lose when images come again is what the cached ones of these rows lose against `few images`.", "",
    ]  # fmt: skip


def step_lines(step: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown: the time of a step at DUNE's proportions."""
    lines = [step["about"], "", "| step | processor s | live / this | arithmetic: live / this |", "|---|---|---|---|"]
    for name, found in step["steps"].items():
        low, high = found["range"]
        ratio = step["steps"]["live"]["seconds"] / found["seconds"]
        lines.append(
            f"| {name} | {found['seconds']:.2f} ({low:.2f} to {high:.2f}) | {ratio:.2f} | {found['arithmetic']:.2f} |"
        )
    return lines


def page(
    cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]], arithmetic: Mapping[str, Arithmetic],
    settings: Settings, batch: int, step: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """The whole page in Markdown."""
    rows = rows_of(cells, results, arithmetic)
    lines = ["# What each way to spend less saves and loses", "", _INTRODUCTION, "", *main_table(rows), ""]
    lines += ["![Quality over the teachers' arithmetic](quality.png)", "", *cache_lines(rows, settings, batch)]
    if diffs := difference_table(rows)[2:]:
        limits = {key: pooled_deviation(rows, key) for key in METRICS}
        shown = ", ".join(f"{METRICS[key]} {value:.3f}" for key, value in limits.items() if value is not None)
        lines += [
            "## Differences from `live`", "",
            "Seed by seed, mean and deviation. *Level*: within two standard errors, by the deviation of a difference, "
            f"pooled over the rows with live's start ({shown or 'more seeds are needed'}). Level means that these "
            "seeds show no difference, not that there is none.",
            "", *difference_table(rows)[:2], *diffs, "",
        ]  # fmt: skip
    if step is not None:
        lines += ["## A step at DUNE's proportions", "", *step_lines(step), ""]
    if checks := verdicts(rows, step):
        lines += ["## What it has to show", ""]
        lines += [f"- {'pass' if holds else 'FAIL'}: {sentence}" for holds, sentence in checks] + [""]
    missing = [cell.name for cell in cells if cell.name not in results]
    machines = sorted({f"{r['machine']['device']}, {r['machine']['threads']} threads" for r in results.values()})
    lines += [f"{len(results)} of {len(cells)} cells, on {'; '.join(machines) or 'no machine yet'}."]
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def read_step(results: Path) -> dict[str, Any] | None:
    """What `--step` has measured."""
    path = results / "step.json"
    return json.loads(path.read_text()) if path.is_file() else None
