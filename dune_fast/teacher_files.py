"""Teachers by the names of their files in `configs/teachers`, and whether their weights are on this machine."""

from __future__ import annotations

import difflib
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dune_fast.engine.overrides import config_names
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.files import cache_dir


def load_teacher_config(name: str) -> TeacherConfig:
    """One teacher's file, typed and resolved; ValueError if there is none or it is wrong."""
    known = config_names("teachers")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"there is no teacher {name!r}: {hint}known are {', '.join(sorted(known))}")
    path = known[name]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TeacherConfig), OmegaConf.load(path))
        cfg = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path} is not a teacher's configuration: {str(error).splitlines()[0]}") from error
    assert isinstance(cfg, TeacherConfig)
    return cfg


def is_cached(asset: str) -> bool:
    """Whether "asset:NAME" or "asset:NAME/FILE" has been fetched."""
    return (cache_dir() / asset.removeprefix("asset:").partition("/")[0]).is_dir()


def presence(cfg: TeacherConfig) -> str:
    """Whether the weights are here, without fetching anything: "yes", "no", "no, fetch", "drawn"."""
    from dune_fast.teachers.config import RANDOM

    if cfg.weights.startswith(RANDOM):
        return "drawn"
    if cfg.weights.startswith("asset:"):
        return "yes" if is_cached(cfg.weights) else "no, fetch"
    if Path(cfg.weights).expanduser().exists():  # a file, or the folder of a run
        return "yes"
    return "no, fetch" if cfg.url else "no"
