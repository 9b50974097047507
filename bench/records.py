"""What is measured and where it is kept: `results/<device>/` with one file for each bench, which all go through here.

    kernels.csv        a `Row` for every implementation of an operation     `python -m bench.kernels`
    step.json          a `Measured` for every variant of the step           `python -m bench.step`
    curve_NAME.csv     losses: a line a step, a column a variant            `python -m bench.step --curve`
    data.json          records of the loader                                `python -m bench.data`
    gpu.json           how every job ended                                  `python -m bench.gpu`

A newer measurement takes the place of the older one of the same key; all others stay. Reading needs neither torch nor
Hydra.
"""

from __future__ import annotations

import csv
import json
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CURVE_LIMITS = {"ours": 0.005, "ours+lean": 0.005, "ours+fp8": 0.02, "ours+bf16stream": 0.005}
"""Mean relative difference of the losses from the eager step's; routing trains on other losses and has none."""


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
    copy_gb_s: float
    """What a large copy reached in the same run, bytes read and written."""
    device: str
    versions: str

    @property
    def percent_of_copy(self) -> float:
        """Bytes over the median time, in percent of the copy's."""
        return 100 * self.bytes / self.median_us / 1e3 / self.copy_gb_s


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV that `write_rows` wrote; none if there is no file."""
    kinds = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in fields(Row)}
    return [Row(**{name: kind(line[name]) for name, kind in kinds.items()}) for line in read_csv(path)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows, sorted, in the place of older ones of the same operation, passes, type, shape, implementation."""
    merged = {astuple(row)[:5]: row for row in [*read_rows(path), *rows]}
    header = [*(field.name for field in fields(Row)), "percent_of_copy"]
    lines = [[*astuple(merged[key]), merged[key].percent_of_copy] for key in sorted(merged)]
    write_csv(path, header, [[f"{v:.2f}" if isinstance(v, float) else v for v in line] for line in lines])


@dataclass
class Measured:
    """One variant of the step of one experiment."""

    variant: str
    batch: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    tflops: float | None = None
    """Arithmetic of the whole step, every teacher on every image, over its time; None if a teacher's is unknown."""
    matrix_tflops: float | None = None
    """What a large matrix product in the type of the student's reached in the same run."""
    peak_bytes: int | None = None
    host_syncs: int | None = None
    launches: int | None = None
    """By the host; a CUDA graph is one."""
    gap_share: float | None = None
    """Share of the step in which nothing ran on the device."""
    versions: str = ""

    @property
    def images_per_second(self) -> float:
        return 1e3 * self.batch / self.median_ms

    @property
    def share_of_matrix_rate(self) -> float | None:
        """Arithmetic rate over what a matrix product reached in the same run."""
        return self.tflops / self.matrix_tflops if self.tflops is not None and self.matrix_tflops else None


def read_steps(path: Path) -> dict[str, list[Measured]]:
    """Experiment -> its variants, of a file that `write_step` wrote; none if there is no file."""
    return {
        name: [Measured(**line) for line in lines.values()]
        for name, lines in read_json(path).get("experiments", {}).items()
    }


def write_step(path: Path, experiment: str, device: str, result: Measured) -> None:
    """Writes a result in the place of an older one of the same experiment and variant."""
    content = {"experiments": {}} | read_json(path) | {"device": device}
    content["experiments"].setdefault(experiment, {})[result.variant] = asdict(result)
    write_json(path, content)


def relative_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Mean over steps of |a - b| / b."""
    return sum(abs(a - b) / b for a, b in zip(losses, reference, strict=True)) / len(reference)


def write_curves(path: Path, losses: dict[str, list[float]]) -> None:
    """Losses as a CSV: a line a step, a column a variant."""
    steps = enumerate(zip(*losses.values(), strict=True))
    write_csv(path, ["step", *losses], [[step, *(f"{value:.6g}" for value in values)] for step, values in steps])


def read_curves(path: Path) -> dict[str, list[float]]:
    """variant -> losses of a CSV that `write_curves` wrote; empty if there is no file."""
    lines = read_csv(path)
    return {name: [float(line[name]) for line in lines] for name in (lines[0] if lines else ()) if name != "step"}
