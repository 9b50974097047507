"""Sentences for configurations that do not compose: what is unknown, and what was probably meant."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any

from hydra.errors import MissingConfigException

from dune_fast.engine.overrides import config_names


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0]


def explain_missing(error: MissingConfigException) -> str:
    """'experiment/dmeo' -> a sentence with the close names and all names."""
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    names = sorted(config_names(group))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    kind = {"teachers": "teacher", "data": "dataset"}.get(group, group or "configuration")
    return (
        f"there is no {kind} {name!r}: {hint}known are {', '.join(names) or 'none'}. An own one is a file "
        f"configs/{group}/{name}.yaml in the current folder, or below --config-dir"
    )


def field_names(kind: Any, prefix: str = "") -> list[str]:
    """All dotted field names of the configuration."""
    names = []
    for f in dataclasses.fields(kind):
        names.append(prefix + f.name)
        default = f.default_factory() if callable(f.default_factory) else f.default
        if dataclasses.is_dataclass(default):
            names += field_names(type(default), f"{prefix}{f.name}.")
    return names


def explain(error: Exception, overrides: list[str], kind: type) -> str:
    """A sentence for an override that does not fit the schema `kind`."""
    text = str(error.__cause__ or error).strip()
    match = re.search(r"Could not override '([\w.@/]+)'|Key '([\w.]+)' not in", str(error))
    key = (match.group(1) or match.group(2)) if match else None
    if key is not None:
        if key.startswith("deepspeed.options"):
            return "entries of deepspeed.options are added with a plus in front: +deepspeed.options.SECTION.NAME=VALUE"
        close = difflib.get_close_matches(key, field_names(kind), n=3, cutoff=0.5)
        everything = "`dune-fast config experiment=demo` prints all fields"
        hint = f"; did you mean {' or '.join(close)}?" if close else f"; {everything}"
        return f"the configuration has no field {key!r}{hint}"
    if "not a subclass of TeacherConfig" in text:
        return (
            "a teacher is added as a file: write configs/teachers/NAME.yaml and give +teachers@teachers.NAME=NAME; one "
            "of timm's by its name: +teachers.NAME=timm:MODEL@FILE"
        )
    if "not a subclass of DatasetConfig" in text:
        return "datasets are added in a file: write configs/data/NAME.yaml with all of them and give data=NAME"
    lines = [line.strip() for line in text.split("\n") if line.strip() and "object_type" not in line]
    return f"the configuration cannot be composed from {' '.join(overrides) or 'no override'}: {'; '.join(lines)}"
