"""`dune-fast evaluate NAME --task knn | linear | segmentation | depth`: runs it, keeps the result, prints a table."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.engine.devices import device_name
from dune_fast.engine.provenance import versions
from dune_fast.evaluate.classify import chance, classes_of, features_of, knn_task, linear_task, logistic_regression
from dune_fast.evaluate.crops import DepthCrop
from dune_fast.evaluate.dense import DenseTask, run_dense
from dune_fast.evaluate.model import FrozenModel, check_size, open_model
from dune_fast.evaluate.pairs import class_names, open_pairs
from dune_fast.evaluate.probe import RECIPES, recipe
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.files import head_bytes
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.files import cache_dir
from dune_fast.teachers.local_paths import local_path, result_file

logger = logging.getLogger(__name__)

TASKS = ("knn", "linear", "segmentation", "depth")

PAPER = {
    ("segmentation", "ade20k"): ("miou", 100.0, {
        "DUNE ViT-B/14, 448 px": 45.6, "DUNE ViT-B/14, 336 px": 44.9, "336 px, LP projectors": 44.7,
        "336 px, SP projectors": 42.3, "336 px, no data sharing": 41.6, "336 px, generic data sharing": 40.1,
    }),
    ("depth", "nyud"): ("rmse", 1.0, {
        "DUNE ViT-B/14, 448 px": 0.358, "DUNE ViT-B/14, 336 px": 0.377, "336 px, LP projectors": 0.384,
        "336 px, SP projectors": 0.413, "336 px, no data sharing": 0.426, "336 px, generic data sharing": 0.416,
    }),
}  # fmt: skip
"""(task, layout) -> metric, what ours is multiplied by, numbers of the paper (DUNE, CVPR 2025)."""


@dataclass(frozen=True)
class TaskOptions:
    """What the command line says; None for the task's own."""

    task: str
    data: str
    size: int | None = None
    """knn, linear: side of the square images. segmentation: of crops and windows."""
    batch: int | None = None
    iterations: int | None = None
    lr: float | None = None
    seed: int = 0
    layers: int = 1
    projector: str = ""
    layout: str = ""
    classes: int = 0
    max_depth: float = 10.0
    depth_scale: float = 1000.0
    cached: int = 0
    precision: str = "auto"
    threads: int = 4


def run_task(
    name: str, options: TaskOptions, out: Path | None, ranks: Ranks, teacher: Callable[[str], TeacherConfig] | None
) -> dict[str, Any]:
    """Runs a task; rank 0 prints the table and writes the result.

    Args:
        name: see `evaluate.model.open_model`.
        options: see `TaskOptions`.
        out: file for the result; None for `evaluation/TASK_DATA.json` in the run's folder, where `name` is one.
        ranks: all of them call this.
        teacher: configuration of a teacher by its name.

    Returns:
        What the file says.

    Raises:
        ValueError: see what is called here; each message says what to do.
    """
    began = time.monotonic()
    path = out or _default_path(name, options)
    if options.task not in TASKS:
        raise ValueError(f"--task {options.task}: choose one of {', '.join(TASKS)}")
    if not options.data:
        raise ValueError(f"--task {options.task} needs images: give --data FOLDER (`dune-fast evaluate --help`)")
    if options.task == "linear":
        logistic_regression()  # says what is missing before the features are computed
    if path is not None and ranks.rank == 0:
        result_file(path)
    model = open_model(
        name, ranks.device, teacher=teacher, projector=options.projector, norm=options.task != "depth",
        layers=options.layers, precision=options.precision,
    )  # fmt: skip
    run = _classify if options.task in ("knn", "linear") else _dense
    metrics, about, head = run(model, options, ranks)
    result = {
        "model": model.name, "weights_sha256": model.weights_sha256, "task": options.task, "metrics": metrics,
        **about, "options": asdict(options), "reading": model.reading, "device": device_name(ranks.device),
        "processes": ranks.size, "seconds": round(time.monotonic() - began, 1), "versions": versions(),
    }  # fmt: skip
    if ranks.rank == 0:
        Console(highlight=False).print(result_table(result))
        if path is None:
            logger.info("%s is no run's folder: --out FILE.json keeps the result", name)
        else:
            write_whole(path, (json.dumps(result, indent=1, default=str) + "\n").encode())
            if head is not None:
                write_whole(path.with_suffix(".head.safetensors"), head)
            logger.info("%s", path)
    return result


