"""Plots of what `bench.records` keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.records import Measured, Row


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # which all but plotting does without

    return Figure(figsize=(width, height), layout="constrained")


MARKERS = {"ours": "o", "compile": "s", "liger": "^", "eager": "x"}


def plot_roofline(path: Path, rows: Sequence[Row]) -> None:
    """Arithmetic rate over intensity under the bandwidth of a copy, and the share of it that each operation reaches.

    The largest shape of each operation is drawn; a kernel on the line moves the minimal bytes as fast as a copy does.

    Raises:
        ValueError: no row moves any bytes.
    """
    rows = [row for row in rows if row.bytes > 0]
    if not rows:
        raise ValueError("there is nothing to plot: no row moves any bytes")
    largest: dict[tuple[str, ...], int] = {}
    for row in rows:
        group = row.operation, row.passes, row.dtype
        largest[group] = max(largest.get(group, 0), row.bytes)
    rows = [row for row in rows if row.bytes == largest[row.operation, row.passes, row.dtype]]
    groups = sorted({(row.operation, row.passes, row.dtype) for row in rows})

    figure = _figure(14, 2 + 0.32 * len(groups))
    roofline, shares = figure.subplots(1, 2)
    copy = max(row.copy_gb_s for row in rows)
    intensities = [row.flops / row.bytes for row in rows]
    ends = [min(intensities) / 2, max(intensities) * 2]
    roofline.plot(ends, [copy * end for end in ends], color="black", label=f"copy, {copy:.0f} GB/s")
    for name, marker in MARKERS.items():
        chosen = [row for row in rows if row.implementation == name]
        if not chosen:
            continue
        x, rate = [row.flops / row.bytes for row in chosen], [row.flops / row.median_us / 1e3 for row in chosen]
        roofline.scatter(x, rate, marker=marker, label=name)
        heights = [groups.index((row.operation, row.passes, row.dtype)) for row in chosen]
        shares.scatter([row.percent_of_copy for row in chosen], heights, marker=marker, label=name)
    roofline.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s", title=rows[0].device)
    roofline.legend()
    shares.set(xlim=(0, 110), xlabel="percent of the bandwidth of a copy")
    shares.set_yticks(range(len(groups)), [f"{name} {passes} {dtype}" for name, passes, dtype in groups])
    shares.grid(axis="x")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot_curves(path: Path, experiment: str, losses: dict[str, list[float]]) -> None:
    """The loss of every variant over the steps."""
    figure = _figure(8, 4)
    axes = figure.subplots()
    for name, values in losses.items():
        axes.plot(values, label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss", title=f"{experiment}, same images and seeds")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def plot_parts(path: Path, experiment: str, results: Sequence[Measured]) -> None:
    """Stacked bars: milliseconds of every part, a bar a variant."""
    names = dict.fromkeys(name for result in results for name in result.parts_ms)
    figure = _figure(11, 1.6 + 0.6 * len(results))
    axes = figure.subplots()
    at = [0.0] * len(results)
    for name in names:
        widths = [result.parts_ms.get(name, 0.0) for result in results]
        axes.barh(range(len(results)), widths, left=at, label=name)
        at = [left + width for left, width in zip(at, widths, strict=True)]
    for i, result in enumerate(results):
        axes.text(at[i], i, f" {result.images_per_second:.0f} images/s", va="center")
    axes.set_yticks(range(len(results)), [result.variant for result in results])
    axes.invert_yaxis()
    title = f"{experiment}, {results[0].batch} images a step"
    axes.set(xlabel="milliseconds a step", title=title, xlim=(0, 1.15 * max(at)))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
