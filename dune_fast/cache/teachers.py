"""The teachers of a run that has a cache: they are loaded if something asks for them after all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.protocol import Teacher


class LateTeachers:
    """A `TeacherEnsemble` that is built at its first use: by a start, by PHI-S, by an evaluation on held-out images."""

    def __init__(self, build: Callable[[], TeacherEnsemble]) -> None:
        self._build = build

    @functools.cached_property
    def ensemble(self) -> TeacherEnsemble:
        """The teachers themselves."""
        return self._build()

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        """By name."""
        return self.ensemble.teachers

    def __call__(self, *inputs: Any) -> Any:
        return self.ensemble(*inputs)

    def release(self) -> None:
        """Gives their memory back."""
        self.__dict__.pop("ensemble", None)
