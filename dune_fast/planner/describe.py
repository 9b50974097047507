"""`dune-fast plan`: what a run will take, before it is started: steps, arithmetic, memory, disk, hours.

Everything follows from the configuration. Hours need a rate, TFLOP/s of one device, which the user gives.
"""

from __future__ import annotations

from collections.abc import Sequence

from dune_fast.engine.config import RunConfig
from dune_fast.engine.flops import run_flops, stage_flops
from dune_fast.engine.memory import SPARE, disk_bytes, fit, memory_bytes, teacher_parameters, trained_parameters
from dune_fast.engine.metrics import duration
from dune_fast.engine.stages import partitions, shares
from dune_fast.planner.budget import mildest

_GPU_GIB = (16, 24, 40, 80)
"""Memory of GPUs that there are, for which parts are worked out."""


def describe(cfg: RunConfig, experiment: str, gpus: Sequence[int], tflops: float | None = None) -> list[str]:
    """The plan, as lines of text.

    Args:
        cfg: the run's.
        experiment: its name.
        gpus: numbers of devices to plan for.
        tflops: TFLOP/s that one device is taken to reach; without it there are no hours.
    """
    flops, (encoder, projectors) = run_flops(cfg), trained_parameters(cfg)
    frozen = list(teacher_parameters(cfg).values())
    networks = "not known" if None in frozen else f"{sum(count or 0 for count in frozen) / 1e6:.0f} M"
    batch, images = cfg.train.global_batch, cfg.steps * cfg.train.global_batch
    teachers = ", ".join(f"{name} {_tera(count)}" for name, count in flops.teachers.items())
    peak, warmup = cfg.optimizer.peak(batch), int(cfg.optimizer.warmup_fraction * cfg.steps)
    falls = {"constant": "then constant", "linear": f"linearly to {cfg.optimizer.min_lr:.3g}"}
    after = falls.get(cfg.optimizer.schedule, f"cosine to {cfg.optimizer.min_lr:.3g}")
    lines = [
        f"{experiment}: {cfg.steps:,} steps of {batch:,} images at {cfg.image_size} px = {images:,} images",
        f"  learning rate: warm-up to {peak:.3g} over {warmup:,} steps, {after}",
        f"  parameters: student {encoder / 1e6:.1f} M, projectors {projectors / 1e6:.1f} M, teachers {networks}",
        f"  TFLOP an image, forward: student {_tera(flops.student)}, projectors {_tera(flops.projectors)}, {teachers}",
    ]
    if cfg.progressive:
        stages = "; ".join(
            f"steps {stage.first + 1:,} to {stage.end:,} at {stage}, {_tera(part.training)} in training"
            for stage, part in stage_flops(cfg)
        )
        lines.append(f"  (means over the run, which is progressive: {stages})")
    if cfg.partitions:
        each = "; ".join(
            f"{part.images:,} images at {stage.px} for {', '.join(stage.teachers or cfg.teachers)}, counting "
            f"{share:.3g}" for part, stage, share in zip(cfg.partitions, partitions(cfg), shares(cfg), strict=True)
        )  # fmt: skip
        lines.append(f"  (means over a step's partitions, by {cfg.partition_by}: {each})")
    if flops.training is None:
        lines.append("  TFLOP an image in training: not known, as one teacher's network is not")
    else:
        total = flops.training * images
        lines.append(f"  TFLOP an image in training: {_tera(flops.training)}; the run: {total / 1e18:.3g} EFLOP")
        options = "presample", "route_by_dataset", "teachers_per_step"
        if given := [name for name in options if getattr(cfg.objective, name)]:
            lines.append(f"  (means over images: each goes to the teachers that it counts for, {given[0]})")
    for count in gpus:
        lines += _memory(cfg, experiment, count)
    lines.append(f"  disk: {disk_bytes(cfg) / 2**30:.2f} GiB at most")
    if tflops is None or flops.training is None:
        lines.append("  hours: give --tflops X, what one device reaches, or --gpu NAME; `--calibrate` measures it")
        return lines
    seconds = flops.training * images / (tflops * 1e12)
    times = "; ".join(f"{n} GPU{'s' if n > 1 else ''}: {duration(seconds / n)}" for n in gpus)
    lines.append(
        f"  a device, {images / seconds:.0f} images/s, at {tflops:g} TFLOP/s, as given: "
        f"{seconds / 3600:,.0f} GPU-hours; {times}"
    )
    if max(gpus) > 1:
        lines.append("  several GPUs are taken to be as fast as their number: communication is not counted")
    return lines


def remedy(cfg: RunConfig, experiment: str, count: int, available: int) -> str:
    """The command of the mildest change with which a run fits `count` devices of `available` bytes, or a sentence."""
    if found := mildest(cfg, count, available):
        _, lies, overrides = found
        more = " ".join(["train.accumulation=0", *overrides])
        return f"{lies}, by `dune-fast distill -n {count} experiment={experiment} {more}`"
    return (
        "no number of parts, activation checkpointing or ZeRO stage makes it fit: take more devices, a smaller student "
        "or image_size, or teachers in precision=fp8"
    )


def _memory(cfg: RunConfig, experiment: str, count: int) -> list[str]:
    """What lies on each of `count` GPUs, and in how many parts a step's images go there."""
    batch, parts = cfg.train.global_batch, cfg.train.accumulation
    unit = "1 GPU" if count == 1 else f"each of {count} GPUs"
    try:
        memory = memory_bytes(cfg, count)
    except ValueError as error:  # of partitions
        return [f"  {unit}: {error}"]
    shown = ", ".join(f"{name} {_gib(value)}" for name, value in memory.items())
    lines = [f"  memory of {unit} (ZeRO {cfg.deepspeed.zero_stage}), before the first image: {shown}"]
    if not cfg.partitions and batch % (count * max(parts, 1)):
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
