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

    def variant(self, name: str, experiment: str = EXPERIMENT) -> Measured | None:
        """One variant of the step, None if it was not measured."""
        return next((line for line in self.steps.get(experiment, []) if line.variant == name), None)

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
    for operation, passes in [(o, p) for o in OPERATIONS if o.goal for p in (FORWARD, BOTH)[: 1 + bool(o.bytes[1])]]:
        rows, least = kernels.get((operation.name, passes), {}), operation.goal
        about, wanted = f"`{operation.name}` {passes}", f"{least} % of a copy"
        if "ours" in rows:
            reached = rows["ours"].percent_of_copy
            yield Target(about, wanted, f"{reached:.1f} %", reached >= least)
        elif rows:  # the others of the same inputs were timed
            yield Target(about, wanted, "wrong or failed: not timed", False)
        else:
            yield Target(about, wanted)
    compared = [("distill_loss", BOTH, "eager", LOSS_OVER_EAGER)]
    compared += [(name, p, "compile", 1.0) for name in ("layer_norm", "residual_layer_norm") for p in (FORWARD, BOTH)]
    for name, passes, other, times in compared:
        rows = kernels.get((name, passes), {})
        slow, fast = (rows[i].median_us if i in rows else None for i in (other, "ours"))
        yield _times(f"`{name}` {passes} over {other}", times, slow, fast)


def _times(about: str, wanted: float, slow: float | None, fast: float | None) -> Target:
    """How many times faster."""
    if slow is None or fast is None:
        return Target(about, f"{wanted:g} x")
    return Target(about, f"{wanted:g} x", f"{slow / fast:.2f} x", slow / fast >= wanted)


def _step_targets(results: Results) -> Iterator[Target]:
    each = {line.variant: line.median_ms / line.batch for line in results.steps.get(EXPERIMENT, [])}
    yield _times("step, ours over plain PyTorch", STEP_OVER_EAGER, each.get("eager"), each.get("ours"))
    yield _times("step, FP8 teachers over bf16", FP8_OVER_BF16, each.get("ours"), each.get("ours+fp8"))

    bf16 = [line for line in results.published() if "fp8" not in line.variant and line.share_of_matrix_rate]
    best = max(bf16, key=lambda line: line.share_of_matrix_rate, default=None)
    found = best and f"{percent(best.share_of_matrix_rate)} ({best.variant})"
    about, wanted = "step, arithmetic of the fastest in bf16", f"{percent(OF_MATRIX_RATE, 0)} of the matrix rate"
    yield Target(about, wanted, found or "", best and best.share_of_matrix_rate >= OF_MATRIX_RATE)

    steps = [line for line in results.steps.get(EXPERIMENT, []) if "eager" not in line.variant]
    counted = {line.variant: line.host_syncs for line in steps if line.host_syncs is not None}
    waiting = ", ".join(f"{name} {value}" for name, value in counted.items() if value)
    about = "step, host syncs of all our variants"
    yield Target(about, "0", waiting or "0", not waiting) if counted else Target(about, "0")

    ours = results.variant("ours")
    gaps = ours and ours.gap_share
    about, wanted = "step, ours: time in which no kernel runs", f"under {percent(GAPS, 0)}"
    yield Target(about, wanted, percent(gaps), None if gaps is None else gaps < GAPS)

    about, wanted, large = f"{IMAGES} images a step at 448 px", "fit", results.variant("ours", LARGE)
    if large is not None:
        peak = f"{large.peak_bytes / 2**30:.1f} GiB" if large.peak_bytes else "fit"
        yield Target(about, wanted, f"{peak} ({large.batch} images)", large.batch >= IMAGES)
    else:  # out of memory, where the job left another variant's numbers or none
        outcome = results.outcomes.get("step-448")
        tried = LARGE in results.steps or (outcome is not None and outcome.status == "failed")
        yield Target(about, wanted, "no result" if tried else "", False if tried else None)

    for name, limit in CURVE_LIMITS.items():
        about, wanted = f"losses of {name} against plain PyTorch's", f"within {percent(limit)}"
        if name in results.curves:
            difference = relative_difference(results.curves[name], results.curves["eager"])
            yield Target(about, wanted, percent(difference, 2), difference < limit)
        else:
            yield Target(about, wanted)

    about, wanted = "loader over what the fastest step consumes", f"{DATA_OVER_STEP:g} x"
    rates = [median(line["rates"]) for line in results.data.get("contenders", []) if line["name"].startswith("ours")]
    fastest = max((line.images_per_second for line in results.steps.get(EXPERIMENT, [])), default=None)
    if rates and fastest:
        share = max(rates) / fastest
        yield Target(about, wanted, f"{share:.2f} x ({max(rates):.0f} images/s)", share >= DATA_OVER_STEP)
    else:
        yield Target(about, wanted)
