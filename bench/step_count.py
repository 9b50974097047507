"""Counts a step without running it: `python -m bench.step --count` needs no GPU and no weights.

The step runs on fake tensors, which have shapes and no data, and takes the paths of a GPU. Counted are the operations
that would launch work (a fused kernel is one, views and allocations are none), the values that the host would read,
and the bytes of all tensors alive at once. The memory is a lower bound: workspaces, fragmentation and what a library
keeps inside an operation are not in it. The published step's DistributedDataParallel cannot run on fake tensors either:
its two copies of each gradient, to a bucket and back, and the buckets' bytes are not counted; the features that it
gathers are, as copies. DeepSpeed's engine cannot run on fake tensors: the update is torch's fused
AdamW after this project's clipping, as in ZeRO stage 0.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bench.eager_step import EagerStep, Timer
from bench.records import EVERYTHING_ELSE
from bench.step_variants import GROUPS, Variant, configure, time_parts
from dune_fast.dali_pipelines.loader import Batch
from dune_fast.distill.objective import ownership
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.distill.step import DistillationStep
from dune_fast.engine.config import RunConfig
from dune_fast.engine.optimizer import OptimizerConfig, build_optimizer, scale_gradients
from dune_fast.kernels.library import NAMESPACE, traced
from dune_fast.student import build_student
from dune_fast.teachers.ensemble import TeacherEnsemble

_NAMESPACES = ("aten", NAMESPACE)
_NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh",
            "_unsafe_view", "promote_types"}  # fmt: skip
READS = {"item": 1.0, "__bool__": True, "__float__": 1.0, "__int__": 1, "__index__": 1}
"""Conversions by which the host reads one value, and what stands in for it."""


@dataclass
class Count:
    """One step of one variant."""

    variant: str
    operations: Counter[str] = field(default_factory=Counter)
    """Part of the step -> operations that launch work."""
    host_reads: int = 0
    held_bytes: int = 0
    """Weights, optimizer state, images: what is alive before the step."""
    peak_bytes: int = 0
    """The most that is alive at once in the step."""


class Meter(TorchDispatchMode):
    """Counts what a step dispatches, by part, and the bytes of the storages that are alive."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.count = Count(variant)
        self.part = EVERYTHING_ELSE
        self._alive: dict[int, int] = {}
        self._bytes = 0
        self._dispatching = False

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        yield
        self.part = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before, self._dispatching = self._dispatching, True
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            self._dispatching = before
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        namespace, _, name = func._schema.name.partition("::")
        if namespace in _NAMESPACES and name not in _NO_WORK and not is_view:
            self.count.operations[self.part] += 1
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def start(self) -> None:
        """Forgets what building has counted; what is alive stays."""
        self.count = Count(self.count.variant, held_bytes=self._bytes, peak_bytes=self._bytes)

    def _read(self) -> None:
        # AdamW's own counts of steps are on the host, and fake tensors look at themselves
        if self.part != "optimizer" and not self._dispatching:
            self.count.host_reads += 1

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self._bytes += storage.nbytes()
        self.count.peak_bytes = max(self.count.peak_bytes, self._bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._bytes -= self._alive.pop(key, 0)

    @contextmanager
    def host_reads(self) -> Iterator[None]:
        """Counts the host's reads, which fake tensors have no value for, and puts a number in their place."""

        def stand_in(value: object):
            def read(_: Tensor) -> object:
                self._read()
                return value

            return read

        def read_all(tensor: Tensor) -> list:
            self._read()
            return _nested(tensor.shape)

        with ExitStack() as stack:
            for name, value in READS.items():
                stack.enter_context(mock.patch.object(Tensor, name, stand_in(value)))
            stack.enter_context(mock.patch.object(FakeTensor, "tolist", read_all))
            yield


def _nested(shape: torch.Size) -> list | float:
    return [_nested(shape[1:]) for _ in range(shape[0])] if shape else 0.5


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What `nn.Module.to` does, for fake tensors, whose contents torch would swap and cannot."""
    for child in module.children():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(fn(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


class PlainEngine:
    """What `Engine` does with one process and ZeRO stage 0, without DeepSpeed."""

    def __init__(self, module: nn.Module, optimizer: OptimizerConfig) -> None:
        self.module, self.clipping = module, optimizer
        self.optimizer = build_optimizer(module, optimizer)

    def __call__(self, *inputs: object) -> object:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> Tensor:
        gradients = [p.grad for p in self.module.parameters() if p.requires_grad]
        norms = torch.stack(torch._foreach_norm(gradients, 2.0))
        scale_gradients(gradients, norms, torch.arange(len(norms)), self.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norms


def _plain_step(cfg: RunConfig, timer: Timer) -> Callable[[Batch, int], Tensor]:
    """The trainer's step without DeepSpeed, guard and log."""
    device, dtype = torch.device("cpu"), torch.bfloat16
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
    student.compute_in(dtype, cfg.train.student_stream)
    student.encoder.activation_checkpointing = cfg.train.activation_checkpointing
    engine = PlainEngine(student, cfg.optimizer)
    norms = TeacherStatistics(cfg.teacher_features, cfg.standardization.convention, cfg.standardization.eps)
    teachers = TeacherEnsemble(cfg.teachers, cfg.student.patch_size, dtype)
    with unset_fake_temporarily():  # the host looks at who owns what
        own = ownership({n: t.groups for n, t in cfg.teachers.items()}, GROUPS, cfg.objective, device)
        distill = DistillationStep(engine, teachers, norms, own, cfg.objective, cfg.train.seed)
    time_parts(distill, engine, timer)

    def step(batch: Batch, i: int) -> Tensor:
        with timer("loss"):  # what no inner part claims
            output = distill(batch.images, batch.group, batch.positions, i, 0.5, batch.group_on_host)
        engine.backward(output.loss)
        engine.step(1e-3)
        return output.metrics["loss"]

    return step


def _eager_step(cfg: RunConfig, timer: Timer) -> Callable[[Batch, int], object]:
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
    eager = EagerStep(cfg, student, torch.device("cpu"), torch.bfloat16, timer=timer, distributed=False)
    return lambda batch, i: eager(batch.images, batch.positions, i, 1e-3, 0.5)


def count_step(cfg: RunConfig, variant: Variant) -> Count:
    """Counts the second step of a variant in bf16 (the first one makes the optimizer's state).

    Args:
        cfg: from `synthetic_config`.
        variant: which; not one that is compiled.
    """
    cfg = configure(copy.deepcopy(cfg), variant)
    meter, size = Meter(variant.name), (cfg.train.global_batch, 3, cfg.image_size, cfg.image_size)
    groups = np.arange(size[0]) % len(GROUPS)
    with ExitStack() as stack:
        for context in (FakeTensorMode(allow_non_fake_inputs=True), meter, meter.host_reads(), traced()):
            stack.enter_context(context)
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(mock.patch("torch.from_numpy", torch.tensor))  # not a view of what has an address
        # it looks at what it has drawn
        stack.enter_context(mock.patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor))
        step = (_eager_step if variant.eager else _plain_step)(cfg, meter)
        index = torch.zeros(size[0], dtype=torch.long)
        batch = Batch(torch.empty(size), index, index, index, [""] * size[0], 0, groups)
        step(batch, 0)
        meter.start()
        step(batch, 1)
    return meter.count
