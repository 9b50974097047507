"""Makes Hydra take what a user writes: text as it stands, and files of the user's own.

Hydra's grammar gives `=`, `,`, brackets and numbers a meaning. A field of type str takes any text, so its value is
quoted wherever Hydra would refuse it or read something else: a path `/data/a=b`, a name `1.10`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

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


def config_names(group: str, folder: Path | None = None) -> dict[str, Path]:
    """Name -> file of everything in a group, e.g. "experiment": the packaged ones (of `folder`) and the user's."""
    folders = [*reversed(own_folders()), folder or packaged_folder()]
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


def expand_home(values: Any) -> Any:
    """Texts that begin with `~/`, in any depth, with the home folder in its place: a shell leaves `name=~/x` alone."""
    if isinstance(values, dict):
        return {key: expand_home(value) for key, value in values.items()}
    if isinstance(values, list):
        return [expand_home(value) for value in values]
    return os.path.expanduser(values) if isinstance(values, str) and values.startswith("~/") else values
