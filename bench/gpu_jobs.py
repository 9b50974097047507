"""What `python -m bench.gpu` runs, in which order, and how long each may take."""

from __future__ import annotations

import importlib.util
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

FULL_MEMORY = 70 * 2**30
"""Bytes of device memory from which on a step has 128 images, what targets and predictions are for."""
WORKER_MEMORY = FULL_MEMORY // 8
"""Bytes that one process of kernel tests takes: tensors of more than 2^31 elements, and CUDA's own."""
PACKAGES = {
    "deepspeed": "deepspeed", "hydra": "hydra-core", "nvidia.dali": "nvidia-dali-cuda130", "numpy": "numpy",
    "matplotlib": "matplotlib", "pytest": "pytest", "rich": "rich", "timm": "timm", "torch": "torch",
    "torchvision": "torchvision", "triton": "triton", "webdataset": "webdataset",
}  # fmt: skip
"""Module -> what pip calls it."""


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
    limit: float
    """Minutes after which it is ended."""
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""

    @property
    def command(self) -> str:
        """For a shell."""
        return shlex.join(("python", "-m", *self.arguments))

    @property
    def missing(self) -> list[str]:
        """Which of its modules are not installed."""
        return [name for name in self.needs if not installed(name)]

    @property
    def is_test(self) -> bool:
        """Whether it is pytest, which has a report; the others have results, and take `--output`."""
        return self.arguments[0] == "pytest"


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def install_command(modules: Sequence[str]) -> str:
    """What installs them. Without the versions of constraints.txt, which could replace the machine's torch."""
    return shlex.join(("python", "-m", "pip", "install", *(PACKAGES[name] for name in modules)))


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
    parallel = ("-n", str(workers)) if workers > 1 and installed("xdist") else ()
    step = ("deepspeed", "hydra")

    def shapes(*given: str, dtype: str = "bfloat16") -> tuple[str, ...]:
        return *(word for shape in given for word in ("--shape", f"{images},{shape}")), "--dtype", dtype

    return [
        Job(1, "gpu-tests", "GPU tests: graph capture, no synchronisation, GPU decoding",
            ("pytest", "tests", "-m", "gpu"), 2, 4, ("pytest",)),
        Job(1, "kernel-tests", "kernel tests, compiled instead of interpreted",
            ("pytest", "tests/kernels", "-m", "not gpu", *parallel), 2, 4, ("pytest",)),
        Job(2, "kernels", "kernels at the targets' shapes, with torch.compile",
            ("bench.kernels", *shapes("577,1024", "3,336")), 2, 6),
        Job(3, "step", "the training step: plain PyTorch, ours, lean, FP8, routing",
            ("bench.step", "--only", "eager,ours,ours+lean,ours+fp8,ours+routing", *batch), 5, 8, step),
        Job(4, "curves", "losses of 200 steps against plain PyTorch's",
            ("bench.step", "--curve", "200", "--batch", str(min(32, images))), 5, 8, step),
        Job(5, "all-kernels", "every kernel at every shape",
            ("bench.kernels", "--skip", "compile"), 5, 8),
        Job(6, "step-448", "the training step at 448 px",
            ("bench.step", "--experiment", "dune_448", "--only", "ours,ours+fp8", *batch), 3, 6, step),
        Job(7, "step-options", "the training step: bf16 student stream, teachers on a second stream",
            ("bench.step", "--only", "ours,ours+bf16stream,ours+stream", *batch), 3, 6, step),
        Job(8, "data", "images a second of the loader, GPU decoding",
            ("bench.data",), 3, 8, ("nvidia.dali", "torchvision", "webdataset")),
        Job(9, "step-compile", "the training step: plain PyTorch under torch.compile",
            ("bench.step", "--only", "eager+compile,ours", *batch), 5, 8, step),
        Job(10, "compile-float32", "kernels in float32, with torch.compile",
            ("bench.kernels", *shapes("577,1024", "3,336", dtype="float32")), 2, 6),
        Job(11, "compile-448", "kernels at 448 px, with torch.compile",
            ("bench.kernels", *shapes("1025,1024", "3,448")), 2, 6),
        Job(12, "compile-base", "kernels at ViT-B's width, with torch.compile",
            ("bench.kernels", *shapes("577,768", "1025,768")), 3, 8),
    ]  # fmt: skip
