"""Quality over the teachers' arithmetic: one panel a metric, one number a row."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np

from bench.cost.options import DRAWN, LIVE
from bench.cost.table import METRICS, Row, differences
from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.evaluate.figure_numbers import write_csv

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen before)

_LABEL = (0.045, 0.05)  # width and height of a number, of a panel
_COLOURS = {True: "tab:orange", False: "tab:blue"}  # cached or not


def spread_out(points: Sequence[tuple[float, float]], size: tuple[float, float]) -> list[tuple[float, float]]:
    """Places for labels beside points of the unit square, so that they meet neither each other nor a point.

    Args:
        points: in [0, 1] x [0, 1].
        size: width and height of a label.
    """
    placed: list[tuple[float, float]] = []
    steps = [(dx / 2, dy / 2) for dx in range(-12, 13) for dy in range(-12, 13) if abs(dx) > 1 or abs(dy) > 1]
    steps.sort(key=lambda step: (np.hypot(step[0], 2 * step[1]), step))  # rather beside a point than on its bar
    for x, y in points:
        tried = [(x + dx * size[0], y + dy * size[1]) for dx, dy in steps]
        inside = [at for at in tried if all(s / 2 <= v <= 1 - s / 2 for v, s in zip(at, size, strict=True))]

        def meets(at: tuple[float, float]) -> bool:
            labels = any(abs(at[0] - a) < size[0] and abs(at[1] - b) < size[1] for a, b in placed)
            return labels or any(abs(at[0] - a) < 0.7 * size[0] and abs(at[1] - b) < 0.7 * size[1] for a, b in points)

        placed.append(next((at for at in inside if not meets(at)), inside[0]))
    return placed


def draw(rows: Mapping[str, Row]) -> bytes:
    """The figure as PNG. The row `live`, and what is level with it, is a line and a band; the row from drawn weights,
    far below the others, is a line of text."""
    shown = [row for row in rows.values() if row.name != DRAWN]
    numbers = {row.name: i + 1 for i, row in enumerate(shown)}
    figure, axes = plt.subplots(1, 1 + len(METRICS), figsize=(15, 5.6), width_ratios=[1] * len(METRICS) + [0.95],
                                layout="constrained")  # fmt: skip
    diffs = differences(rows)
    for axis, (key, title) in zip(axes, METRICS.items(), strict=False):
        bars = {name: found[key][1] or 0.0 for name, found in diffs.items()}
        _panel(axis, shown, numbers, key, bars)
        if LIVE in rows:
            level = mean(rows[LIVE].values[key].values())
            axis.axhline(level, color="black", lw=0.8, zorder=0)
            widest = max((d[key][2] for d in diffs.values() if d[key][2] is not None), default=0.0)
            axis.axhspan(level - widest, level + widest, color="0.92", zorder=-1)
        if DRAWN in rows:
            text = f"from drawn weights: {mean(rows[DRAWN].values[key].values()):.3f}"
            axis.text(0.03, 0.02, f"↓ {text}", transform=axis.transAxes, fontsize=9, color="0.35")
        axis.set(title=title, xlabel="teachers' operations of the run, 10$^{12}$")
    lines = [f"{numbers[row.name]:>2}  {textwrap.fill(row.name, 44, subsequent_indent='      ')}" for row in shown]
    note = ["", "orange: reads a cache, its build is not in", "line and band: live, and what is level with it",
            "bars: deviation of the difference from live"]  # fmt: skip
    text = "\n".join([*lines, *note])
    axes[-1].text(0, 1, text, va="top", fontsize=9, linespacing=1.25, transform=axes[-1].transAxes)
    axes[-1].axis("off")
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
    return file.getvalue()


def _panel(
    axis: plt.Axes, shown: Sequence[Row], numbers: Mapping[str, int], key: str, deviations: Mapping[str, float]
) -> None:
    """Points, bars and numbers."""
    x = np.array([row.arithmetic.teachers / 1e12 for row in shown])
    y = np.array([mean(row.values[key].values()) for row in shown])
    bars = np.array([deviations.get(row.name, 0.0) for row in shown])
    low, high = float((y - bars).min()), float((y + bars).max())
    margin = 0.12 * max(high - low, 1e-3)
    wide = max(x.max(), 1e-3)
    axis.set(xlim=(-0.1 * wide, 1.18 * wide), ylim=(low - 1.5 * margin, high + margin))
    for row, at, value, bar in zip(shown, x, y, bars, strict=True):
        colour = "black" if row.name == LIVE else _COLOURS[bool(row.arithmetic.build)]
        axis.errorbar(at, value, bar, fmt="o", ms=4.5, color=colour, ecolor=colour, elinewidth=0.7, alpha=0.8)
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    unit = [((a - left) / (right - left), (b - bottom) / (top - bottom)) for a, b in zip(x, y, strict=True)]
    for row, (a, b), (c, d) in zip(shown, unit, spread_out(unit, _LABEL), strict=True):
        axis.annotate(
            str(numbers[row.name]), (a, b), (c, d), "axes fraction", "axes fraction", ha="center", va="center",
            fontsize=9, bbox={"boxstyle": "square,pad=0.05", "fc": "white", "ec": "none", "alpha": 0.7},
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "0.6", "shrinkA": 3, "shrinkB": 2},
        )  # fmt: skip


def write_figure(folder: Path, rows: Mapping[str, Row]) -> None:
    """Writes quality.png and quality.csv."""
    header = ["row", "seeds", "steps", "teacher_flops", "flops", "build_flops"]
    header += [
        f"{key}_{what}" for key in METRICS for what in ("mean", "deviation", "difference_from_live", "level_within")
    ]
    diffs, table = differences(rows), []
    for row in rows.values():
        line = [row.name, row.seeds, row.steps, row.arithmetic.teachers, row.arithmetic.run, row.arithmetic.build]
        for key in METRICS:
            found = list(row.values[key].values())
            value, _, limit = diffs[row.name][key] if row.name in diffs else (None, None, None)
            line += [mean(found), stdev(found) if len(found) > 1 else None, value, limit]
        table.append(line)
    write_csv(folder / "quality.csv", header, table)
    write_whole(folder / "quality.png", draw(rows))
