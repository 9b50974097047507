"""What a shell offers after `dune-fast distill ` and TAB: names of experiments, fields of the configuration.

    eval "$(register-python-argcomplete dune-fast)"      in ~/.bashrc or ~/.zshrc
"""

from __future__ import annotations

from dune_fast.engine.overrides import config_names, field_names

GROUPS = ("experiment", "data", "student", "projector", "deepspeed")
"""Folders of `configs/` from which an override chooses one file."""


def complete_overrides(prefix: str, **_: object) -> list[str]:
    """Overrides that begin with `prefix`: "experiment=" with all its names, or fields up to their equals sign."""
    from dune_fast.engine.config import RunConfig

    group, equals, _value = prefix.partition("=")
    if equals:
        offered = [f"{group}={name}" for name in sorted(config_names(group))] if group in GROUPS else []
    else:
        offered = [f"{name}=" for name in sorted({*GROUPS, *field_names(RunConfig)})]
    return [text for text in offered if text.startswith(prefix)]
