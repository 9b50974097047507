"""What a cache was made from: teachers, images, views. Another run's is compared field by field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dune_fast.cache.store import Store
from dune_fast.dali_pipelines.datasets import Dataset
from dune_fast.engine.config import ConfigError, RunConfig
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.files import file_sha256

_BOOKKEEPING = ("groups", "force_precision", "attention", "compile", "url", "bytes", "sha256", "weights")
"""A teacher's fields that do not change its features, beyond rounding."""
_VIEW = (
    "views", "fresh_colour", "colour", "crop_scale", "crop_ratio", "flip_probability", "jitter_probability",
    "brightness", "contrast", "saturation", "hue", "grayscale_probability", "blur_probability", "blur_sigma",
    "solarize_probability",
)  # fmt: skip
"""Fields of `data` that a view depends on."""
_NAMES = 4096  # images of a dataset whose names are compared
_SHOWN = 4  # differences that a message lists


def fingerprint(cfg: RunConfig, datasets: Sequence[Dataset]) -> dict[str, Any]:
    """Field -> value, plain JSON, of everything that the features of a run's views follow from."""
    found: dict[str, Any] = {
        "image_size": cfg.image_size, "student.patch_size": cfg.student.patch_size, "train.seed": cfg.train.seed,
        **{f"data.{name}": getattr(cfg.data, name) for name in _VIEW},
    }  # fmt: skip
    for name, teacher in cfg.teachers.items():
        fields = {key: value for key, value in asdict(teacher).items() if key not in _BOOKKEEPING}
        found |= {f"teachers.{name}.{key}": value for key, value in fields.items()}
        found[f"weights of teacher {name}"] = _weights(teacher)
    for dataset in datasets:
        found[f"images of dataset {dataset.name}"] = len(dataset.train)
        step = max(1, len(dataset.train) // _NAMES)
        names = "\n".join(dataset.train.relative(i) for i in range(0, len(dataset.train), step))
        found[f"names in dataset {dataset.name}"] = hashlib.sha256(names.encode(errors="replace")).hexdigest()
    return found


def _weights(teacher: TeacherConfig) -> str:
    """The SHA-256 of a weights file; what is asked for where that names one version alone (an asset, drawn weights)."""
    path = Path(teacher.weights).expanduser()
    return file_sha256(path) if path.is_file() else teacher.weights


def refuse_other(folder: str, made: dict[str, Any], wanted: dict[str, Any]) -> None:
    """ConfigError naming the fields in which a cache differs from what a run wants."""
    names = [name for name in {**made, **wanted} if made.get(name) != wanted.get(name)]
    if not names:
        return
    shown = [f"{name}: {made.get(name, 'none')} there, {wanted.get(name, 'none')} here" for name in names[:_SHOWN]]
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise ConfigError(
        f"the cache {folder} was made from something else: {'; '.join(shown)}{more}. Choose the same, or build another "
        "cache with `dune-fast cache build`"
    )


def open_cache(cfg: RunConfig, datasets: Sequence[Dataset]) -> Store:
    """The cache of a run; ConfigError if it is not complete, or was made from something else."""
    store = Store(cfg.cache.folder, [(name, kind) for name, t in cfg.teachers.items() for kind in t.token_types])
    wanted = json.loads(json.dumps(fingerprint(cfg, datasets)))
    refuse_other(cfg.cache.folder, store.manifest["fingerprint"], wanted)
    return store
