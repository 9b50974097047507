"""What a run's loss and standardization ask of its teachers, its cache and its start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dune_fast.distill.normalizers import ROTATED, STORED
from dune_fast.distill.phi_s import HadamardError, hadamard_base
from dune_fast.distill.phi_s_running import RunningPhiS
from dune_fast.engine.config_sections import ConfigError

if TYPE_CHECKING:
    from dune_fast.engine.config import RunConfig


def check_standardization(cfg: RunConfig) -> None:
    """ConfigError if a token type cannot have its convention."""
    conventions = {
        (name, token): cfg.standardization.of(token) for name, t in cfg.teachers.items() for token in t.token_types
    }
    files, known = cfg.standardization.files, ", ".join(sorted(cfg.teachers))
    if unknown := sorted(set(files) - set(cfg.teachers)):
        raise ConfigError(f"standardization.files has {', '.join(unknown)}; this run's teachers are: {known}")
    stored = {name for (name, _), convention in conventions.items() if convention in STORED}
    if without := sorted(stored - set(files)) if not cfg.standardization.file else []:
        raise ConfigError(
            f"standardization.files has nothing of {', '.join(without)}: name two files for each, or give "
            "standardization.file"
        )
    if "fixed" in conventions.values() and not cfg.cache.folder:
        raise ConfigError(
            "standardization.convention=fixed without cache.folder: its statistics are those of a cache; give the "
            "folder of one, or choose dune, unic or phi_s"
        )
    for (name, _), convention in conventions.items():
        if convention in ROTATED:
            try:
                hadamard_base(cfg.teachers[name].num_features)
            except HadamardError as error:
                choice = "choose standardization.convention=dune or unic"
                raise ConfigError(f"teacher {name!r}: {error}; {choice}") from None
    if cfg.start.fit_projectors and RunningPhiS.convention in conventions.values():
        raise ConfigError(
            "start.fit_projectors=true with standardization.convention=phi_s_running: its statistics begin with the "
            "training; choose phi_s, or leave the fit out"
        )


def check_objective(cfg: RunConfig) -> None:
    """ConfigError if the loss names what the teachers have not, or takes whole maps where there are none."""
    objective = cfg.objective
    if (drawn := objective.teachers_per_step) and drawn >= len(cfg.teachers):
        raise ConfigError(
            f"objective.teachers_per_step={drawn} of {len(cfg.teachers)} teachers: give fewer, or 0 for all of them"
        )
    for name, weights in objective.weights.items():
        if name not in cfg.teachers:
            known = ", ".join(sorted(cfg.teachers))
            raise ConfigError(f"objective.weights.{name} is of no teacher of this run; there are: {known}")
        tokens = cfg.teachers[name].token_types
        for token, weight in weights.items():
            if token not in tokens:
                raise ConfigError(f"objective.weights.{name}.{token}: the teacher has {' and '.join(tokens)} tokens")
            if not 0 <= weight < math.inf:
                raise ConfigError(f"objective.weights.{name}.{token}={weight}; it must be at least 0")
    if cfg.cache.folder and cfg.cache.patch_share < 1 and (objective.align or objective.patch.map_cosine):
        option = f"objective.align={objective.align}" if objective.align else "objective.patch.map_cosine"
        raise ConfigError(
            f"cache.patch_share={cfg.cache.patch_share:g} with {option}: it takes whole maps; leave one of them out"
        )
