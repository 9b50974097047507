"""What a GPU's results are held against, and whether they reach it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.gpu_jobs import Outcome
from bench.kernel_cases import OPERATIONS
from bench.records import (
    CURVE_LIMITS,
    Measured,
    Row,
    read_curves,
    read_json,
    read_rows,
    read_steps,
    relative_difference,
)

FORWARD, BOTH = "forward", "forward+backward"
EXPERIMENT, LARGE, IMAGES = "dune_336", "dune_448", 128
LOSS_OVER_EAGER, STEP_OVER_EAGER, FP8_OVER_BF16, DATA_OVER_STEP = 8.0, 2.5, 1.25, 1.3
OF_MATRIX_RATE, GAPS = 0.60, 0.03


@dataclass
class Results:
    """Everything that a device's folder holds."""

    device: dict
    outcomes: dict[str, Outcome]
    """By the job's name."""
    rows: list[Row]
    steps: dict[str, list[Measured]]
    """By experiment."""
    curves: dict[str, list[float]]
    """Losses of EXPERIMENT by variant."""
    data: dict
    """The newest record of `python -m bench.data`; empty if there is none."""

    @classmethod
    def read(cls, folder: Path) -> Results:
        """From a folder, of which any file may be absent."""
        record, data = read_record(folder), read_json(folder / "data.json")
        outcomes = {name: Outcome(**line) for name, line in record["jobs"].items()}
        tables = read_rows(folder / "kernels.csv"), read_steps(folder / "step.json")
        curves = read_curves(folder / f"curve_{EXPERIMENT}.csv")
        return cls(record["device"], outcomes, *tables, curves, list(data.values())[-1] if data else {})

    def published(self) -> list[Measured]:
        """Our variants that train on the published objective; routing leaves work out."""
        ours = [line for line in self.steps.get(EXPERIMENT, []) if line.variant.startswith("ours")]
        return [line for line in ours if "routing" not in line.variant]


def read_record(folder: Path) -> dict:
    """{"device": ..., "jobs": {name: fields of `Outcome`}} of a device's folder."""
    return read_json(folder / "gpu.json") or {"device": {}, "jobs": {}}


def percent(share: float | None, digits: int = 1) -> str:
    """0.5 -> "50.0 %"; nothing for None."""
    return "" if share is None else f"{100 * share:.{digits}f} %"


@dataclass(frozen=True)
class Target:
    """One target and what was found."""

    about: str
    wanted: str
    found: str = ""
    met: bool | None = None
    """None: not measured."""


def is_main(row: Row) -> bool:
    """Whether targets are for this row: bf16, ViT-L at 336 px, any number of images."""
    return row.dtype == "bfloat16" and row.shape.partition("x")[2] in ("577x1024", "3x336")


def targets(results: Results) -> list[Target]:
    """All of them, whether measured or not."""
    return [*_kernel_targets(results), *_step_targets(results)]


def _kernel_targets(results: Results) -> Iterator[Target]:
    kernels: dict[tuple[str, str], dict[str, Row]] = {}
    for row in filter(is_main, results.rows):
        kernels.setdefault((row.operation, row.passes), {})[row.implementation] = row
    for operation in OPERATIONS:
        for passes in (FORWARD, BOTH)[: (1 + bool(operation.bytes[1])) * bool(operation.goal)]:
            rows = kernels.get((operation.name, passes), {})
            about, wanted = f"`{operation.name}` {passes}", f"{operation.goal} % of a copy"
            if "ours" in rows:
                reached = rows["ours"].percent_of_copy
                yield Target(about, wanted, f"{reached:.1f} %", reached >= operation.goal)
            else:  # the others of the same inputs were timed
                yield Target(about, wanted, *(("wrong or failed: not timed", False) if rows else ()))
    compared = [("distill_loss", BOTH, "eager", LOSS_OVER_EAGER)]
    compared += [(name, p, "compile", 1.0) for name in ("layer_norm", "residual_layer_norm") for p in (FORWARD, BOTH)]
    for name, passes, other, times in compared:
        rows = kernels.get((name, passes), {})
        slow, fast = (rows[i].median_us if i in rows else None for i in (other, "ours"))
        yield _times(f"`{name}` {passes} over {other}", times, slow, fast)


def _times(about: str, wanted: float, slow: float | None, fast: float | None, more: str = "") -> Target:
    """How many times faster."""
    known = (f"{slow / fast:.2f} x{more}", slow / fast >= wanted) if slow and fast else ()
    return Target(about, f"{wanted:g} x", *known)


def _step_targets(results: Results) -> Iterator[Target]:
    steps = results.steps.get(EXPERIMENT, [])
    each = {line.variant: line.median_ms / line.batch for line in steps}
    yield _times("step, ours over plain PyTorch", STEP_OVER_EAGER, each.get("eager"), each.get("ours"))
    yield _times("step, FP8 teachers over bf16", FP8_OVER_BF16, each.get("ours"), each.get("ours+fp8"))

    bf16 = {line.share_of_matrix_rate: line.variant for line in results.published() if "fp8" not in line.variant}
    best = max(filter(None, bf16), default=None)
    known = (f"{percent(best)} ({bf16[best]})", best >= OF_MATRIX_RATE) if best else ()
    yield Target("step, arithmetic of the fastest in bf16", f"{percent(OF_MATRIX_RATE, 0)} of the matrix rate", *known)

    counted = [line for line in steps if "eager" not in line.variant and line.host_syncs is not None]
    waiting = ", ".join(f"{line.variant} {line.host_syncs}" for line in counted if line.host_syncs)
    yield Target("step, host syncs of all our variants", "0", *((waiting or "0", not waiting) if counted else ()))

    gaps = next((line.gap_share for line in steps if line.variant == "ours"), None)
    known = () if gaps is None else (percent(gaps), gaps < GAPS)
    yield Target("step, ours: time in which no kernel runs", f"under {percent(GAPS, 0)}", *known)

    large, outcome = results.steps.get(LARGE), results.outcomes.get("step-448")
    known = ("no result", False) if large or (outcome and outcome.status == "failed") else ()  # out of memory
    for line in large or ():
        if line.variant == "ours":
            peak = f"{line.peak_bytes / 2**30:.1f} GiB" if line.peak_bytes else "fit"
            known = f"{peak} ({line.batch} images)", line.batch >= IMAGES
    yield Target(f"{IMAGES} images a step at 448 px", "fit", *known)

    for name, limit in CURVE_LIMITS.items():
        losses = results.curves.get(name)
        difference = losses and relative_difference(losses, results.curves["eager"])
        known = (percent(difference, 2), difference < limit) if losses else ()
        yield Target(f"losses of {name} against plain PyTorch's", f"within {percent(limit)}", *known)

    rates = [median(line["rates"]) for line in results.data.get("contenders", []) if line["name"].startswith("ours")]
    best, fastest = max(rates, default=0.0), max((line.images_per_second for line in steps), default=0.0)
    about = "loader over what the fastest step consumes"
    yield _times(about, DATA_OVER_STEP, best, fastest, f" ({best:.0f} images/s)")