def _default_path(name: str, options: TaskOptions) -> Path | None:
    folder = Path(name).expanduser()
    if not (folder / "config.yaml").is_file():
        return None
    data = re.sub(r"[^\w.-]+", "_", options.data.rstrip("/").rpartition("/")[2]) or "data"
    projector = f"_{options.projector}" if options.projector else ""
    return folder / "evaluation" / f"{options.task}{projector}_{data}.json"


def _classify(model: FrozenModel, options: TaskOptions, ranks: Ranks) -> tuple[dict[str, float], dict, None]:
    if options.layers > 1:
        raise ValueError("--layers is for segmentation and depth")
    size = check_size(model, options.size)
    data = classes_of(options.data, options.seed)
    features = features_of(model, data, size, cache_dir() / "features", options.batch or 32, ranks)
    about = {
        "size": size, "images": [len(d.val) for d in data.datasets], "classes": len(data.classes),
        "most_frequent_class": chance(data), "layout": "classes",
    }  # fmt: skip
    if ranks.rank:
        return {}, about, None
    if options.task == "knn":
        return knn_task(features, data, ranks.device), about, None
    return linear_task(features, data, options.seed), about, None


def _dense(model: FrozenModel, options: TaskOptions, ranks: Ranks) -> tuple[dict[str, float], dict, bytes]:
    task = options.task
    root = local_path(options.data, "--data")
    train, val = open_pairs(root, task, options.layout, options.depth_scale)
    given = {"iterations": options.iterations, "lr": options.lr, "batch": options.batch, "seed": options.seed}
    if task == "segmentation":
        given["size"] = options.size
    cfg = recipe(task, **given)
    crop = DepthCrop(border=train.layout == "nyud")
    if task == "depth" and options.size is not None:
        crop = DepthCrop(options.size, round(options.size * crop.width / crop.height), crop.border)
    cached = check_size(model, options.cached) if options.cached else 0
    job = DenseTask(
        task, train, val, cfg, options.layers, options.classes, options.max_depth, crop, train.layout == "nyud",
        cached, options.threads, class_names(root) if task == "segmentation" else (),
    )  # fmt: skip
    metrics, head = run_dense(job, model, cache_dir(), ranks)
    plain = RECIPES[task]
    changed = [f for f in ("iterations", "lr", "batch", "size") if getattr(cfg, f) != getattr(plain, f)]
    if task == "depth" and options.size is not None:
        changed.append("size")
    if options.cached:
        changed.append(f"squares of {cached} px, tokens computed once")
    about = {
        "recipe": asdict(cfg), "images": [len(train), len(val)], "layout": train.layout, "cached": cached,
        "changed": changed,
    }  # fmt: skip
    return metrics, about, head_bytes(head)


def result_table(result: dict[str, Any]) -> Table:
    """The metrics; beside them the paper's where the task is the same."""
    task, layout = result["task"], result["layout"]
    counts = " and ".join(f"{n:,}" for n in result["images"])
    table = Table("metric", "value", show_header=False, title_justify="left")
    table.title, table.caption = f"{task}: {result['model']}", f"{counts} images"
    table.columns[1].justify = "right"
    for name, value in result["metrics"].items():
        table.add_row(name, f"{value:.4g}" if name.endswith("/C") else f"{value:.4f}")
    if "most_frequent_class" in result:
        table.add_row("the most frequent class, always", f"{result['most_frequent_class']:.4f}")
    if (known := PAPER.get((task, layout))) is not None:
        metric, factor, numbers = known
        table.add_section()
        changed = f"; not by its recipe: {', '.join(result['changed'])}" if result["changed"] else ""
        table.add_row(f"{metric} in the paper's unit{changed}", f"{factor * result['metrics'][metric]:.4g}")
        for row, value in numbers.items():
            table.add_row(row, f"{value:g}")
        if task == "segmentation":
            table.caption += "; the paper reads the DINOv2 projector (--projector)"
    return table
