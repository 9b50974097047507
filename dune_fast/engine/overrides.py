"""What a user writes for Hydra: text as it stands, files of the user's own, teachers of timm's, and what is wrong.

A field of type str takes any text, so its value is quoted wherever Hydra's grammar would refuse it or read something
else: a path `/data/a=b`, a name `1.10`. Imported before torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf

CONFIGS = "DUNE_FAST_CONFIGS"
"""Variable with further folders like `configs/`, separated as in PATH; `--config-dir` adds to it."""


def packaged_folder() -> Path:
    """The folder `configs/` of this installation."""
    return (Path(__file__).parents[1] / "configs").resolve()  # a link in a checkout


def own_folders() -> list[Path]:
    """The user's folders of configurations: those of DUNE_FAST_CONFIGS, and `./configs` where there is one.

    Raises:
        ValueError: a folder does not exist, or has a file of the name of a packaged one.
    """
    named = [Path(part).expanduser() for part in os.environ.get(CONFIGS, "").split(os.pathsep) if part]
    if missing := [folder for folder in named if not folder.is_dir()]:
        raise ValueError(f"{', '.join(map(str, missing))}: there is no such folder (--config-dir, or {CONFIGS})")
    packaged, found = packaged_folder(), []
    for folder in [*named, Path("configs")]:
        folder = folder.resolve()
        if folder.is_dir() and folder != packaged and folder not in found:
            _refuse_doubles(folder, packaged)
            found.append(folder)
    return found


def _refuse_doubles(folder: Path, packaged: Path) -> None:
    """ValueError for a file that hides behind a packaged one of another content."""
    for path in sorted(folder.rglob("*.yaml")):
        twin = packaged / path.relative_to(folder)
        if twin.is_file() and twin.read_bytes() != path.read_bytes():
            name = path.relative_to(folder).with_suffix("")
            raise ValueError(f"{path} has the name of a configuration that dune_fast brings, {name}: rename it")


def config_names(group: str) -> dict[str, Path]:
    """Name -> file of everything in a group, e.g. "experiment": the packaged ones and the user's."""
    folders = [*reversed(own_folders()), packaged_folder()]
    return {path.stem: path for each in folders for path in sorted((each / group).glob("*.yaml"))}


def take_text_literally(overrides: list[str], schema: type) -> list[str]:
    """The overrides with the values of text fields quoted where Hydra would not read them as they stand.

    Args:
        overrides: "field=value", with or without a plus; others are left alone.
        schema: dataclass of the whole configuration.
    """
    return [_literal(text, schema) for text in overrides]


def _literal(text: str, schema: type) -> str:
    key, equals, value = text.partition("=")
    if not equals or not _is_text(key.lstrip("+"), schema):
        return text
    try:
        parsed = OverridesParser.create().parse_override(text).value()
    except HydraException:
        parsed = ...
    if parsed is None or isinstance(parsed, (str, QuotedString)):
        return text
    return f"{key}={quoted(value)}"


def quoted(text: str) -> str:
    """A text as a string of Hydra's grammar, in which a backslash counts before a quote alone."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text) + "'"


def _is_text(key: str, schema: Any) -> bool:
    """Whether a dotted name is a field of type str, or str | None."""
    kind = schema
    for name in key.split("."):
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(name)
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            return False
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            kind = next(arm for arm in typing.get_args(kind) if arm is not types.NoneType)
    return kind is str


def with_timm_teachers(overrides: Sequence[str]) -> list[str]:
    """Overrides in which `+teachers.NAME=timm:MODEL[@FILE]` is a stored file of the group `teachers` and its choice.

    Further overrides of the same teacher (`teachers.NAME.token_types=[patch]`) then work as for any other.

    Raises:
        ValueError: timm does not know the model, or is not installed.
    """
    rewritten = []
    for override in overrides:
        if match := re.fullmatch(r"\+{0,2}teachers\.([A-Za-z_]\w*)=(['\"]?)(timm:.*)\2", override, re.DOTALL):
            from dune_fast.teachers.timm_names import from_shorthand  # imports torch

            name, _, text = match.groups()
            stored = f"timm_{name}_on_the_command_line"
            cfg = dataclasses.asdict(from_shorthand(name, text))
            ConfigStore.instance().store(group="teachers", name=stored, node=cfg)
            override = f"+teachers@teachers.{name}={stored}"
        rewritten.append(override)
    return rewritten


def expand_home(values: Any) -> Any:
    """Texts that begin with `~/`, in any depth, with the home folder in its place: a shell leaves `name=~/x` alone."""
    if isinstance(values, dict):
        return {key: expand_home(value) for key, value in values.items()}
    if isinstance(values, list):
        return [expand_home(value) for value in values]
    return os.path.expanduser(values) if isinstance(values, str) and values.startswith("~/") else values


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


def explain_group(overrides: Sequence[str]) -> str:
    """A sentence for an override that chooses a file for a run that goes on, with the fields to give; "" for none."""
    for override in overrides:
        group, _, name = override.lstrip("+").partition("=")
        if (path := config_names(group).get(name)) is None:
            continue
        prefix = "" if group == "experiment" else f"{group}."
        content = OmegaConf.to_container(OmegaConf.load(path))
        plain = {key: value for key, value in content.items() if isinstance(value, int | float | str)}
        given = [f"{prefix}{key}={value}" for key, value in plain.items() if "$" not in str(value)]
        return (
            f"{override} chooses a file of the group {group!r}, but a run that goes on has its own configuration: give "
            f"the fields instead, {' '.join(given[:3]) or f'{prefix}FIELD=VALUE'}"
        )
    return ""


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
        if re.match(r"head\.(options|data|loss)\.", key):
            name, _, entry = key.rpartition(".")
            return f"an entry that {name} has not yet is added with a plus in front: +{name}.{entry}=VALUE"
        if of_teachers := re.match(r"objective\.weights|projector\.teachers|standardization\.files", key):
            name = of_teachers.group()
            field = ".FIELD" * (name != "standardization.files")
            return f"an entry that {name} has not yet is added with a plus in front: +{name}.TEACHER{field}=VALUE"
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
