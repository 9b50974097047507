"""A training step never reads from the device nor waits for it: counted, on the CPU, by what that is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from bench.toy.conv_patchify import toy_teacher
from dune_fast.distill.objective import ObjectiveConfig, ownership
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.distill.step import DistillationStep
from dune_fast.engine.deepspeed_engine import Engine, init_distributed
from dune_fast.engine.optimizer import OptimizerConfig
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import build_student
from dune_fast.teachers.ensemble import TeacherEnsemble

TEACHERS = {
    "one": toy_teacher("random:1", 14, 24, groups=["generic"]),
    "two": toy_teacher("random:2", 16, 32, ["patch"], groups=["3d"], scale=0.5),
}
READS = {
    torch.ops.aten._local_scalar_dense.default,  # .item(), float(), bool(), if tensor:
    torch.ops.aten.nonzero.default,  # boolean indexing: its size is data
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
}
METHODS = ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")


class HostReads(TorchDispatchMode):
    """Counts host reads: dispatched operations, and Python conversions, which on a CPU tensor dispatch nothing; and
    DeepSpeed's waits for the device, which do nothing on a CPU."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found: list[str] = []
        monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *_: self.found.append("synchronize"))
        for name in METHODS:
            original = getattr(torch.Tensor, name)

            def counted(tensor, *args, _name=name, _original=original, **kwargs):
                self.found.append(_name)
                return _original(tensor, *args, **kwargs)

            monkeypatch.setattr(torch.Tensor, name, counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def build(sharing: str, zero_stage: int, optimizer: str = "adamw", **economies) -> tuple[DistillationStep, Engine]:
    init_distributed()
    widths = {name: (t.num_features, t.token_types) for name, t in TEACHERS.items()}
    student = build_student(ViTConfig(image_size=56, embed_dim=48, depth=2, num_heads=3), ProjectorConfig(), widths)
    engine = Engine(student, OptimizerConfig(optimizer), 4, zero_stage)
    engine.state.start_average()
    cfg = ObjectiveConfig(sharing=sharing, **economies)
    own = ownership({n: t.groups for n, t in TEACHERS.items()}, ["3d", "generic"], cfg)
    statistics = TeacherStatistics(widths)
    step = DistillationStep(engine, TeacherEnsemble(TEACHERS, 14), statistics, own, cfg, all_reduce=lambda x: None)
    return step, engine


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("sharing", "others"),
    [
        ("full", {}), ("generic", {}), ("none", {"route_by_dataset": True}),
        ("full", {"presample": True, "patch_share": 0.5}), ("full", {"optimizer": "lamb"}),
    ],
)  # fmt: skip
def test_a_step_reads_nothing_from_the_device(sharing, others, zero_stage, monkeypatch):
    step, engine = build(sharing, zero_stage, **others)
    images, groups, positions = torch.randn(4, 3, 56, 56), torch.tensor([0, 1, 1, 0]), torch.arange(4)
    on_host = np.array([0, 1, 1, 0]), None, np.arange(4)

    def train(i: int) -> torch.Tensor:
        loss, metrics, _ = step(images, groups, positions, i, 0.5, *on_host)
        engine.backward(loss)
        norms = engine.step(1e-3, metrics["loss"])
        engine.state.average(0.9, engine.skipped)
        return torch.maximum(metrics["loss"], norms.max())

    with HostReads(monkeypatch) as reads:
        step.routes(images, 0, *on_host[::2])
    assert reads.found == [], "which images a teacher gets is known on the host from the first step on"
    for i in range(2):  # what happens once is not a step's; under stage 3 DeepSpeed learns the order of modules
        train(i)
    with HostReads(monkeypatch) as reads:
        worst = train(2)
    # under stage 3 DeepSpeed looks at a norm, which we give it as a number of the host
    harmless = ["__bool__", "aten._local_scalar_dense.default"]
    assert reads.found == (harmless if zero_stage == 3 else [])
    with reads:
        worst.item()
    assert reads.found, "the counter must see a read"
