"""What is measured and where it is kept: `results/<device>/` with one file for each bench, which all go through here.

    kernels.csv        a `Row` for every implementation of an operation     `python -m bench.kernels`
    step.json          a `Measured` for every variant of the step           `python -m bench.step`
    curve_NAME.csv     losses: a line a step, a column a variant            `python -m bench.step --curve`
    data.json          records of the loader, data_index.json of its index  `python -m bench.data`
    gpu.json           how every job ended                                  `python -m bench.gpu`

A newer measurement takes the place of the older one of the same key; all others stay. Reading needs neither torch nor
Hydra.
"""

from __future__ import annotations

import csv
import json
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.step_meter import Profile
    from dune_fast.engine.flops import Flops

RESULTS = Path(__file__).parent / "results"


def folder_name(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def versions() -> str:
    """Of what the numbers depend on."""
    import torch

    from dune_fast.kernels.library import triton

    toolkit = torch.version.cuda or torch.version.hip
    return f"torch {torch.__version__}, triton {triton and triton.__version__}, CUDA {toolkit}, {platform.system()}"


def write_text(path: Path, text: str) -> None:
    """Writes a file whole: what ends the process leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text)
    partial.replace(path)


def read_json(path: Path) -> dict:
    """The content of a file; empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, content: dict) -> None:
    """Writes what `read_json` reads."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_csv(path: Path) -> list[dict[str, str]]:
    """column -> text for every line; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Writes what `read_csv` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *lines])


# ---------------------------------------------------------------- kernels


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


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV that `write_rows` wrote; none if there is no file."""
    kinds = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in fields(Row)}
    return [Row(**{name: kind(line[name]) for name, kind in kinds.items()}) for line in read_csv(path)]


def write_rows(path: Path, rows: Iterable[Row]) -> list[Row]:
    """Writes rows, sorted, in the place of older ones of the same key; returns all that the file now holds."""
    merged = {row.key: row for row in [*read_rows(path), *rows]}
    lines = [merged[key] for key in sorted(merged)]
    digits = {"median_us": 2, "p20_us": 2, "p80_us": 2, "copy_gb_s": 2, "gb_s": 1, "percent_of_copy": 1}
    header = [*(field.name for field in fields(Row)), "gb_s", "percent_of_copy"]
    values = [[(getattr(row, name), digits.get(name)) for name in header] for row in lines]
    write_csv(path, header, [[v if places is None else f"{v:.{places}f}" for v, places in line] for line in values])
    return lines


# ---------------------------------------------------------------- steps and losses

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
        steps = [_sums(step) for step in spans]
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


def _sums(spans: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Parts that occur several times in a step, added up."""
    sums: dict[str, float] = {}
    for name, milliseconds in spans:
        sums[name] = sums.get(name, 0.0) + milliseconds
    return sums


def read_steps(path: Path) -> dict[str, list[Measured]]:
    """Experiment -> its variants, of a file that `write_steps` wrote; none if there is no file."""
    return {
        name: [Measured(**{k: v for k, v in line.items() if k != "versions"}) for line in lines.values()]
        for name, lines in read_json(path).get("experiments", {}).items()
    }


def write_steps(path: Path, experiment: str, device: str, versions: str, results: Sequence[Measured]) -> list[Measured]:
    """Writes results in the place of older ones of the same experiment and variant; returns the experiment's."""
    content = {"experiments": {}} | read_json(path) | {"device": device}
    lines = content["experiments"].setdefault(experiment, {})
    lines |= {result.variant: asdict(result) | {"versions": versions} for result in results}
    write_json(path, content)
    return read_steps(path)[experiment]


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
    steps = enumerate(zip(*losses.values(), strict=True))
    write_csv(path, ["step", *losses], [[step, *(f"{value:.6g}" for value in values)] for step, values in steps])


def read_curves(path: Path) -> dict[str, list[float]]:
    """variant -> losses of a CSV that `write_curves` wrote; empty if there is no file."""
    lines = read_csv(path)
    return {name: [float(line[name]) for line in lines] for name in (lines[0] if lines else ()) if name != "step"}
