"""The cells of the proof: what is trained and evaluated, one JSON each.

A cell is a pure function of its name and the settings. It trains through `dune-fast distill`, whose run folder resumes
after a kill; a cell whose JSON agrees in settings and images is not run again.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.proof.evaluation import Encoder, EvaluationConfig, evaluate
from bench.proof.packages import fetch_package
from bench.proof.scenes import SceneConfig
from dune_fast.engine.config import RunConfig, compose_config
from dune_fast.engine.devices import device_name
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.overrides import packaged_folder
from dune_fast.engine.start import START_FILE
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.load import load_encoder
from dune_fast.student import build_student
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.files import file_sha256, locked

TEACHERS = ("semantic", "saliency", "geometric")


@dataclass(frozen=True)
class Settings:
    """Sizes of the whole proof."""

    experiment: str = "proof"
    overrides: tuple[str, ...] = ()
    """Of every training, before the cell's own."""
    steps: int = 400
    ablation_steps: int = 120
    seeds: int = 3
    small: bool = False
    """Whether a ViT-S/14 is trained, too: on a GPU."""
    scenes: SceneConfig = field(default_factory=SceneConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


SMOKE = Settings(
    experiment="proof_smoke", steps=4, ablation_steps=4, seeds=2,
    scenes=SceneConfig(side=64, objects=24, photographs=8, bank_per_cutout=2, test_per_cutout=2),
    evaluation=EvaluationConfig(size=56, batch=8, neighbours=3, stereo_size=112, stereo_views=2),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One line of results."""

    row: str
    """Row of the table; cells that differ by the seed alone share it."""
    kind: str
    """"random", "teacher", "start" or "student"."""
    seed: int = 0
    part: str = "main"
    """Table that the row is in."""
    steps: int = 0
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its JSON and its run folder."""
        return f"{re.sub(r'[^A-Za-z]+', '_', self.row)}-{self.seed}"


def all_cells(settings: Settings) -> list[Cell]:
    """Cheap cells first, then the students, seed by seed, so that a proof cut short has whole comparisons."""
    cells = [Cell(f"teacher {name}", "teacher") for name in TEACHERS]
    seeds = range(settings.seeds)
    cells += [Cell("random", "random", seed) for seed in seeds]
    cells += [Cell("start", "start", seed, steps=2) for seed in seeds]
    undropped = ("objective.drop_probability=0",)
    for seed in seeds:
        cells.append(Cell("student of all", "student", seed, steps=settings.steps, overrides=undropped))
        cells.append(Cell("student of all, dropping", "student", seed, steps=settings.steps))
        for kept in TEACHERS:
            without = tuple(f"~teachers.{name}" for name in TEACHERS if name != kept)
            cells.append(Cell(f"student of {kept}", "student", seed, steps=settings.steps, overrides=without))
    if settings.small:
        small = "student=vit_small14"
        own_start = ("student_weights=", "start.teacher=semantic", *undropped)
        for seed in seeds:
            cells.append(Cell("random ViT-S/14", "random", seed, "small", overrides=(small,)))
            row = "student of all, ViT-S/14"
            cells.append(Cell(row, "student", seed, "small", settings.steps, (small, *own_start)))
    ablations: dict[str, tuple[str, ...]] = {
        "TP, full sharing, dropping": (),
        "LP": ("projector=lp",),
        "SP": ("projector=sp",),
        "generic sharing": ("objective.sharing=generic",),
        "no sharing": ("objective.sharing=none",),
        "no dropping": ("objective.drop_probability=0",),
        # the start's own file has its projectors
        "projectors as drawn": ("student_weights=", "start.teacher=semantic", "start.fit_projectors=false"),
        "from drawn weights": ("student_weights=",),
    }
    for seed in seeds:
        for row, overrides in ablations.items():
            cells.append(Cell(row, "student", seed, "ablation", settings.ablation_steps, overrides))
    return cells


@dataclass(frozen=True)
class Places:
    """Folders of a proof."""

    work: Path
    """Runs and first weights."""
    scenes: Path
    stereo: Path
    results: Path

    def start(self, seed: int) -> Path:
        """The weights that students of a seed start from."""
        return self.work / "runs" / f"start-{seed}" / START_FILE


def environment(places: Places) -> dict[str, str]:
    """Of a training: the folder of the images."""
    return {**os.environ, "DUNE_FAST_SCENES": str(places.scenes)}


def training_overrides(cell: Cell, settings: Settings, places: Places) -> list[str]:
    """What `dune-fast distill` is told. All students of a seed start from the same weights, those of its start."""
    start = [f"student_weights={places.start(cell.seed)}", "start.teacher="] if cell.kind == "student" else []
    return [
        f"experiment={settings.experiment}", f"name={cell.name}", f"output_dir={places.work / 'runs' / cell.name}",
        f"train.seed={cell.seed}", f"train.steps={cell.steps}", *start, *settings.overrides, *cell.overrides,
    ]  # fmt: skip


def identity(cell: Cell, settings: Settings, mark: str) -> dict[str, Any]:
    """What a result is a function of, as JSON gives it back."""
    used = {"cell": asdict(cell), "evaluation": asdict(settings.evaluation), "scenes": mark}
    if cell.kind in ("start", "student"):
        own = [word.removeprefix("experiment=") for word in cell.overrides if word.startswith("experiment=")]
        recipes = [packaged_folder() / "experiment" / f"{name}.yaml" for name in (settings.experiment, *own)]
        used["training"] = [settings.experiment, *map(file_sha256, recipes), *settings.overrides]
    return json.loads(json.dumps(used))


def finished(cell: Cell, settings: Settings, places: Places, mark: str) -> bool:
    """Whether its JSON is there and of these settings and images."""
    path = places.results / "cells" / f"{cell.name}.json"
    return path.is_file() and json.loads(path.read_text())["identity"] == identity(cell, settings, mark)


def run_cell(cell: Cell, settings: Settings, places: Places, mark: str) -> dict[str, Any]:
    """Trains where there is something to train, evaluates, writes the JSON; returns it.

    Raises:
        RuntimeError: the training has failed; its log is in the run's folder.
    """
    cfg = compose(settings, places, cell.overrides if cell.kind == "random" else ())
    began = time.perf_counter()
    command = ""
    if cell.kind in ("start", "student"):
        command = train(cell, settings, places, mark)
    trained = time.perf_counter()
    values = evaluate(
        make_encoder(cell, cfg, settings, places), places.scenes, places.stereo, settings.evaluation
    )
    seconds = {"training": trained - began, "evaluation": time.perf_counter() - trained}
    if command:
        seconds["steps"] = seconds_of_steps(places.work / "runs" / cell.name / "metrics.jsonl")
    result = {
        "identity": identity(cell, settings, mark),
        "values": values,
        "command": command,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "machine": {"device": machine_name(), "threads": torch.get_num_threads(), "torch": torch.__version__,
                    "python": platform.python_version()},
    }  # fmt: skip
    _write(places.results / "cells" / f"{cell.name}.json", json.dumps(result, indent=1) + "\n")
    return result


def train(cell: Cell, settings: Settings, places: Places, mark: str) -> str:
    """Runs `dune-fast distill`, unless the run has ended; returns the command with the folders' names alone."""
    if cell.kind == "student":
        train(next(c for c in all_cells(settings) if (c.kind, c.seed) == ("start", cell.seed)), settings, places, mark)
    run = places.work / "runs" / cell.name
    with locked(run.with_suffix(".lock"), f"the training of {cell.name}"):
        return _train(cell, settings, places, identity(cell, settings, mark))


def _train(cell: Cell, settings: Settings, places: Places, wanted: dict[str, Any]) -> str:
    run = places.work / "runs" / cell.name
    record = run.with_suffix(".json")
    overrides = training_overrides(cell, settings, places)
    known = json.loads(record.read_text()) if record.is_file() else None
    if known != wanted:  # what is there is of other settings
        shutil.rmtree(run, ignore_errors=True)
        _write(record, json.dumps(wanted))
    if not (run / "encoder.safetensors").is_file():
        log = run.with_suffix(".log")
        with open(log, "a") as sink:
            call = [sys.executable, "-m", "dune_fast", "distill", *overrides]
            status = subprocess.run(call, stdout=sink, stderr=sink, env=environment(places), check=False).returncode
        if status:
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            raise RuntimeError(f"{cell.name}: the training ended with status {status} ({log}): {last}")
    shown = [word.replace(f"{places.work}/", "WORK/") for word in overrides]
    return " ".join(["dune-fast distill", *(f"'{word}'" if "~" in word or " " in word else word for word in shown)])


def seconds_of_steps(metrics: Path) -> float:
    """Seconds of a run's steps, without what comes before and after them: waits for another cell's start, for one."""
    records = [record for record in read_metrics(metrics) if "step_seconds" in record]
    firsts = [0, *(record["step"] for record in records)]
    return sum((r["step"] - first) * r["step_seconds"] for r, first in zip(records, firsts, strict=False))


def make_encoder(cell: Cell, cfg: RunConfig, settings: Settings, places: Places) -> Encoder:
    """Images to cls and patch tokens, of the cell's network on the device that this machine has."""
    device = _device()
    if cell.kind == "teacher":
        name = cell.row.removeprefix("teacher ")
        ensemble = TeacherEnsemble({name: cfg.teachers[name]}, cfg.student.patch_size, device=device)

        def teacher(images: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
            tokens = ensemble(images.to(device))[name]
            cls = tokens.get("cls")
            return None if cls is None else cls.cpu(), tokens["patch"].cpu()

        return teacher
    if cell.kind == "random":
        vit = build_student(cfg.student, cfg.projector, cfg.teacher_features, cell.seed).encoder.eval()
    elif cell.kind == "start":
        vit = load_encoder(places.start(cell.seed))
    else:
        vit = load_encoder(places.work / "runs" / cell.name)
    return student_features(vit.to(device), device)


def machine_name() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return device_name(_device())
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def student_features(vit: VisionTransformer, device: torch.device) -> Encoder:
    """cls and patch tokens after the final norm."""

    def features(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = vit(images.to(device))
        return tokens["x_norm_clstoken"].cpu(), tokens["x_norm_patchtokens"].cpu()

    return features


def compose(settings: Settings, places: Places, more: Sequence[str] = ()) -> RunConfig:
    """The configuration that a cell's networks are described in."""
    os.environ["DUNE_FAST_SCENES"] = str(places.scenes)
    return compose_config([f"experiment={settings.experiment}", *settings.overrides, *more])


def stereo_folder() -> Path:
    """Of the stereo pair and its disparity, fetched if need be."""
    return fetch_package("scikit-image") / "skimage" / "data"


def read_results(results: Path, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Name -> result of the cells that have one."""
    paths = {cell.name: results / "cells" / f"{cell.name}.json" for cell in cells}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text)
    fresh.replace(path)
