"""`+teachers.NAME=timm:MODEL[@FILE]`: a teacher of timm's without a file in `configs/teachers`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict

from hydra.core.config_store import ConfigStore

from dune_fast.teachers.timm_names import SHORTHAND, from_shorthand

_OVERRIDE = re.compile(rf"\+{{0,2}}teachers\.([A-Za-z_]\w*)=(['\"]?)({SHORTHAND}.*)\2", re.DOTALL)


def with_timm_teachers(overrides: Sequence[str]) -> list[str]:
    """Overrides for Hydra: each shorthand becomes a stored file of the group `teachers` and the choice of it.

    Further overrides of the same teacher (`teachers.NAME.token_types=[patch]`) then work as for any other.

    Raises:
        ValueError: timm does not know the model, or is not installed.
    """
    rewritten = []
    for override in overrides:
        if (match := _OVERRIDE.fullmatch(override)) is None:
            rewritten.append(override)
            continue
        name, _, text = match.groups()
        stored = f"timm_{name}_on_the_command_line"
        cfg = asdict(from_shorthand(name, text))
        ConfigStore.instance().store(group="teachers", name=stored, node=cfg)
        rewritten.append(f"+teachers@teachers.{name}={stored}")
    return rewritten
