"""What a run's loss and standardization ask of its teachers, its cache and its start."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dune_fast.distill.normalizers import ROTATED, STORED
from dune_fast.distill.objective import ObjectiveConfig
from dune_fast.distill.phi_s import HadamardError, hadamard_base
from dune_fast.distill.phi_s_running import RunningPhiS
from dune_fast.engine.config_sections import CacheConfig, ConfigError, StandardizationConfig, StartConfig
from dune_fast.teachers.config import TeacherConfig


def check_standardization(
    cfg: StandardizationConfig, teachers: Mapping[str, TeacherConfig], cache: CacheConfig, start: StartConfig
) -> None:
    """ConfigError if a token type cannot have its convention."""
    conventions = {(name, token): cfg.of(token) for name, t in teachers.items() for token in t.token_types}
    if unknown := sorted(set(cfg.files) - set(teachers)):
        known = ", ".join(sorted(teachers))
        raise ConfigError(f"standardization.files has {', '.join(unknown)}; this run's teachers are: {known}")
    stored = {name for (name, _), convention in conventions.items() if convention in STORED}
    if without := sorted(stored - set(cfg.files)) if not cfg.file else []:
        raise ConfigError(
            f"standardization.files has nothing of {', '.join(without)}: name two files for each, or give "
            "standardization.file"
        )
    if "fixed" in conventions.values() and not cache.folder:
        raise ConfigError(
            "standardization.convention=fixed without cache.folder: its statistics are those of a cache; give the "
            "folder of one, or choose dune, unic or phi_s"
        )
    for (name, _), convention in conventions.items():
        if convention in ROTATED:
            try:
                hadamard_base(teachers[name].num_features)
            except HadamardError as error:
                choice = "choose standardization.convention=dune or unic"
                raise ConfigError(f"teacher {name!r}: {error}; {choice}") from None
    if start.fit_projectors and RunningPhiS.convention in conventions.values():
        raise ConfigError(
            "start.fit_projectors=true with standardization.convention=phi_s_running: its statistics begin with the "
            "training; choose phi_s, or leave the fit out"
        )


def check_objective(objective: ObjectiveConfig, teachers: Mapping[str, TeacherConfig], cache: CacheConfig) -> None:
    """ConfigError if the loss names what the teachers have not, or takes whole maps where there are none."""
    if (drawn := objective.teachers_per_step) and drawn >= len(teachers):
        raise ConfigError(
            f"objective.teachers_per_step={drawn} of {len(teachers)} teachers: give fewer, or 0 for all of them"
        )
    for name, weights in objective.weights.items():
        if name not in teachers:
            known = ", ".join(sorted(teachers))
            raise ConfigError(f"objective.weights.{name} is of no teacher of this run; there are: {known}")
        tokens = teachers[name].token_types
        for token, weight in weights.items():
            if token not in tokens:
                raise ConfigError(f"objective.weights.{name}.{token}: the teacher has {' and '.join(tokens)} tokens")
            if not 0 <= weight < math.inf:
                raise ConfigError(f"objective.weights.{name}.{token}={weight}; it must be at least 0")
    if cache.folder and cache.patch_share < 1 and (objective.align or objective.patch.map_cosine):
        option = f"objective.align={objective.align}" if objective.align else "objective.patch.map_cosine"
        raise ConfigError(
            f"cache.patch_share={cache.patch_share:g} with {option}: it takes whole maps; leave one of them out"
        )
