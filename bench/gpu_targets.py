"""What a GPU's results are held against, and whether they reach it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.gpu_runner import Outcome
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

OF_A_COPY = "of a copy"
FORWARD, BOTH = "forward", "forward+backward"
_FEATURES = {  # operation -> its passes
    "moments": (FORWARD,), "distill_loss": (FORWARD, BOTH), "layer_norm": (FORWARD, BOTH),
    "residual_layer_norm": (FORWARD, BOTH), "residual_layer_norm_stream": (FORWARD, BOTH),
    "bias_gelu": (FORWARD, BOTH), "rope2d": (FORWARD, BOTH), "rope2d_": (FORWARD,), "quantize_rows": (FORWARD,),
    "layer_norm_fp8": (FORWARD,), "residual_layer_norm_fp8": (FORWARD,), "bias_gelu_fp8": (FORWARD,),
}  # fmt: skip
OF_COPY = {(name, passes): 85 for name, both in _FEATURES.items() for passes in both}
OF_COPY["augment_colour", FORWARD] = 80
"""(operation, passes) -> percent of a copy's bandwidth, at `is_main` shapes."""
NOT_SLOWER_THAN_COMPILED = ("layer_norm", "residual_layer_norm")
LOSS_OVER_EAGER = 8.0
STEP_OVER_EAGER, STEP_OVER_COMPILED, FP8_OVER_BF16 = 2.5, 1.4, 1.25
OF_MATRIX_RATE = 0.60
GAPS = 0.03
DATA_OVER_STEP = 1.3
IMAGES = 128
EXPERIMENT, LARGE = "dune_336", "dune_448"


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
        record = read_record(folder)
        data = read_json(folder / "data.json")
        return cls(
            record["device"],
            {name: Outcome.from_json(line) for name, line in record["jobs"].items()},
            read_rows(folder / "kernels.csv"),
            read_steps(folder / "step.json"),
            read_curves(folder / f"curve_{EXPERIMENT}.csv"),
            list(data.values())[-1] if data else {},
        )

    def variant(self, name: str, experiment: str = EXPERIMENT) -> Measured | None:
        """One variant of the step, None if it was not measured."""
        return next((line for line in self.steps.get(experiment, []) if line.variant == name), None)

    def kernels(self) -> dict[tuple[str, str], dict[str, Row]]:
        """(operation, passes) -> implementation -> row, in bf16 at the targets' shapes."""
        found: dict[tuple[str, str], dict[str, Row]] = {}
        for row in self.rows:
            if row.dtype == "bfloat16" and is_main(row.shape):
                found.setdefault((row.operation, row.passes), {})[row.implementation] = row
        return found


def read_record(folder: Path) -> dict:
    """{"device": ..., "jobs": {name: fields of `Outcome`}} of a device's folder."""
    return read_json(folder / "gpu.json") or {"device": {}, "jobs": {}}


def is_main(shape: str) -> bool:
    """Whether targets are for this shape: ViT-L at 336 px, any number of images."""
    return shape.partition("x")[2] in ("577x1024", "3x336")


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


def targets(results: Results) -> list[Target]:
    """All of them, whether measured or not."""
    return [*_kernels(results), *_step(results), *_curves(results), _data(results)]


def missed(found: Sequence[Target]) -> list[Target]:
    """Those that were measured and not reached."""
    return [target for target in found if target.met is False]


def _kernels(results: Results) -> Iterator[Target]:
    kernels = results.kernels()
    for (operation, passes), least in OF_COPY.items():
        rows = kernels.get((operation, passes), {})
        about, wanted = f"`{operation}` {passes}", f"{least} % {OF_A_COPY}"
        if "ours" in rows:
            reached = rows["ours"].percent_of_copy
            yield Target(about, wanted, f"{reached:.1f} %", reached >= least)
        elif rows:  # the others of the same inputs were timed
            yield Target(about, wanted, "wrong or failed: not timed", False)
        else:
            yield Target(about, wanted)
    loss = kernels.get(("distill_loss", BOTH), {})
    yield _times("`distill_loss` over plain PyTorch", LOSS_OVER_EAGER, _us(loss, "eager"), _us(loss, "ours"))
    for operation in NOT_SLOWER_THAN_COMPILED:
        for passes in (FORWARD, BOTH):
            rows = kernels.get((operation, passes), {})
            about = f"`{operation}` {passes} over torch.compile"
            yield _times(about, 1.0, _us(rows, "compile"), _us(rows, "ours"))


