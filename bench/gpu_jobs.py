"""What `python -m bench.gpu` runs, in which order, how long each may take, and how it ended."""

from __future__ import annotations

import importlib.util
import os
import shlex
from dataclasses import dataclass, field

FULL_MEMORY = 70 * 2**30
"""Bytes of device memory from which on a step has 128 images, what targets and predictions are for."""
WORKER_MEMORY = FULL_MEMORY // 8
"""Bytes that one process of kernel tests takes: tensors of more than 2^31 elements, and CUDA's own."""


@dataclass(frozen=True)
class Job:
    """One command, in a process of its own."""

    part: int
    """Jobs of one part are chosen together; their limits add up to at most eight minutes."""
    name: str
    about: str
    arguments: tuple[str, ...]
    """After `python -m`."""
    minutes: float
    """What it takes, an estimate for an H100 with 16 processors: the budget goes by it."""

    @property
    def limit(self) -> float:
        """Minutes after which it is ended."""
        return min(8.0, 2 * self.minutes)

    @property
    def command(self) -> str:
        """For a shell."""
        return shlex.join(("python", "-m", *self.arguments))


def images_for(memory: int) -> int:
    """Images a step that a device has room for: 128 from 70 GiB on, else the largest power of two in proportion."""
    images = 128
    while images > 8 and images * FULL_MEMORY > 128 * memory:
        images //= 2
    return images


def jobs(memory: int = FULL_MEMORY) -> list[Job]:
    """All of them, the most telling ones first, in sizes for a device with so many bytes of memory."""
    images = images_for(memory)
    batch = () if images == 128 else ("--batch", str(images))
    workers = min(8, os.cpu_count() or 1, max(1, memory // WORKER_MEMORY))
    parallel = ("-n", str(workers)) if workers > 1 and importlib.util.find_spec("xdist") else ()

    def kernels(*shapes: str, dtype: str = "bfloat16") -> tuple[str, ...]:
        return "bench.kernels", *(w for s in shapes for w in ("--shape", f"{images},{s}")), "--dtype", dtype

    return [
        Job(1, "gpu-tests", "GPU tests: graph capture, no synchronisation, GPU decoding",
            ("pytest", "tests", "-m", "gpu"), 2),
        Job(1, "kernel-tests", "kernel tests, compiled instead of interpreted",
            ("pytest", "tests/kernels", "-m", "not gpu", *parallel), 2),
        Job(2, "kernels", "kernels at the targets' shapes, with torch.compile", kernels("577,1024", "3,336"), 2.5),
        Job(3, "step", "the training step: plain PyTorch, ours, lean, FP8, routing",
            ("bench.step", "--only", "eager,ours,ours+lean,ours+fp8,ours+routing", *batch), 5),
        Job(4, "curves", "losses of 200 steps against plain PyTorch's",
            ("bench.step", "--curve", "200", "--batch", str(min(32, images))), 5),
        Job(5, "all-kernels", "every kernel at every shape", ("bench.kernels", "--skip", "compile"), 5),
        Job(6, "step-448", "the training step at 448 px",
            ("bench.step", "--experiment", "dune_448", "--only", "ours,ours+fp8", *batch), 3),
        Job(7, "step-options", "the training step: bf16 student stream",
            ("bench.step", "--only", "ours,ours+bf16stream", *batch), 3),
        Job(8, "data", "images a second of the loader, GPU decoding", ("bench.data",), 3),
        Job(9, "compile-float32", "kernels in float32, with torch.compile",
            kernels("577,1024", "3,336", dtype="float32"), 3),
        Job(10, "compile-others", "kernels at 448 px and at ViT-B's width, with torch.compile",
            kernels("1025,1024", "3,448", "577,768", "1025,768"), 4),
    ]  # fmt: skip


@dataclass
class Outcome:
    """How a job ended."""

    name: str
    command: str
    date: str
    commit: str
    status: str = "running"
    """ "done", "failed"; "running" stays if everything is cut off."""
    reason: str = ""
    seconds: float = 0.0
    last: str = ""
    """The last line of its output, pytest's sum."""
    tail: list[str] = field(default_factory=list)
    """The last lines, if it failed."""
