"""Launching kernels with configurations from fixed tables, or recording launches to compile them without a GPU.

There is no autotuning: it would time kernels within a distributed run, and choose differently on each rank. A table
maps an architecture, or "default", to rows ordered by size. Below it stands its evidence: the device it was measured
on, or "Not yet measured: " and the reasoning.

A file of kernels describes its operations once: `examples(shape, dtype, device)` yields an `Example` of each form, and
AOT lists the (shape, dtype) to compile. `python -m bench.kernels --aot` calls them on meta tensors under `recording`,
which notes every launch; `tests/kernels/test_contract.py` calls them on small ones.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
"""Multiprocessors of A100, H100 and B200, for compiling ahead of time."""
VIT_CHANNELS = (192, 384, 768, 1024)
"""Widths of ViT-Ti, S, B and L."""
VIT_SHAPES = tuple(((128, 577, channels), torch.bfloat16) for channels in VIT_CHANNELS)
"""Shapes [B, N, C] at 336 pixels and their type, to compile ahead of time."""

_target: str | None = None
_recorded: list[Recorded] = []


class Example(NamedTuple):
    """One call of a registered operation."""

    label: str
    op: Any
    args: tuple


def draw(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal random numbers; none on the meta device."""
    return torch.randn(shape, device=device).to(dtype)


class Launch(NamedTuple):
    """One row of a launch table."""

    up_to: int
    """Largest size that the row serves, most often the number of channels."""
    options: dict[str, int]
    """Constants of the kernel, num_warps, num_stages."""


class Recorded(NamedTuple):
    """A launch that was written down and not made."""

    kernel: Any
    args: tuple
    options: dict[str, Any]
    grid: tuple[int, ...] = (1,)
    """How many programs, in up to three dimensions."""


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options); nothing for an empty grid."""
    if _target is not None:
        _recorded.append(Recorded(kernel, args, options, tuple(grid)))
    elif all(grid):
        kernel[tuple(grid)](*args, **options)


@contextlib.contextmanager
def recording(target: str) -> Iterator[list[Recorded]]:
    """Inside, `launch` only records, as if the device were `target` ("sm_90"); for implementations on meta tensors."""
    global _target
    before, _target = _target, target
    _recorded.clear()
    try:
        yield _recorded
    finally:
        _target = before


def is_recording() -> bool:
    """Whether launches are written down and not made."""
    return _target is not None


@functools.cache
def _properties(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return name, properties.multi_processor_count


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; "interpreter" on a CPU."""
    return _target or (_properties(device.index or 0)[0] if device.type == "cuda" else "interpreter")


def processors(device: torch.device) -> int:
    """Multiprocessors, for the size of persistent grids; 2 in the interpreter, whose cost is per program."""
    if _target is not None:
        return PROCESSORS[_target]
    return _properties(device.index or 0)[1] if device.type == "cuda" else 2


def choose(table: Mapping[str, Sequence[Launch]], device: torch.device, size: int) -> dict[str, int]:
    """Options of the first row that serves `size`, from the architecture's rows or those under "default".

    Raises:
        ValueError: `size` is larger than any row allows.
    """
    rows = table.get(architecture(device), table["default"])
    for row in rows:
        if size <= row.up_to:
            return dict(row.options)
    raise ValueError(f"the kernel takes up to {rows[-1].up_to} channels, got {size}")
