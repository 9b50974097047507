"""The same hours spent otherwise: less of the teachers, a smaller student, a start, smaller images first, a cache.

What is known of the quality has its source; all else is "not known".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from omegaconf import OmegaConf

from dune_fast.distill.narrowing import NarrowingError, check_pair
from dune_fast.engine.config import RunConfig, compose_config
from dune_fast.engine.flops import published_network, run_flops
from dune_fast.engine.overrides import config_names
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.planner.budget import Alternative, Machine, longest
from dune_fast.planner.cached import cached
from dune_fast.planner.numbers import COUNTED, Number
from dune_fast.student import StudentConfig
from dune_fast.teachers.config import TeacherConfig

_MEASURED = "measured on a small student and a short schedule: docs/training_well.md"
QUALITY = {
    "live, whole": "the recipe's own; no recipe has been run in full (docs/one_gpu.md)",
    "live": "weaker than the whole recipe; by how much is not known, no number is published for a shorter schedule",
    "FP8 teachers": "not known. `dune-fast teachers drift` measures the features; bench/NOTES.md, \"Teachers\", has "
    "two small ones",
    "smaller student": "not known",
    "start": f"better on short schedules, {_MEASURED}",
    "warm start": "not known; the papers start from drawn weights",
    "progressive": f"{_MEASURED}, \"Spending less\"",
    "presample": f"{_MEASURED}, \"Spending less\"",
    "teachers' scale": f"{_MEASURED}, \"Spending less\"",
    "cached": f"the papers show every image in a new crop; {_MEASURED}, "
    "\"Spending less\". What components and a share of the patches lose is not known; the report says how close they "
    "are",
}
"""What is known of the quality of each alternative, and from where."""
SCALE = 0.75
"""Of teachers' images."""


def alternatives(
    cfg: RunConfig, experiment: str, overrides: Sequence[str], machine: Machine, hours: float | None,
    disk: float | None, image_kb: float | None, images: int = 0,
) -> list[Alternative]:  # fmt: skip
    """The recipe as it is, then what else the hours buy.

    Args:
        disk: bytes that a cache of features may take; None leaves it out.
        image_kb: mean size of an image file.
        images: that the datasets have; 0 for the number that the configuration expects.
    """
    found: list[Alternative] = []
    whole = run_flops(cfg).training

    def add(name: str, about: str, more: list[str]) -> None:
        own, text = [*overrides, *more], QUALITY[name]
        try:
            changed = compose_config([f"experiment={experiment}", *own]) if more else cfg
            schedule = longest(changed, experiment, own, machine, hours, image_kb)
        except ValueError as error:
            found.append(Alternative(name, about, text, why=str(error)))
            return
        if name == "live" and schedule.full:
            text = QUALITY["live, whole"]
        flops, numbers = run_flops(changed).training, schedule.numbers
        if whole and flops:
            numbers = {"arithmetic": Number(100 * flops / whole, "% of the arithmetic an image", COUNTED)} | numbers
        found.append(Alternative(name, about, text, schedule, numbers, schedule.command))

    add("live", "the recipe, teachers on every image" if not cfg.cache.folder else "the recipe, from its cache", [])
    if not cfg.cache.folder:
        _less_of_the_teachers(cfg, machine, add, found)
    if smaller := _smaller_student(cfg):
        add("smaller student", f"student={smaller}", [f"student={smaller}"])
    if not cfg.student_weights and not cfg.start.teacher:
        if teacher := _start_teacher(cfg):
            more = [f"start.teacher={teacher}", "start.fit_projectors=true"]
            add("start", "first weights out of a teacher in closed form, as many steps", more)
        if weights := _student_weights(cfg):
            about = f"first weights from {weights[0]} (`dune-fast teachers fetch {weights[0]}`), as many steps"
            add("warm start", about, [f"student_weights={weights[1]}"])
    if not cfg.progressive and not cfg.partitions and not cfg.cache.folder:
        side = _smaller_side(cfg)
        option = f"progressive=[{{until: 0.5, image_size: {side}}}]"
        add("progressive", f"{side} px for the first half of the steps, then {cfg.image_size}", [option])
        text = QUALITY["cached"]
        found.append(cached(cfg, experiment, overrides, machine, hours, disk, image_kb, images, text))
    return found


def _less_of_the_teachers(cfg: RunConfig, machine: Machine, add: Callable, found: list[Alternative]) -> None:
    """Options that take less of the teachers' arithmetic in every step."""
    eight = [f"teachers.{name}.precision=fp8" for name in _vits(cfg) if cfg.teachers[name].precision != "fp8"]
    if eight and (machine.table is None or machine.table.fp8 is None):
        why = f"{machine.name} has no FP8 in the table of GPUs"
        found.append(Alternative("FP8 teachers", "teachers' products in float8", QUALITY["FP8 teachers"], why=why))
    elif eight:
        add("FP8 teachers", "teachers' products in float8, at 0.69 of their time in bf16", eight)
    objective = cfg.objective
    if objective.sharing == "full" and objective.drop_probability and not objective.presample:
        add("presample", "each image's teachers drawn before they run", ["objective.presample=true"])
    plain = [name for name in _vits(cfg) if cfg.teachers[name].scale == 1 and cfg.teachers[name].input_size is None]
    if scaled := [f"teachers.{name}.scale={SCALE}" for name in plain]:
        add("teachers' scale", f"teachers' images of {SCALE} of the side", scaled)


def _vits(cfg: RunConfig) -> list[str]:
    """Teachers whose blocks are ours: they can be in FP8, and take images of any size."""
    return [name for name, t in cfg.teachers.items() if isinstance(published_network(name, t), VisionTransformer)]


def _smaller_student(cfg: RunConfig) -> str | None:
    """The largest student of `configs/student` that is smaller, of the same family and patch size."""
    sizes = {}
    for name, path in config_names("student").items():
        other = OmegaConf.merge(OmegaConf.structured(StudentConfig), OmegaConf.load(path))
        size = other.embed_dim**2 * other.depth
        alike = (other.family, other.patch_size) == (cfg.student.family, cfg.student.patch_size)
        if alike and size < cfg.student.embed_dim**2 * cfg.student.depth:
            sizes[name] = size
    return max(sizes, key=sizes.__getitem__) if sizes else None


def _start_teacher(cfg: RunConfig) -> str | None:
    """The first teacher that the student can be made from."""
    for name, teacher in cfg.teachers.items():
        network = published_network(name, teacher)
        if isinstance(network, VisionTransformer):
            try:
                check_pair(cfg.student, network.cfg)
            except NarrowingError:
                continue
            return name
    return None


def _student_weights(cfg: RunConfig) -> tuple[str, str] | None:
    """A published encoder of the student's architecture, by its name in `configs/teachers`, and its file."""
    own = cfg.student
    for name, path in config_names("teachers").items():
        stored = OmegaConf.load(path)
        if stored.get("family") != "dinov2" or stored.get("num_features") != own.embed_dim:
            continue
        network = published_network(name, TeacherConfig(**OmegaConf.to_container(stored, resolve=True)))
        assert isinstance(network, VisionTransformer), name
        fields = ("embed_dim", "depth", "num_heads", "patch_size", "num_registers")
        if all(getattr(network.cfg, field) == getattr(own, field) for field in fields):
            return name, stored.weights
    return None


def _smaller_side(cfg: RunConfig) -> int:
    """Two thirds of the images' side, as the patches of student and teachers allow; the smallest that they take."""
    unit = math.lcm(*(t.grid_multiple for t in cfg.teachers.values())) * cfg.student.patch_size
    return max(unit, round(cfg.image_size * 2 / 3 / unit) * unit)
