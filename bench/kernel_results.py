"""Results of `python -m bench.kernels`: rows of a CSV that keeps what was not measured again, and the roofline."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One implementation of one operation on one shape; times are of the device, microseconds."""

    operation: str
    passes: str
    """ "forward" or "forward+backward"."""
    dtype: str
    shape: str
    """images x tokens x channels."""
    implementation: str
    median_us: float
    p20_us: float
    p80_us: float
    bytes: int
    """Minimal bytes that the operation moves."""
    flops: int
    copy_gb_s: float
    """What a large copy reached in the same run, bytes read and written."""
    device: str
    versions: str

    @property
    def key(self) -> tuple[str, ...]:
        """What a newer measurement replaces."""
        return self.operation, self.passes, self.dtype, self.shape, self.implementation

    @property
    def gb_s(self) -> float:
        """Minimal bytes over the median time."""
        return self.bytes / self.median_us / 1e3

    @property
    def percent_of_copy(self) -> float:
        return 100 * self.gb_s / self.copy_gb_s


DERIVED = ("gb_s", "percent_of_copy")


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV that `write_rows` wrote; none if there is no file."""
    if not path.exists():
        return []
    kinds = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in fields(Row)}
    with path.open(newline="") as file:
        return [Row(**{name: kind(line[name]) for name, kind in kinds.items()}) for line in csv.DictReader(file)]


def write_rows(path: Path, rows: Iterable[Row]) -> list[Row]:
    """Writes rows, sorted, in the place of older ones of the same key; returns all that the file now holds."""
    merged = {row.key: row for row in [*read_rows(path), *rows]}
    lines = [merged[key] for key in sorted(merged)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)] + list(DERIVED), lineterminator="\n")
        writer.writeheader()
        for row in lines:
            derived = {name: f"{getattr(row, name):.1f}" for name in DERIVED}
            numbers = {name: f"{getattr(row, name):.2f}" for name in ("median_us", "p20_us", "p80_us", "copy_gb_s")}
            writer.writerow(asdict(row) | numbers | derived)
    return lines


MARKERS = {"ours": "o", "compile": "s", "liger": "^", "eager": "x"}


def plot_roofline(path: Path, rows: Sequence[Row]) -> None:
    """Arithmetic rate over intensity under the bandwidth of a copy, and the share of it that each operation reaches.

    The largest shape of each operation is drawn; a kernel on the line moves the minimal bytes as fast as a copy does.

    Raises:
        ValueError: no row moves any bytes.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.bytes > 0]
    if not rows:
        raise ValueError("there is nothing to plot: no row moves any bytes")
    largest: dict[tuple[str, ...], int] = {}
    for row in rows:
        group = row.operation, row.passes, row.dtype
        largest[group] = max(largest.get(group, 0), row.bytes)
    rows = [row for row in rows if row.bytes == largest[row.operation, row.passes, row.dtype]]
    groups = sorted({(row.operation, row.passes, row.dtype) for row in rows})

    figure = Figure(figsize=(14, 2 + 0.32 * len(groups)), layout="constrained")
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
