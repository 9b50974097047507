"""Results of `python -m bench.step`: one JSON file a device, a bar of parts for every variant, loss curves.

Reading them needs neither torch nor Hydra, which `bench.step` does.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.step_meter import Profile
    from dune_fast.engine.flops import Flops

EVERYTHING_ELSE = "everything else"
CURVE_LIMITS = {"ours": 0.005, "ours+lean": 0.005, "ours+fp8": 0.02, "ours+bf16stream": 0.005, "ours+stream": 0.005}
"""Mean relative difference of the losses from the eager step's; routing trains on other losses and has none."""


@dataclass
class Measured:
    """One variant of the step of one experiment."""

    variant: str
    batch: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    parts_ms: dict[str, float]
    """Median of every part; they add up to about the step."""
    images_per_second: float
    tflops: float | None = None
    """Arithmetic of the whole step, every teacher on every image, over its time; None if a teacher's is unknown."""
    matrix_tflops: float | None = None
    """What a large matrix product in the type of the student's reached in the same run."""
    matrix_tflops_fp8: float | None = None
    peak_bytes: int | None = None
    host_syncs: int | None = None
    kernels: int | None = None
    launches: int | None = None
    gap_share: float | None = None
    top_kernels: list[tuple[str, int, float]] = field(default_factory=list)
    """(name, calls, milliseconds)."""

    @classmethod
    def from_spans(
        cls, variant: str, batch: int, spans: Sequence[Sequence[tuple[str, float]]], flops: Flops,
        matrix_tflops: float, matrix_tflops_fp8: float | None = None,
    ) -> Measured:  # fmt: skip
        """From the (part, milliseconds) of every step; the part "step" is the whole."""
        steps = [dict_of_sums(step) for step in spans]
        times = [step["step"] for step in steps]
        middle = median(times)
        names = dict.fromkeys(name for step in steps for name in step if name not in ("step", "forward"))
        parts = {name: median(step.get(name, 0.0) for step in steps) for name in names}
        if any("forward" in step for step in steps):  # what of it no part claims is standardization, loss and dropping
            inner = sum(value for name, value in parts.items() if name.startswith(("teacher", "student")))
            parts["loss"] = max(0.0, median(step["forward"] for step in steps) - inner)
        parts[EVERYTHING_ELSE] = max(0.0, middle - sum(parts.values()))
        cuts = quantiles(times, n=5) if len(times) > 1 else [middle] * 4
        rate = None if flops.training is None else flops.training * batch / middle / 1e9
        return cls(
            variant, batch, middle, cuts[0], cuts[-1], parts, batch / middle * 1e3, rate, matrix_tflops,
            matrix_tflops_fp8,
        )  # fmt: skip

    @property
    def share_of_matrix_rate(self) -> float | None:
        """Arithmetic rate over what a matrix product reached in the same run."""
        return self.tflops / self.matrix_tflops if self.tflops is not None and self.matrix_tflops else None

    def add_profile(self, profile: Profile) -> None:
        """Takes over what the profiler saw."""
        self.kernels, self.launches = profile.kernels, profile.launches
        self.gap_share, self.top_kernels = profile.gap_share, profile.top


def dict_of_sums(spans: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Parts that occur several times in a step, added up."""
    sums: dict[str, float] = {}
    for name, milliseconds in spans:
        sums[name] = sums.get(name, 0.0) + milliseconds
    return sums


def read_results(path: Path) -> dict:
    """{"device", "versions", "experiments": {name: {variant: fields of `Measured`}}}; empty if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {"experiments": {}}


def merge_results(
    path: Path, experiment: str, device: str, versions: str, results: Sequence[Measured]
) -> list[Measured]:
    """Writes results in the place of older ones of the same experiment and variant; returns the experiment's."""
    content = read_results(path) | {"device": device}
    lines = content["experiments"].setdefault(experiment, {})
    for result in results:
        lines[result.variant] = asdict(result) | {"versions": versions}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return measured(content, experiment)


def measured(content: dict, experiment: str) -> list[Measured]:
    """The variants of one experiment of what `read_results` gives; none if it was not measured."""
    lines = content["experiments"].get(experiment, {})
    return [Measured(**{k: v for k, v in line.items() if k != "versions"}) for line in lines.values()]


def relative_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Mean over steps of |a - b| / b."""
    return sum(abs(a - b) / b for a, b in zip(losses, reference, strict=True)) / len(reference)


def compare_curves(losses: dict[str, list[float]], say: Callable[[str], None]) -> bool:
    """Says how far each variant's losses are from the eager ones; whether all are within their limits."""
    good = True
    for name, limit in CURVE_LIMITS.items():
        if name in losses:
            difference = relative_difference(losses[name], losses["eager"])
            good &= difference < limit
            say(
                f"{name}: mean relative difference of {len(losses[name])} losses from eager {difference:.2%} "
                f"(limit {limit:.1%}) {'ok' if difference < limit else 'FAIL'}"
            )
    return good


def write_curves(path: Path, losses: dict[str, list[float]]) -> None:
    """Losses as a CSV: a line a step, a column a variant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *losses])
        for step, values in enumerate(zip(*losses.values(), strict=True)):
            writer.writerow([step, *(f"{value:.6g}" for value in values)])


def read_curves(path: Path) -> dict[str, list[float]]:
    """variant -> losses of a CSV that `write_curves` wrote; empty if there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    return {name: [float(line[i]) for line in lines] for i, name in enumerate(header) if i > 0}


def plot_curves(path: Path, experiment: str, losses: dict[str, list[float]]) -> None:
    """The loss of every variant over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in losses.items():
        axes.plot(values, label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss", title=f"{experiment}, same images and seeds")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def plot_parts(path: Path, experiment: str, results: Sequence[Measured]) -> None:
    """Stacked bars: milliseconds of every part, a bar a variant."""
    from matplotlib.figure import Figure

    names = dict.fromkeys(name for result in results for name in result.parts_ms)
    figure = Figure(figsize=(11, 1.6 + 0.6 * len(results)), layout="constrained")
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
