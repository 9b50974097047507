"""Plans as text and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dune_fast.planner.budget import Alternative, Machine
from dune_fast.planner.gpus import EFFICIENCY, GPU
from dune_fast.planner.numbers import Number
from dune_fast.planner.scale import Scaled

_SIDE_BY_SIDE = ("arithmetic", "images", "share of the recipe", "speed", "hours", "energy")
_OF_A_CACHE = ("disk a view", "views", "disk", "building", "passes", "features")


def machine_lines(machine: Machine) -> list[str]:
    """The GPUs, and where their numbers come from."""
    lines = [f"{machine.gpus} x {machine.name}, {machine.memory / 2**30:.0f} GiB: {machine.tflops} each"]
    if machine.table is not None:
        table = machine.table
        eight = f", FP8 {table.fp8:g}" if table.fp8 else ", no FP8"
        lines.append(
            f"  published: {table.bf16:g} TFLOP/s in dense bf16{eight}, {table.bandwidth:,} GB/s, {table.watts} W "
            f"({table.source})"
        )
        if machine.tflops.how == "estimated":
            lines.append(
                f"  assumed: {EFFICIENCY:.0%} of the bf16 rate, on every GPU; `--calibrate` on the machine measures it"
            )
    else:
        lines.append("  not in the table of GPUs: no energy; its link is taken for PCIe 4.0 x16")
    return lines


def budget_lines(recipe: str, hours: float | None, found: Sequence[Alternative]) -> list[str]:
    """The recipe's schedule in full, then all alternatives side by side."""
    live, *others = found
    limit = "its whole length" if hours is None else f"at most {hours:g} h (given)"
    lines = [f"{recipe}, {limit}:"]
    if live.schedule is None:
        return [*lines, f"  {live.why}"]
    lines += [f"  {name + ':':<21}{number}" for name, number in live.numbers.items()]
    lines += [f"  quality: {live.quality}", f"  {live.command}"]
    if others:
        lines.append("the same hours otherwise:")
    for other in others:
        shown = [str(other.numbers[name]) for name in _SIDE_BY_SIDE if name in other.numbers]
        lines.append(f"  {other.name}: {other.about}")
        if shown:
            lines.append(f"    {', '.join(shown)}")
        if extra := [
            f"{n}: {v}" for n, v in other.numbers.items() if n in _OF_A_CACHE
        ]:
            lines.append(f"    {', '.join(extra)}")
        commands = [f"    {line}" for line in (other.build, other.command or other.why) if line]
        lines += [f"    quality: {other.quality}", *commands]
    return lines


def scale_lines(recipe: str, rows: Sequence[Scaled], how: str, given: Sequence[str]) -> list[str]:
    """A line for every number of machines; `how` is that of the GPUs' rate, `given` what else was taken."""
    lines = [f"{recipe} on many machines; {', '.join(given)}; all numbers estimated, the GPUs' rate is {how}"]
    header = ("nodes", "GPUs", "images a GPU", "step s", "compute", "gradients", "MB sent", "statistics", "efficiency")
    lines.append("  " + "".join(f"{name:>13}" for name in header) + "  read MB/s  cores a node  limit")
    for row in rows:
        s = row.seconds
        cells = (
            f"{row.nodes}", f"{row.gpus}", f"{row.images}", f"{row.step:.3f}", f"{s['compute']:.3f}",
            f"{s['gradients']:.4f}", f"{row.gradient_bytes / 1e6:,.0f}", f"{s['statistics']:.4f}",
            f"{row.efficiency:.1%}",
        )  # fmt: skip
        more = f"{row.storage_needed / 1e6:>11,.0f}{row.cores_needed:>14,.0f}  {row.bottleneck}"
        lines.append("  " + "".join(f"{cell:>13}" for cell in cells) + more)
    return lines


def plain(value: Any) -> Any:
    """Values for JSON: numbers with their unit and how they are known."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return asdict(value) if isinstance(value, Number) else value


def alternative_values(found: Alternative) -> dict[str, Any]:
    """One alternative."""
    about = {"name": found.name, "about": found.about, "quality": found.quality, "build": found.build or None}
    return about | {"command": found.command or None, "why": found.why or None, "numbers": plain(found.numbers)}


def machine_values(machine: Machine) -> dict[str, Any]:
    """The GPUs of a plan."""
    published = None
    if isinstance(machine.table, GPU):
        published = asdict(machine.table) | {"bf16": machine.table.bf16}
    return {
        "name": machine.name, "gpus": machine.gpus, "memory_gib": machine.memory / 2**30,
        "rate": plain(machine.tflops), "published": published,
    }  # fmt: skip
