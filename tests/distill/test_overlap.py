"""Teachers on a second stream: what waits for what, and the same numbers."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from dune_fast.distill import overlap
from dune_fast.distill.objective import ObjectiveConfig
from dune_fast.distill.overlap import SideStream
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.distill.step import DistillationStep
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import build_student
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.ensemble import TeacherEnsemble

TEACHERS = {
    "one": TeacherConfig("dinov2", "random:1", 14, 192, image_size=28),
    "two": TeacherConfig("dinov2", "random:2", 14, 192, ["patch"], image_size=28),
}


class Recorder:
    """Stands in for torch.cuda's streams and notes, in order, what is done on which."""

    def __init__(self, monkeypatch) -> None:
        self.done: list[str] = []
        self.current = "main"
        monkeypatch.setattr(overlap.torch.cuda, "Stream", lambda device: self._stream("second"))
        monkeypatch.setattr(overlap.torch.cuda, "current_stream", lambda device: self._stream(self.current))
        monkeypatch.setattr(overlap.torch.cuda, "stream", self._switch)

    def _stream(self, name: str):
        class Stream:
            def wait_stream(_, other) -> None:
                self.done.append(f"{name} waits for {other.name}")

        Stream.name = name
        return Stream()

    @contextmanager
    def _switch(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def noting(self, name: str, function):
        def call(*args, **kwargs):
            self.done.append(f"{name} on {self.current}")
            return function(*args, **kwargs)

        return call


def build(device: torch.device, side: SideStream | None) -> DistillationStep:
    widths = {name: (cfg.num_features, tuple(cfg.token_types)) for name, cfg in TEACHERS.items()}
    cfg = ViTConfig(image_size=28, embed_dim=48, depth=1, num_heads=3)
    student = build_student(cfg, ProjectorConfig(), widths).to(device)
    teachers = TeacherEnsemble(TEACHERS, 14, device=device)
    own = torch.ones(2, 1, dtype=torch.bool)
    statistics = TeacherStatistics(widths).to(device)
    return DistillationStep(student, teachers, statistics, own, ObjectiveConfig(drop_probability=0.0), side=side)


def batch(device: torch.device) -> tuple:
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0)).to(device)
    return images, torch.zeros(3, dtype=torch.long, device=device), torch.arange(3, device=device)


def test_the_second_stream_waits_first_and_the_main_one_before_it_reads(monkeypatch):
    recorder, cpu = Recorder(monkeypatch), torch.device("cpu")
    step, plain = build(cpu, SideStream(torch.device("cuda"))), build(cpu, None)
    step.teachers = recorder.noting("teachers", step.teachers)
    step.student = recorder.noting("student", step.student)
    monkeypatch.setattr(step.statistics, "rotated", recorder.noting("features read", step.statistics.rotated))
    for i in range(2):
        loss = step(*batch(cpu), i, 0.5).loss
        torch.testing.assert_close(loss, plain(*batch(cpu), i, 0.5).loss, rtol=0, atol=0)
    once = ["second waits for main", "teachers on second", "student on main", "main waits for second"]
    assert recorder.done == 2 * [*once, "features read on main"]


def test_streams_share_no_unfolded_patches(monkeypatch):
    """What one stream writes, the other would have to wait for."""
    Recorder(monkeypatch)
    step, seen = build(torch.device("cpu"), SideStream(torch.device("cuda"))), []
    for name in ("student", "teachers"):
        original = getattr(step, name)
        setattr(step, name, lambda *args, call=original: seen.append(args[2]) or call(*args))
    step(*batch(torch.device("cpu")), 0, 0.5)
    assert len(seen) == 2 and seen[0] is not seen[1]


def test_a_cpu_is_refused():
    with pytest.raises(ValueError, match="train.overlap_teachers is true, but the run is on cpu.*set it to false"):
        SideStream(torch.device("cpu"))


@pytest.mark.gpu
def test_gpu_numbers_are_those_of_one_stream():
    """Losses and gradients over several steps, with memory handed back and forth between the streams' pools."""
    device, found = torch.device("cuda"), []
    for side in (None, SideStream(device)):
        step = build(device, side)
        losses = []
        for i in range(6):
            output = step(*batch(device), i, 0.5)
            output.loss.backward()
            losses.append(output.loss.item())
        found.append((losses, [p.grad for p in step.student.parameters() if p.grad is not None]))
    (losses, gradients), (others, other_gradients) = found
    np.testing.assert_allclose(losses, others, rtol=1e-6)
    torch.testing.assert_close(gradients, other_gradients, rtol=1e-5, atol=1e-7)
