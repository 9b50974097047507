"""What `python -m bench.step` measures with: times of a step's parts, launches, gaps, host reads, memory, ceilings."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor

from dune_fast.kernels.fp8 import E4M3

TOP_KERNELS = 25


class PartTimer:
    """Times named parts of a step without waiting for the device: `with timer("backward"): ...`.

    On a GPU by CUDA events on the current stream, on a CPU by the clock. Calls may be nested; each part counts its own
    span.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, object, object]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((part, start, self._now()))

    def collect(self) -> list[tuple[str, float]]:
        """(part, milliseconds) of every span since the last call; waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
            times = [(part, start.elapsed_time(end)) for part, start, end in self._spans]
        else:
            times = [(part, (end - start) * 1e3) for part, start, end in self._spans]
        self._spans.clear()
        return times

    def _now(self) -> object:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def merged_length(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@dataclass
class Profile:
    """One step as the profiler saw it."""

    kernels: int
    """Kernels and copies that ran on the device."""
    launches: int
    """Launches by the host; a CUDA graph is one."""
    gap_share: float
    """Share of the step in which nothing ran on the device."""
    top: list[tuple[str, int, float]] = field(default_factory=list)
    """(kernel, calls, milliseconds), the longest first."""


_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
"""How the names of calls that launch begin: "ExC", "Ex" and, depending on CUDA, a version follow."""


def profile(step: Callable[[], object]) -> Profile:
    """Runs one step under torch's profiler; CUDA only."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    torch.cuda.synchronize()
    with torch_profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    on_device, launches = [], 0
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if not getattr(event, "is_user_annotation", False):
                on_device.append(event)
        elif event.name.startswith(_LAUNCHES):
            launches += 1
    intervals = [(event.time_range.start, event.time_range.end) for event in on_device]
    span = max(end for _, end in intervals) - min(start for start, _ in intervals)
    totals: dict[str, tuple[int, float]] = {}
    for event in on_device:
        calls, milliseconds = totals.get(event.name, (0, 0.0))
        totals[event.name] = calls + 1, milliseconds + event.time_range.elapsed_us() / 1e3
    top = sorted(((name, *counted) for name, counted in totals.items()), key=lambda line: -line[2])[:TOP_KERNELS]
    return Profile(len(on_device), launches, 1 - merged_length(intervals) / span, top)


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Notes every call of a `synchronize`, which CUDA's sync debug mode does not see."""
    found: list[str] = []

    def counted(owner: object) -> Callable[..., object]:
        original = owner.synchronize

        def synchronize(*args: object, **kwargs: object) -> object:
            found.append(owner.__name__)
            return original(*args, **kwargs)

        return synchronize

    with ExitStack() as stack:
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            stack.enter_context(mock.patch.object(owner, "synchronize", counted(owner)))
        yield found


def host_syncs(step: Callable[[], object]) -> int:
    """How often one step makes the host wait for the device: CUDA's sync debug mode, and `counted_waits`."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught, counted_waits() as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return len(waits) + sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def peak_memory(step: Callable[[], object], own: int) -> int:
    """Bytes at the peak of one step, of which `own` are what the variant holds between steps."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + own


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 8192, repetitions: int = 20) -> float:
    """TFLOP/s of a large matrix product on random numbers: the ceiling that steps are compared with.

    Args:
        device: where.
        dtype: of the factors, bf16 or fp32; float8_e4m3fn measures `torch._scaled_mm` with row-wise scales.
        size: rows and columns of both factors.
        repetitions: of which the median counts.
    """
    a, b = (torch.randn(size, size, device=device) for _ in range(2))

    def multiply() -> Tensor:
        return a @ b

    if dtype == E4M3:
        ones = torch.ones(size, 1, device=device)
        x, y = a.to(E4M3), b.to(E4M3).t()

        def multiply() -> Tensor:
            return torch._scaled_mm(  # as `FP8Linear` calls it
                x, y, scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16, use_fast_accum=True
            )

    else:
        a, b = a.to(dtype), b.to(dtype)
    timer = PartTimer(device)
    for _ in range(3):
        multiply()
    timer.collect()
    for _ in range(repetitions):
        with timer("product"):
            multiply()
    return 2 * size**3 / statistics.median(ms for _, ms in timer.collect()) / 1e9
