"""The same hours spent otherwise: FP8 teachers, a smaller student, a start, smaller images first, features from disk.

What is known of the quality has its source; all else is "not known".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from omegaconf import OmegaConf

from dune_fast.distill.narrowing import NarrowingError, check_pair
from dune_fast.engine.config import ConfigError, RunConfig, compose_config
from dune_fast.engine.flops import published_network
from dune_fast.engine.overrides import config_names
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.planner.budget import Machine, Schedule, image_flops, longest, mildest, step_seconds
from dune_fast.planner.numbers import ESTIMATED, Number

_PROOF = "docs/training_well.md: a ViT-Ti/14 at 112 px, three seeds"
QUALITY = {
    "live, whole": "the recipe's own; no recipe has been run in full (docs/one_gpu.md)",
    "live": "weaker than the whole recipe; by how much is not known, no number is published for a shorter schedule. "
    f"From 120 to 400 steps IoU rose from 0.573 to 0.587, matching from 0.487 to 0.518 ({_PROOF})",
    "FP8 teachers": "not known. Two ViT-S/14 teachers differ by 1 - cosine of 4.8e-3 to 1.5e-2 from float32 "
    "(bench/NOTES.md, Teachers); the limit is 5e-3, and `dune-fast teachers drift` measures yours",
    "smaller student": "not known",
    "start": f"after 120 steps k-NN 0.393 instead of 0.211, IoU 0.573 instead of 0.317 ({_PROOF}); on long schedules "
    "a start matters less, by how much is not known",
    "progressive": "not known",
    "cached": "not known: the papers show every image in a new crop",
}
"""What is known of the quality of each alternative, and from where."""
_NO_CACHE = "`dune-fast cache build` makes it, with data.views = the views on disk / the number of your images"


@dataclass(frozen=True)
class Alternative:
    """One way to spend the hours."""

    name: str
    about: str
    quality: str
    schedule: Schedule | None = None
    numbers: dict[str, Number] = field(default_factory=dict)
    command: str = ""
    """Empty where there is none, and `why` says why."""
    why: str = ""


def _composed(experiment: str, overrides: Sequence[str]) -> RunConfig | None:
    """The configuration; None where this version does not have an option."""
    try:
        return compose_config([f"experiment={experiment}", *overrides])
    except ConfigError:
        return None


def alternatives(
    cfg: RunConfig, experiment: str, overrides: Sequence[str], machine: Machine, hours: float | None,
    disk: float | None, image_kb: float | None,
) -> list[Alternative]:  # fmt: skip
    """The recipe as it is, then what else the hours buy.

    Args:
        disk: bytes that a cache of features may take; None leaves it out.
        image_kb: mean size of an image file.
    """
    found: list[Alternative] = []

    def add(name: str, about: str, more: list[str], quality: str | None = None) -> None:
        own = [*overrides, *more]
        changed = _composed(experiment, own) if more else cfg
        assert changed is not None, own
        text = QUALITY[quality or name]
        try:
            schedule = longest(changed, experiment, own, machine, hours, image_kb)
        except ValueError as error:
            found.append(Alternative(name, about, text, why=str(error)))
            return
        if name == "live" and schedule.full:
            text = QUALITY["live, whole"]
        found.append(Alternative(name, about, text, schedule, schedule.numbers, schedule.command))

    add("live", "the recipe, teachers on every image", [])
    eight = [f"teachers.{name}.precision=fp8" for name in _vits(cfg)]
    if eight and (machine.table is None or machine.table.fp8 is None):
        why = f"{machine.name} has no FP8 in the table of GPUs"
        found.append(Alternative("FP8 teachers", "teachers' products in float8", QUALITY["FP8 teachers"], why=why))
    elif eight:
        add("FP8 teachers", "teachers' products in float8, at 0.69 of their time in bf16", eight)
    if smaller := _smaller_student(cfg):
        add("smaller student", f"student={smaller}", [f"student={smaller}"])
    if not cfg.student_weights and not cfg.start.teacher and (teacher := _start_teacher(cfg)):
        more = [f"start.teacher={teacher}", "start.fit_projectors=true"]
        add("start", "first weights out of a teacher in closed form, as many steps", more)
    if not cfg.progressive and not cfg.cache.folder:
        found.append(_progressive(cfg, experiment, overrides, machine, hours, image_kb))
        found.append(_cached(cfg, machine, hours, disk))
    return found


def _vits(cfg: RunConfig) -> list[str]:
    """Teachers whose blocks are ours, which can be in FP8, and are not yet."""
    names = [name for name, t in cfg.teachers.items() if t.precision != "fp8"]
    return [name for name in names if isinstance(published_network(name, cfg.teachers[name]), VisionTransformer)]


def _smaller_student(cfg: RunConfig) -> str | None:
    """The largest student of `configs/student` that is smaller, of the same patch size."""
    sizes = {}
    for name, path in config_names("student").items():
        other = OmegaConf.merge(OmegaConf.structured(ViTConfig), OmegaConf.load(path))
        size = other.embed_dim**2 * other.depth
        if other.patch_size == cfg.student.patch_size and size < cfg.student.embed_dim**2 * cfg.student.depth:
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


def _progressive(
    cfg: RunConfig, experiment: str, overrides: Sequence[str], machine: Machine, hours: float | None,
    image_kb: float | None,
) -> Alternative:  # fmt: skip
    """Two thirds of the side for the first half of the steps."""
    unit = math.lcm(*(t.grid_multiple for t in cfg.teachers.values())) * cfg.student.patch_size
    side = max(unit, round(cfg.image_size * 2 / 3 / unit) * unit)
    about = f"{side} px for the first half of the steps, then {cfg.image_size}"
    text = QUALITY["progressive"]
    if side >= cfg.image_size:
        return Alternative(
            "progressive", about, text, why=f"{cfg.image_size} px are the smallest that all teachers take"
        )
    scale = (1 + sum(image_flops(replace(cfg, image_size=side))) / sum(image_flops(cfg))) / 2
    try:
        schedule = longest(cfg, experiment, overrides, machine, hours, image_kb, scale)
    except ValueError as error:
        return Alternative("progressive", about, text, why=str(error))
    option = f"progressive=[{{until:0.5,image_size:{side}}}]"
    if _composed(experiment, [*overrides, option]) is None:
        why = "no command: this version has no option for it"
        return Alternative("progressive", about, text, schedule, schedule.numbers, why=why)
    command = schedule.command.replace(f"experiment={experiment}", f"experiment={experiment} '{option}'")
    return Alternative("progressive", about, text, schedule, schedule.numbers, command)


def view_bytes(cfg: RunConfig) -> int:
    """Bytes of one view's features: a byte a value of a patch and a float32 scale a channel; cls in bfloat16."""
    patches = (cfg.image_size // cfg.student.patch_size) ** 2
    sizes = {"patch": patches + 4, "cls": 2}
    return sum(sizes[token] * t.num_features for t in cfg.teachers.values() for token in t.token_types)


def _cached(cfg: RunConfig, machine: Machine, hours: float | None, disk: float | None) -> Alternative:
    """Teachers once over as many views as the disk holds, then the student alone."""
    about, text = "teachers once over fixed views, their features from disk", QUALITY["cached"]
    size = view_bytes(cfg)
    numbers = {"disk a view": Number(size / 1e6, "MB in int8", ESTIMATED)}
    if disk is None:
        return Alternative("cached", about, text, numbers=numbers, why="give --disk, e.g. 2TB, to plan it")
    found = mildest(cfg, machine.gpus, machine.memory)
    if found is None:
        return Alternative("cached", about, text, numbers=numbers, why="it does not fit the GPUs' memory")
    changed, _, _ = found
    _, frozen = image_flops(changed)
    rate = machine.gpus * machine.tflops.value * 1e12
    trained = step_seconds(changed, machine, teachers=False)
    batch = changed.train.global_batch
    whole = changed.steps * (trained + batch * frozen / rate)
    seconds = whole if hours is None else hours * 3600
    views = min(int(disk // size), int(seconds / (frozen / rate + trained / batch)))
    building = views * frozen / rate
    steps = min(changed.steps, int((seconds - building) / trained))
    if views < batch or steps < 2:
        return Alternative("cached", about, text, numbers=numbers, why="disk or hours do not hold one step's features")
    numbers |= {
        "views": Number(views, "views on disk", ESTIMATED),
        "disk": Number(views * size / 1e9, "GB", ESTIMATED),
        "building": Number(building / 3600, "h", ESTIMATED),
        "images": Number(steps * batch, "images", ESTIMATED),
        "passes": Number(steps * batch / views, "times every view", ESTIMATED),
        "share of the recipe": Number(100 * steps / changed.steps, "%", ESTIMATED),
        "speed": Number(batch / trained, "images/s", ESTIMATED),
        "features": Number(batch / trained * size / 1e6, "MB/s from disk", ESTIMATED),
        "hours": Number((building + steps * trained) / 3600, "h", ESTIMATED),
    }
    if machine.table is not None:
        watts = machine.gpus * machine.table.watts
        numbers["energy"] = Number(numbers["hours"].value * watts / 1e3, "kWh at most", ESTIMATED)
    return Alternative(
        "cached", about, text, numbers=numbers, why=_NO_CACHE
    )
