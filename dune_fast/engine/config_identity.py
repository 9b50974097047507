"""Whether two configurations mean the same run: which fields count, their hash, what has changed; freezing."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dune_fast.engine.config import ConfigError, RunConfig, as_dict, flatten, without_removed

FREE = (
    "name", "output_dir", "evaluation", "deepspeed.zero_stage", "deepspeed.options", "data.num_threads",
    "data.prefetch", "data.read_ahead", "data.read_threads", "data.read_patience", "logging", "train.log_every",
    "train.notice_seconds", "train.checkpoint_every", "train.keep_checkpoints", "train.keep_every", "train.resume",
    "train.overwrite", "train.allow_config_change", "train.max_loss", "train.drift_images", "train.timeout_minutes",
    "train.rendezvous_minutes", "train.activation_checkpointing", "train.overlap_teachers", "train.deterministic",
    "cache.format", "cache.shard_megabytes", "train.ema", "head.threads", "head.ahead",
)  # fmt: skip
"""Fields and sections that a run may change when it goes on: beyond rounding, they do not change what is computed."""


def counted(values: dict[str, Any]) -> dict[str, Any]:
    """The flattened fields that count, those of `FREE` left out."""
    flat = flatten(values)
    return {k: v for k, v in flat.items() if not any(k == free or k.startswith(free + ".") for free in FREE)}


def config_hash(cfg: RunConfig) -> str:
    """SHA-256 of the fields that count."""
    return hashlib.sha256(json.dumps(counted(as_dict(cfg)), sort_keys=True).encode()).hexdigest()


def _completed(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with the defaults of fields that it is too old to have."""
    try:
        completed = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(RunConfig), without_removed(saved)))
    except (OmegaConfBaseException, ValueError):  # it has fields that are gone: they will be named
        completed = saved
    assert isinstance(completed, dict)
    return completed


def changes(saved: dict[str, Any], cfg: RunConfig) -> list[str]:
    """"field: old -> new" for every field that counts and has changed.

    A field that the saved configuration does not have, because it is older than the field, had its default.
    """
    old, new, absent = counted(_completed(saved)), counted(as_dict(cfg)), object()

    def shown(value: Any) -> str:
        return "(none)" if value is absent else json.dumps(value)

    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, absent), new.get(name, absent)
        # an empty dictionary is a leaf itself; once it has entries, these are listed
        if before != after and not (before in ({}, absent) and after in ({}, absent)):
            found.append(f"{name}: {shown(before)} -> {shown(after)}")
    return found


def refuse_changes(saved: dict[str, Any], cfg: RunConfig) -> None:
    """Raises ConfigError, naming the fields, if a run would go on under another configuration."""
    if found := changes(saved, cfg):
        raise ConfigError(
            f"the configuration has changed since the checkpoint was written: {'; '.join(found)}. Take the change "
            "back, go on with it by train.allow_config_change=true, or start anew with train.overwrite=true"
        )


@functools.cache
def _frozen_class(kind: type) -> type:
    def refuse(self: Any, name: str, value: Any) -> None:
        if "_frozen" in self.__dict__:
            raise dataclasses.FrozenInstanceError(
                f"{kind.__name__}.{name} cannot be changed: the configuration is frozen once the run has started"
            )
        object.__setattr__(self, name, value)

    def equal(self: Any, other: Any) -> Any:
        if not isinstance(other, kind):
            return NotImplemented
        return all(getattr(self, f.name) == getattr(other, f.name) for f in dataclasses.fields(kind))

    body = {"__setattr__": refuse, "__eq__": equal, "__hash__": None, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), body)


def freeze(value: Any) -> None:
    """Makes assignments to a configuration and to its sections raise, in place."""
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            freeze(entry)
    elif dataclasses.is_dataclass(value) and "_frozen" not in value.__dict__:
        for f in dataclasses.fields(value):
            freeze(getattr(value, f.name))
        value.__class__ = _frozen_class(type(value))
        value.__dict__["_frozen"] = True
