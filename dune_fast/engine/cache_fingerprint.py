"""What a cache was made from: teachers, images, views. Another run's is compared field by field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dune_fast.cache.store import CacheError, Store
from dune_fast.dali_pipelines.datasets import Dataset
from dune_fast.engine.config import RunConfig
from dune_fast.engine.devices import autocast_dtype
from dune_fast.engine.same_ranks import fingerprint as of_images
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.files import file_sha256

_BOOKKEEPING = ("groups", "source", "force_precision", "attention", "compile", "url", "bytes", "sha256", "weights")
"""A teacher's fields that do not change its features, beyond rounding."""
_OPTIONS = {"activation": "", "projected": False, "input_size": None, "input_sizes": [], "mosaic": 0, "grid": "student"}
"""A teacher's fields that are left out at these values, as in caches of versions that did not have them."""
_VIEW = (
    "views", "fresh_colour", "colour", "crop_scale", "crop_ratio", "flip_probability", "jitter_probability",
    "brightness", "contrast", "saturation", "hue", "grayscale_probability", "blur_probability", "blur_sigma",
    "solarize_probability",
)  # fmt: skip
"""Fields of `data` that a view depends on."""
_STORED = ("format", "components", "patch_share")
"""Fields of `cache` that say what is stored of the features."""
_PIXELS = ("rotate", "shrink")
"""Fields of a dataset that change its images."""
_GONE = "not here"
_SHOWN = 4  # differences that a message lists


def fingerprint(cfg: RunConfig, datasets: Sequence[Dataset], device: torch.device) -> dict[str, Any]:
    """Field -> value, plain JSON, of everything that the features of a run's views follow from.

    Names of images are compared, of a large dataset some thousand; their contents when a run reads them (`Store.read`).
    """
    auto = "fp32" if autocast_dtype(cfg.train.precision, device) is None else "bf16"
    found: dict[str, Any] = {
        "image_size": cfg.image_size, "student.patch_size": cfg.student.patch_size, "train.seed": cfg.train.seed,
        **{f"data.{name}": getattr(cfg.data, name) for name in _VIEW},
        **{f"cache.{name}": getattr(cfg.cache, name) for name in _STORED},
    }  # fmt: skip
    for name, teacher in cfg.teachers.items():
        values = {k: v for k, v in asdict(teacher).items() if k not in _BOOKKEEPING}
        fields = {k: v for k, v in values.items() if k not in _OPTIONS or v != _OPTIONS[k]}
        fields["precision"] = auto if teacher.precision == "auto" else teacher.precision
        found |= {f"teachers.{name}.{key}": value for key, value in fields.items()}
        found[f"weights of teacher {name}"] = _weights(teacher)
    for dataset in datasets:
        found |= {f"data.datasets.{dataset.name}.{key}": getattr(dataset.config, key) for key in _PIXELS}
    return found | {key: value for key, value in of_images(datasets).items() if key.startswith("training")}


def _weights(teacher: TeacherConfig) -> str:
    """The SHA-256 of a weights file, `_GONE` where it is not on this machine; an asset's name and "random:SEED" as they
    are: they name one version alone."""
    path = Path(teacher.weights).expanduser()
    if teacher.weights.startswith(("asset:", "random:")):
        return teacher.weights
    return file_sha256(path) if path.is_file() else _GONE if not path.exists() else teacher.weights


def refuse_other(folder: str, made: dict[str, Any], wanted: dict[str, Any]) -> None:
    """CacheError naming the fields in which a cache differs from what a run wants. Weights that are not here, which a
    run from a cache need not have, are not compared."""
    names = [name for name in {**made, **wanted} if made.get(name) != wanted.get(name) and wanted.get(name) != _GONE]
    if not names:
        return
    shown = [f"{name}: {made.get(name, 'none')} there, {wanted.get(name, 'none')} here" for name in names[:_SHOWN]]
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise CacheError(
        f"the cache {folder} was made from something else: {'; '.join(shown)}{more}. Choose the same, or build another "
        "cache with `dune-fast cache build`"
    )


def open_cache(cfg: RunConfig, datasets: Sequence[Dataset], device: torch.device) -> Store:
    """The cache of a run; CacheError if it is not complete, or was made from something else."""
    store = Store(cfg.cache.folder, [(name, kind) for name, t in cfg.teachers.items() for kind in t.token_types])
    wanted = json.loads(json.dumps(fingerprint(cfg, datasets, device)))
    refuse_other(cfg.cache.folder, store.manifest["fingerprint"], wanted)
    return store