def _us(rows: dict[str, Row], implementation: str) -> float | None:
    return rows[implementation].median_us if implementation in rows else None


def _times(about: str, wanted: float, slow: float | None, fast: float | None) -> Target:
    """How many times faster."""
    if slow is None or fast is None:
        return Target(about, f"{wanted:g} x")
    return Target(about, f"{wanted:g} x", f"{slow / fast:.2f} x", slow / fast >= wanted)


def _per_image(result: Measured | None) -> float | None:
    """Milliseconds an image, so that steps of different sizes compare."""
    return result and result.median_ms / result.batch


def _step(results: Results) -> Iterator[Target]:
    ours, fp8 = results.variant("ours"), results.variant("ours+fp8")
    for about, wanted, slow, fast in (
        ("step, ours over plain PyTorch", STEP_OVER_EAGER, results.variant("eager"), ours),
        ("step, ours over torch.compile of it", STEP_OVER_COMPILED, results.variant("eager+compile"), ours),
        ("step, FP8 teachers over bf16", FP8_OVER_BF16, ours, fp8),
    ):  # fmt: skip
        yield _times(about, wanted, _per_image(slow), _per_image(fast))
    wanted = f"{percent(OF_MATRIX_RATE, 0)} of the matrix rate"
    bf16 = [line for line in results.steps.get(EXPERIMENT, []) if is_published(line) and "fp8" not in line.variant]
    bf16 = [line for line in bf16 if line.share_of_matrix_rate]
    best = max(bf16, key=lambda line: line.share_of_matrix_rate, default=None)
    about = "step, arithmetic of the fastest in bf16"
    if best is None:
        yield Target(about, wanted)
    else:
        share = best.share_of_matrix_rate
        yield Target(about, wanted, f"{percent(share)} ({best.variant})", share >= OF_MATRIX_RATE)
    syncs = {line.variant: line.host_syncs for line in results.steps.get(EXPERIMENT, []) if "eager" not in line.variant}
    counted = {name: value for name, value in syncs.items() if value is not None}
    waiting = ", ".join(f"{name} {value}" for name, value in counted.items() if value)
    yield Target(
        "step, host syncs of all our variants", "0", (waiting or "0") if counted else "",
        not waiting if counted else None,
    )  # fmt: skip
    gaps = ours and ours.gap_share
    about, wanted = "step, ours: time in which no kernel runs", f"under {percent(GAPS, 0)}"
    yield Target(about, wanted, percent(gaps), None if gaps is None else gaps < GAPS)
    yield _fits(results)


def is_published(line: Measured) -> bool:
    """Whether a variant is ours and trains on the published objective; routing leaves work out."""
    return line.variant.startswith("ours") and "routing" not in line.variant


def _fits(results: Results) -> Target:
    about, wanted = f"{IMAGES} images a step at 448 px", "fit"
    large, outcome = results.variant("ours", LARGE), results.outcomes.get("step-448")
    if large is None:  # out of memory, where the job left another variant's numbers or none
        tried = LARGE in results.steps or (outcome is not None and outcome.status == "failed")
        return Target(about, wanted, "no result" if tried else "", False if tried else None)
    peak = f"{large.peak_bytes / 2**30:.1f} GiB" if large.peak_bytes else "fit"
    return Target(about, wanted, f"{peak} ({large.batch} images)", large.batch >= IMAGES)


def _curves(results: Results) -> Iterator[Target]:
    for name, limit in CURVE_LIMITS.items():
        about, wanted = f"losses of {name} against plain PyTorch's", f"within {percent(limit)}"
        if name not in results.curves:
            yield Target(about, wanted)
            continue
        difference = relative_difference(results.curves[name], results.curves["eager"])
        found = f"{percent(difference, 2)} over {len(results.curves[name])} steps"
        yield Target(about, wanted, found, difference < limit)


def _data(results: Results) -> Target:
    about, wanted = "loader over what the fastest step consumes", f"{DATA_OVER_STEP:g} x"
    rates = [median(line["rates"]) for line in results.data.get("contenders", []) if line["name"].startswith("ours")]
    fastest = max((line.images_per_second for line in results.steps.get(EXPERIMENT, [])), default=None)
    if not rates or fastest is None:
        return Target(about, wanted)
    share = max(rates) / fastest
    return Target(about, wanted, f"{share:.2f} x ({max(rates):.0f} images/s)", share >= DATA_OVER_STEP)
