"""With `data.teacher_views`: which teachers see which crop, and what the step gets of them."""

from __future__ import annotations

from collections.abc import Collection

from dune_fast.dali_pipelines.loader import Batch
from dune_fast.dali_pipelines.teacher_views import OwnCrop
from dune_fast.distill.alignment import View
from dune_fast.engine.config import RunConfig
from dune_fast.engine.config_stages import moves_teachers
from dune_fast.teachers.config import teachers_by_input


class TeacherCrops:
    """The teachers' own crops of a run; none without `data.teacher_views`."""

    def __init__(self, cfg: RunConfig) -> None:
        groups = teachers_by_input(cfg.teachers) if cfg.data.teacher_views else []
        self._members = {names[0]: names for names in groups}
        self._moved = moves_teachers(cfg)
        self.crops = [OwnCrop(name, cfg.teachers[name].input_size) for name in self._members]
        """What the loader decodes."""

    def pictures(self, batch: Batch) -> dict:
        """teacher -> images [B, 3, T, T], for the ensemble."""
        found = batch.teacher_views or {}
        return {n: view["images"] for crop, view in found.items() if "images" in view for n in self._members[crop]}

    def wanted(self, teachers: Collection[str]) -> set[str]:
        """The crops that these teachers look at."""
        return {crop for crop, names in self._members.items() if set(names) & set(teachers)}

    def views(self, batch: Batch) -> dict[str, View]:
        """teacher -> how its crop lies to the student's, for the loss; nothing where all show the same."""
        found = (batch.teacher_views or {}) if self._moved else {}
        return {
            name: View(view["transform"], None, view["valid"])
            for crop, view in found.items()
            for name in self._members[crop]
        }
