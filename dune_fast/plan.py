"""`dune-fast plan`: what a run will take, before it is started: steps, arithmetic, memory, disk, hours.

Hours come from measured steps alone (`bench/results/<device>/step.json`, written by `python -m bench.step`), or from a
rate that the user gives.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dune_fast.engine.config import RunConfig
from dune_fast.engine.flops import Flops, run_flops
from dune_fast.engine.memory import SPARE, disk_bytes, fit, memory_bytes, teacher_parameters, trained_parameters
from dune_fast.engine.metrics import duration
from dune_fast.engine.schedules import scaled_learning_rate

logger = logging.getLogger(__name__)

_GPU_GIB = (16, 24, 40, 80)
"""Memory of GPUs that there are, for which parts are worked out."""


def default_results() -> Path:
    """Where this checkout keeps its measurements."""
    return Path(__file__).resolve().parents[1] / "bench" / "results"


@dataclass(frozen=True)
class Rate:
    """How fast one device is."""

    device: str
    images_per_second: float
    """Of one device."""
    evidence: str
    """Where the number comes from."""


def measured_variant(cfg: RunConfig) -> str:
    """Which of `bench.step`'s variants runs as this configuration does."""
    if cfg.objective.route_by_dataset:
        return "ours+routing"
    return "ours+fp8" if any(t.precision == "fp8" for t in cfg.teachers.values()) else "ours"


def measured_rates(cfg: RunConfig, experiment: str, flops: Flops, results: Path) -> list[Rate]:
    """Rates of the devices whose step was measured.

    A measurement of the same experiment counts as it is; where there is none, arithmetic is taken to run as fast as in
    the experiment with the most similar amount of it.

    Args:
        cfg: the run's.
        experiment: its name among the results.
        flops: of the run.
        results: folder of folders, one a device, with `step.json`.
    """
    rates, variant = [], measured_variant(cfg)
    for path in sorted(results.glob("*/step.json")):
        try:
            content = json.loads(path.read_text())
            device = content["device"]
            found = {name: v[variant] for name, v in content["experiments"].items() if variant in v}
            if experiment in found:
                line = found[experiment]
                text = f"measured, {line['batch']} images a GPU ({variant})"
                rates.append(Rate(device, float(line["images_per_second"]), text))
                continue
            others = {name: v for name, v in found.items() if v.get("tflops")}
            if not others or flops.training is None or cfg.objective.route_by_dataset:
                continue
            work = {name: v["tflops"] * 1e12 / v["images_per_second"] for name, v in others.items()}
            nearest = min(others, key=lambda name: abs(math.log(work[name] / flops.training)))
            tflops = others[nearest]["tflops"]
            text = f"not measured; at the {tflops:.0f} TFLOP/s that {nearest} was measured with ({variant})"
            rates.append(Rate(device, tflops * 1e12 / flops.training, text))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s is not a result of bench.step and is left out: %r", path, error)
    return rates


