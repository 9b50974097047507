"""Progressive resolution: the run's images are smaller at first; departs from the papers.

Data, teachers and student work at the size of the step; all else (order of images, randomness, schedules, optimizer,
teachers' statistics) goes on across a border. The student's position table keeps its size throughout and is
interpolated for smaller images as the encoder does for any other size. So weights, AdamW's moments and checkpoints have
the same shapes in every stage, and nothing is converted at a border: a run resumes at one as at any other step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from dune_fast.engine.config import RunConfig


class Stage(NamedTuple):
    """Steps at one size."""

    first: int
    """Its first step, from 0."""
    end: int
    """The step after its last."""
    image_size: int
    """Side of the images in pixels."""


def stages(cfg: RunConfig) -> list[Stage]:
    """The stages of a run, in their order; one for a run without `progressive`."""
    found, first = [], 0
    for entry in cfg.progressive:
        end = round(entry.until * cfg.steps)
        found.append(Stage(first, end, entry.image_size))
        first = end
    return [*found, Stage(first, cfg.steps, cfg.image_size)]


def stage_at(found: Sequence[Stage], step: int) -> Stage:
    """The stage of a step; the last one for steps beyond the run, which are decoded ahead."""
    return next((stage for stage in found if step < stage.end), found[-1])


def at_size(cfg: RunConfig, image_size: int) -> RunConfig:
    """The configuration of a run that is at this size throughout, to count with."""
    return dataclasses.replace(cfg, image_size=image_size, progressive=[])
