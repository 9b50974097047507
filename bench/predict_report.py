"""What `python -m bench.kernels --aot TARGET --predict` prints and writes of its predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

from bench.kernel_cases import OPERATIONS, moved_bytes
from bench.predict import DEVICES, WARPS, Prediction
from bench.records import read_rows, write_csv

TARGET_PERCENT = 85.0
FEATURE_KERNELS = ("moments", "distill_loss", "layer_norm", "gelu", "rope2d", "fp8")
"""Files of `kernels/` of which every operation is to reach TARGET_PERCENT of a copy."""


class Total(NamedTuple):
    """All launches of one pass of an operation, beside what was measured."""

    operation: str
    file: str
    passes: str
    dtype: str
    shape: str
    us: float
    percent: float
    """Of a copy of the minimal bytes."""
    limit: str
    """Of the longest launch."""
    measured_us: float | None
    measured_percent: float | None

    @property
    def below(self) -> bool:
        """Whether it is a feature kernel that misses TARGET_PERCENT."""
        return self.file in FEATURE_KERNELS and self.percent < TARGET_PERCENT


def totals(predictions: Sequence[Prediction], results: Path) -> list[Total]:
    """Predicted time of each operation's forward pass, backward pass and both; measured rows of that GPU's folder."""
    measured = {}
    for path in sorted(results.glob("*/kernels.csv")):
        for row in read_rows(path):
            if row.implementation == "ours":
                measured[row.device, row.operation, row.passes, row.dtype, row.shape] = row
    groups: dict[tuple, list[Prediction]] = {}
    for line in predictions:
        if line.limits is not None:
            groups.setdefault((line.operation, line.dtype, line.shape), []).append(line)
    out = []
    for (name, dtype, shape), lines in groups.items():
        operation = next(operation for operation in OPERATIONS if operation.name == name)
        device = DEVICES[lines[0].target]
        sides, kind = tuple(map(int, shape.split("x"))), getattr(torch, dtype)
        both = moved_bytes(operation, sides, kind, backward=True)
        forward = moved_bytes(operation, sides, kind, backward=False)
        minimal = {"forward": forward, "backward": both - forward, "forward+backward": both}
        for passes, size in minimal.items():
            part = [line for line in lines if line.passes in passes]
            if not part or (passes != "forward" and both == forward):
                continue
            us = sum(line.limits.us for line in part)
            row = next(
                (row for key, row in measured.items()
                 if key[0].startswith(device.name) and key[1:] == (name, passes, dtype, shape)), None,
            )  # fmt: skip
            longest = max(part, key=lambda line: line.limits.us)
            out.append(
                Total(
                    name, operation.file, passes, dtype, shape, us, 100 * size / us / 1e3 / device.copy_gb_s,
                    longest.limits.limit, row and row.median_us, row and row.percent_of_copy,
                )  # fmt: skip
            )
    return out


# ---------------------------------------------------------------- report

_BY = ("bytes", "issue", "alu", "fma", "xu", "lsu", "latency")


def launch_table(predictions: Sequence[Prediction]) -> Table:
    """One line a launch."""
    columns = ("regs", "warps/SM", "waves", "KiB in flight", "bits ld/st", "MB", "read again")
    table = Table("kernel", "case", *columns, *(f"us {name}" for name in _BY), "us", "% copy", "limit", box=None)
    for line in predictions:
        case = f"{line.operation} {line.passes} {line.dtype} {line.shape}"
        if line.limits is None:
            table.add_row(line.kernel, case, line.error)
            continue
        work, found = line.work, line.limits
        doubt = " **" if work.unknown_loops else " *" if work.unknown else ""
        table.add_row(
            line.kernel, case, str(work.registers), f"{found.occupancy * WARPS:.0f}", f"{found.waves:.1f}",
            f"{found.in_flight / 1024:.0f} of {found.needed / 1024:.0f}", "{}/{}".format(*work.widths),
            f"{work.bytes / 1e6:.1f}", f"{work.requested:.2f}x", *(f"{found.by[name]:.1f}" for name in _BY),
            f"{found.us:.1f}", f"{found.percent:.0f}", found.limit + doubt,
        )  # fmt: skip
    return table


def total_table(lines: Sequence[Total]) -> Table:
    """One line an operation and pass, predicted beside measured."""
    table = Table("operation", "case", "predicted us", "% copy", "limit", "measured us", "% copy", "target", box=None)
    for line in lines:
        measured = ["-", "-"]
        if line.measured_us is not None:
            measured = [f"{line.measured_us:.1f}", f"{line.measured_percent:.0f}"]
        verdict = "" if line.file not in FEATURE_KERNELS else "below" if line.below else "met"
        table.add_row(
            line.operation, f"{line.passes} {line.dtype} {line.shape}", f"{line.us:.1f}", f"{line.percent:.0f}",
            line.limit, *measured, verdict,
        )  # fmt: skip
    return table


_HEADER = (
    "target", "operation", "passes", "dtype", "shape", "kernel", "programs", "warps", "registers", "shared", "bytes",
    "read_again", "load_bits", "store_bits", "instructions_a_warp", "occupancy", "waves", "in_flight",
    "in_flight_needed", *(f"us_{name}" for name in _BY), "us", "percent_of_copy", "limit", "error",
)  # fmt: skip


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Everything that is known of each launch, as a CSV."""
    lines = []
    for line in predictions:
        label = [line.target, line.operation, line.passes, line.dtype, line.shape, line.kernel]
        if line.limits is None:
            lines.append([*label, *[""] * (len(_HEADER) - len(label) - 1), line.error])
            continue
        work, found = line.work, line.limits
        numbers = [found.occupancy, found.waves, found.in_flight, found.needed]
        numbers += [*(found.by[name] for name in _BY), found.us]
        lines.append(
            [*label, work.programs, work.warps, work.registers, work.shared, work.bytes, f"{work.requested:.3f}",
             *work.widths, f"{work.executed['issue']:.0f}", *(f"{x:.3f}" for x in numbers), f"{found.percent:.1f}",
             found.limit, ""]
        )  # fmt: skip
    write_csv(path, _HEADER, lines)