def describe(
    cfg: RunConfig, experiment: str, gpus: Sequence[int], tflops: float | None = None, results: Path | None = None
) -> list[str]:
    """The plan, as lines of text.

    Args:
        cfg: the run's.
        experiment: its name.
        gpus: numbers of devices to plan for.
        tflops: what one device is taken to reach, beside what was measured.
        results: see `measured_rates`; this checkout's by default.
    """
    flops, (encoder, projectors), frozen = (
        run_flops(cfg),
        trained_parameters(cfg),
        list(teacher_parameters(cfg).values()),
    )
    networks = "not known" if None in frozen else f"{sum(count or 0 for count in frozen) / 1e6:.0f} M"
    batch, images = cfg.train.global_batch, cfg.steps * cfg.train.global_batch
    teachers = ", ".join(f"{name} {_tera(count)}" for name, count in flops.teachers.items())
    peak, warmup = scaled_learning_rate(cfg.optimizer.lr_per_256, batch), int(cfg.optimizer.warmup_fraction * cfg.steps)
    lines = [
        f"{experiment}: {cfg.steps:,} steps of {batch:,} images at {cfg.image_size} px = {images:,} images",
        f"  learning rate: warm-up to {peak:.3g} over {warmup:,} steps, cosine to {cfg.optimizer.min_lr:.3g}",
        f"  parameters: student {encoder / 1e6:.1f} M, projectors {projectors / 1e6:.1f} M, teachers {networks}",
        f"  TFLOP an image, forward: student {_tera(flops.student)}, projectors {_tera(flops.projectors)}, {teachers}",
    ]
    if flops.training is None:
        lines.append("  TFLOP an image in training: not known, as one teacher's network is not")
    else:
        total = flops.training * images
        lines.append(f"  TFLOP an image in training: {_tera(flops.training)}; the run: {total / 1e18:.3g} EFLOP")
        if cfg.objective.route_by_dataset:
            lines.append("  (means over images: each goes to the teachers that it counts for, route_by_dataset)")
    for count in gpus:
        lines += _memory(cfg, experiment, count)
    lines.append(f"  disk: {disk_bytes(cfg) / 2**30:.2f} GiB at most")
    rates = measured_rates(cfg, experiment, flops, results or default_results())
    if tflops is not None and flops.training is not None:
        rates.append(Rate("a device", tflops * 1e12 / flops.training, f"at {tflops:g} TFLOP/s, as given"))
    if not rates:
        lines.append("  hours: no measured rate. `python -m bench.step` measures one; or give --tflops X")
    for rate in rates:
        seconds = images / rate.images_per_second
        times = "; ".join(f"{n} GPU{'s' if n > 1 else ''}: {duration(seconds / n)}" for n in gpus)
        lines.append(
            f"  {rate.device}, {rate.images_per_second:.0f} images/s, {rate.evidence}: "
            f"{seconds / 3600:,.0f} GPU-hours; {times}"
        )
    if rates and max(gpus) > 1:
        lines.append("  several GPUs are taken to be as fast as their number: communication is not counted")
    return lines


_REMEDIES = (
    (),
    ("train.activation_checkpointing=true",),
    ("deepspeed=zero2",),
    ("train.activation_checkpointing=true", "deepspeed=zero2"),
    ("train.activation_checkpointing=true", "deepspeed=zero3"),
)
"""What is tried for a device that is too small, beside more parts (train.accumulation=0): the mildest first."""


def remedy(cfg: RunConfig, experiment: str, count: int, available: int) -> str:
    """The command of the mildest change with which a run fits its devices, or a sentence if there is none.

    Args:
        cfg: the run's.
        experiment: its name.
        count: devices.
        available: bytes of each.
    """
    for overrides in _REMEDIES:
        changed = copy.deepcopy(cfg)
        changed.train.accumulation = 0
        for override in overrides:
            if override.startswith("deepspeed="):
                changed.deepspeed.zero_stage = int(override[-1])
            else:
                changed.train.activation_checkpointing = True
        found = fit(changed, count, available)
        if found.fits:
            more = " ".join(["train.accumulation=0", *overrides])
            return f"{found}, by `dune-fast distill -n {count} experiment={experiment} {more}`"
    return (
        "no number of parts, activation checkpointing or ZeRO stage makes it fit: take more devices, a smaller student "
        "or image_size, or teachers in precision=fp8"
    )


def _memory(cfg: RunConfig, experiment: str, count: int) -> list[str]:
    """What lies on each of `count` GPUs, and in how many parts a step's images go there."""
    memory, batch, parts = memory_bytes(cfg, count), cfg.train.global_batch, cfg.train.accumulation
    shown = ", ".join(f"{name} {_gib(value)}" for name, value in memory.items())
    unit = "1 GPU" if count == 1 else f"each of {count} GPUs"
    lines = [f"  memory of {unit} (ZeRO {cfg.deepspeed.zero_stage}), before the first image: {shown}"]
    if batch % (count * max(parts, 1)):
        accumulated = f" x train.accumulation={parts}" if parts > 1 else ""
        return [*lines, f"  {batch} images cannot be shared by {count} GPUs{accumulated}"]
    how = f"train.accumulation={parts}" if parts else f"train.accumulation=0: worked out, {SPARE:.0%} spare"
    lines.append(f"    {batch // count} images a step, {how}")
    for size in _GPU_GIB[-1:] if parts else _GPU_GIB:
        found = fit(cfg, count, size * 2**30, parts=parts or None)
        lines.append(f"      {found}" + ("" if found.fits else ": that does not fit"))
        if not found.fits:
            lines.append(f"        instead {remedy(cfg, experiment, count, found.available)}")
    return lines


def _tera(count: int | None) -> str:
    return "not known" if count is None else f"{count / 1e12:.4g}"


def _gib(count: int | None) -> str:
    return "not known" if count is None else f"{count / 2**30:.2f} GiB"
