"""`dune-fast evaluate --task mapfree | pose | hmr`: predictions against the truth.

Predictions are a file, or are made from the data by an encoder and a head, and kept in the same format.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from rich.table import Table

from dune_fast.console import console
from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.engine.provenance import versions
from dune_fast.infer.opening import open_encoder, open_head
from dune_fast.teachers.local_paths import local_path, result_file

logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """A task that is measured on predictions."""

    measure: str
    """"module:function": (data, predictions, **options) -> {"metrics": {name: value}, ...}; both are paths."""
    predict: str
    """"module:function": (data, encoder, head, predictions, **options) writes the predictions."""
    kind: str
    """Of the head."""
    ending: str
    """Of the predictions' file."""
    paper: Mapping[str, float] = MappingProxyType({})
    """Metric -> number of the paper."""
    about: str = "DUNE, test scenes"
    """What the paper's numbers are of."""
    measure_options: tuple[str, ...] = ()
    """Further options of the command line that `measure` takes."""
    predict_options: tuple[str, ...] = ("pose_method", "long_side")
    """Those that `predict` takes."""


TASKS = {
    "mapfree": Measured(
        "dune_fast.evaluate.relocalisation:measure_mapfree", "dune_fast.infer.relocalisation:predict_mapfree",
        "mast3r", ".zip",
        {
            "Average Median Translation Error": 0.39, "Average Median Rotation Error": 4.6,
            "Average Median Reprojection Error": 47.4, "Precision @ VCRE < 90px": 0.811, "AUC @ VCRE < 90px": 0.943,
            "Precision @ VCRE < 45px": 0.644, "AUC @ VCRE < 45px": 0.840,
        },
    ),
    "pose": Measured(
        "dune_fast.evaluate.relocalisation:measure_poses", "dune_fast.infer.relocalisation:predict_poses",
        "mast3r", ".txt",
    ),
    "hmr": Measured(
        "dune_fast.evaluate.hmr:measure_people", "dune_fast.infer.multihmr:predict_people", "multihmr", "",
        {"pa_pve": 56.0, "f1": 94.0}, "DUNE 448, BEDLAM", ("body_model",), ("body_model",),
    ),
}  # fmt: skip
"""Task -> its functions, imported when asked for. The paper's numbers are DUNE's (CVPR 2025)."""


def run_measured(
    task: str, encoder: str, data: str, predictions: Path | None, head: Path | None, out: Path | None,
    device: str | None = None, precision: str = "auto", more: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    """Measures predictions, which an encoder and a head make first where they are given; prints a table.

    Args:
        task: a key of `TASKS`.
        encoder: a run or another name of an encoder; "" with `predictions`.
        data: the truth, see the task's module.
        predictions: a file or folder of them; None with an encoder and a head.
        head: see `dune_fast.load_head`.
        out: file for the result as JSON; without, a result of an encoder is TASK_DATA.json in the folder of its run or
            in the current one. The predictions that the head makes are kept beside it.
        device, precision: of encoder and head.
        more: further options, None where they are not given; see `Measured`.

    Returns:
        What the file says.

    Raises:
        ValueError: arguments that do not go together, or files that cannot be used.
    """
    began, chosen = time.monotonic(), TASKS[task]
    if not data:
        raise ValueError(f"--task {task} needs the truth: give --data (`dune-fast evaluate --help`)")
    if not encoder and predictions is None:
        raise ValueError(f"--task {task}: give --predictions FILE, or an encoder and its --head FILE")
    if predictions is not None and (encoder or head):
        raise ValueError(f"--task {task}: give --predictions or an encoder with its --head, not both")
    given = {name: value for name, value in more.items() if value is not None}
    used = chosen.measure_options + (() if predictions else chosen.predict_options)
    if strange := [name for name in given if name not in used]:
        where = f"--task {task}" + (" with --predictions" if predictions else "")
        raise ValueError(f"--{strange[0].replace('_', '-')} is not for {where}: leave it out")
    truth = local_path(data, "--data")
    if predictions is None and head is None:
        raise ValueError(f"--task {task} reads a head's predictions: give --head FILE beside the encoder")
    if predictions is None:
        out = out or _default_path(encoder, task, data)
    if out is not None:
        result_file(out)
    if predictions is None:
        assert out is not None and head is not None
        predictions = out.with_name(f"{out.stem}.predictions{chosen.ending}")
        opened = open_head(head, chosen.kind, device)
        loaded = open_encoder(encoder, opened, precision)
        _function(chosen.predict)(truth, loaded, opened, predictions, **_chosen(given, chosen.predict_options))
        logger.info("%s", predictions)
    found = _function(chosen.measure)(truth, predictions, **_chosen(given, chosen.measure_options))
    result = {
        "task": task, **found, "data": str(truth), "predictions": str(predictions), "encoder": encoder,
        "head": str(head or ""), "seconds": round(time.monotonic() - began, 1), "versions": versions(),
    }  # fmt: skip
    console().print(_table(result, chosen))
    if out is not None:
        # JSON has no NaN and no infinity, null stands for them
        strict = {name: value if math.isfinite(value) else None for name, value in result["metrics"].items()}
        write_whole(out, (json.dumps({**result, "metrics": strict}, indent=1, allow_nan=False) + "\n").encode())
        logger.info("%s", out)
    return result


def _chosen(given: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in names}


def _function(place: str) -> Callable[..., Any]:
    """The function of "module:name"."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _default_path(encoder: str, task: str, data: str) -> Path:
    name = re.sub(r"[^\w.-]+", "_", data.rstrip("/").rpartition("/")[2]) or "data"
    run = Path(encoder).expanduser()
    return (run / "evaluation" if (run / "config.yaml").is_file() else Path()) / f"{task}_{name}.json"


def _table(result: Mapping[str, Any], task: Measured) -> Table:
    """The metrics; beside them the paper's, and below how much was measured."""
    table = Table("metric", "value", *([task.about] if task.paper else []), title_justify="left")
    table.title = f"{result['task']}: {result['encoder'] or result['predictions']}"
    for name, value in result["metrics"].items():
        known = task.paper.get(name)
        table.add_row(name, f"{value:.4f}", *([] if known is None else [f"{known:g}"]))
    counts = {key: value for key, value in result.items() if isinstance(value, int) and key != "metrics"}
    table.caption = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items())
    return table
