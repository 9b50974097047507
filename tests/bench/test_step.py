"""bench.step on a CPU: the eager baseline computes what ours computes, and the measurement adds up."""

from __future__ import annotations

import gc
import json
import re
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from bench import step as module
from bench.eager_step import EagerStep, turn
from bench.records import (
    CURVE_LIMITS,
    EVERYTHING_ELSE,
    Measured,
    compare_curves,
    read_curves,
    relative_difference,
    write_steps,
)
from bench.step import Bench, Running, chosen, split_steps
from bench.step_count import Meter, count_step
from bench.step_meter import PartTimer, counted_waits, matrix_rate, merged_length
from bench.step_variants import VARIANTS, SyntheticLoader, synthetic_config
from bench.toy.conv_patchify import toy_teacher
from dune_fast.engine.config import RunConfig, TrainConfig
from dune_fast.engine.deepspeed_engine import init_distributed
from dune_fast.engine.flops import Flops
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.kernels.rope2d import grid_positions, rope2d_angles, rope2d_reference
from dune_fast.student import build_student
from dune_fast.teachers.config import TeacherConfig

CPU = torch.device("cpu")
HALF = [0.5, 0.5, 0.5]


def config() -> RunConfig:
    """Three ViT teachers of the published families, as small as published sizes are."""
    return RunConfig(
        image_size=56,
        student=ViTConfig(image_size=56, embed_dim=48, depth=2, num_heads=3),
        teachers={
            "dinov2": TeacherConfig("dinov2", "random:1", 14, 192, image_size=56, num_registers=4, groups=["generic"]),
            "mast3r": TeacherConfig("mast3r", "random:2", 16, 192, ["patch"], mean=HALF, std=HALF, groups=["3d"]),
            "multihmr": TeacherConfig("multihmr", "random:3", 14, 192, ["patch"], image_size=56, groups=["human"]),
        },
        train=TrainConfig(precision="fp32"),
    )


class Quiet:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def print(self, *lines: object) -> None:
        self.lines += map(str, lines)


@pytest.fixture(scope="module")
def curves() -> dict[str, list[float]]:
    """Losses of a few steps of the eager step, ours, and ours with FP8 teachers."""
    device = init_distributed()
    bench = Bench(config(), 6, device, 8, Quiet())
    return dict(bench.curve(chosen(["eager", "ours", "ours+fp8"])))


def test_eager_and_ours_train_alike(curves):
    """The same losses step by step, in float32: kernels, fused chain and device-side dropping change nothing."""
    assert relative_difference(curves["ours"], curves["eager"]) < 1e-4
    assert curves["ours"][-1] != curves["ours"][0]


def test_fp8_teachers_stay_within_the_limit(curves):
    difference = relative_difference(curves["ours+fp8"], curves["eager"])
    assert 1e-6 < difference < CURVE_LIMITS["ours+fp8"]


def test_a_bf16_stream_of_the_student_stays_within_the_limit():
    cfg = config()
    cfg.train.precision = "bf16"
    losses = dict(Bench(cfg, 6, init_distributed(), 8, Quiet()).curve(chosen(["ours", "ours+bf16stream"])))
    difference = relative_difference(losses["ours+bf16stream"], losses["ours"])
    assert 0 < difference < CURVE_LIMITS["ours+bf16stream"]
    assert losses["ours"][-1] < losses["ours"][0]


def test_variants_of_a_gpu_are_left_out_without_one(capsys, monkeypatch):
    monkeypatch.setattr(module, "count", lambda cfg, batch, variants, console: print([v.name for v in variants]))
    module.main(["--count", "--only", "ours,ours+stream"])
    shown = capsys.readouterr().out
    assert "left out without a GPU: ours+stream" in shown and "['ours']" in shown


def test_measures_parts_that_add_up(tmp_path):
    device = init_distributed()
    results = list(Bench(config(), 3, device, 6, Quiet()).measure(chosen(["eager", "ours"]), warm_up=1))
    for result in results:
        assert {"student forward", "backward", "optimizer", "loss", "teacher dinov2"} <= set(result.parts_ms)
        assert sum(result.parts_ms.values()) == pytest.approx(result.median_ms, rel=0.2)
        assert result.images_per_second == pytest.approx(3e3 / result.median_ms)
        assert 0 < result.share_of_matrix_rate < 1.5
    path = tmp_path / "step.json"
    write_steps(path, "small", "cpu", "torch", results)
    merged = write_steps(path, "small", "cpu", "torch", results[1:])
    assert [result.variant for result in merged] == ["eager", "ours"] and merged[0] == results[0]
    assert json.loads(path.read_text())["experiments"]["small"]["ours"]["versions"] == "torch"
    module.plot_parts(tmp_path / "step.png", "small", merged)
    assert (tmp_path / "step.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("fails_at", "error", "says"),
    [
        (0, torch.OutOfMemoryError("no room"), "eager: out of memory, left out; .*--only eager"),
        (2, torch.OutOfMemoryError("no room"), "eager: out of memory beside ours, left out; .*--only eager"),
        (0, ValueError("float8 needs a newer GPU"), "eager: left out: float8 needs a newer GPU"),
        (2, RuntimeError("no kernel image"), "(?s)eager: left out, failed:.*RuntimeError: no kernel image"),
    ],
    ids=["no room in the warm-up", "no room in a turn", "not on this device", "an error"],
)
def test_a_variant_that_fails_is_left_out(monkeypatch, fails_at, error, says):
    """The others are measured all the same, and nothing of the failed one stays."""
    console = Quiet()
    bench = Bench(config(), 3, init_distributed(), 6, console)
    held = []

    def build(variant, timer):
        state = torch.zeros(8)
        held.append(weakref.ref(state))

        def step(i: int) -> torch.Tensor:
            if variant.name == "eager" and i == fails_at:
                raise error.with_traceback(None)
            return state.sum()

        return step

    monkeypatch.setattr(bench, "build", build)
    results = list(bench.measure(chosen(["eager", "ours"]), warm_up=1))
    assert [result.variant for result in results] == ["ours"]
    assert any(re.match(says, line) for line in console.lines)
    assert bench.failed == (["eager"] if isinstance(error, RuntimeError) and "kernel" in says else [])
    error.__traceback__ = None  # of this test's own reference to it
    assert held[0]() is None


def test_what_cannot_be_inspected_does_not_cost_the_times(monkeypatch):
    """A profiler without the right to read counters, or a step that has no room under it, came after all timing."""
    console = Quiet()
    bench = Bench(config(), 3, CPU, 6, console)
    monkeypatch.setattr(bench, "build", lambda variant, timer: lambda i: torch.zeros(()))
    monkeypatch.setattr(module, "peak_memory", lambda step, own: own + 1)
    monkeypatch.setattr(module, "host_syncs", lambda step: int(step()))

    def no_counters(step):
        raise ValueError("max() iterable argument is empty")

    monkeypatch.setattr(module, "profile", no_counters)
    result = Measured("ours", 3, 1.0, 1.0, 1.0, {}, 3000.0)
    bench.inspect(result, Running(lambda i: torch.tensor(2.0), 10, None))
    assert (result.peak_bytes, result.host_syncs, result.kernels) == (11, 2, None)
    assert bench.failed == ["ours, launches and gaps"] and "launches and gaps not measured" in console.lines[-1]


def test_nothing_of_a_variant_stays_when_the_next_draws_its_curve(monkeypatch):
    bench, held = Bench(config(), 3, CPU, 2, Quiet()), []

    class State:
        def __init__(self) -> None:
            self.itself = self  # as hooks of a module that refer to it

    def build(variant):
        assert all(state() is None for state in held)
        state = State()
        held.append(weakref.ref(state))
        return lambda i: torch.ones(()) if state else None

    monkeypatch.setattr(bench, "build", build)
    gc.collect()
    gc.disable()
    try:
        assert dict(bench.curve(chosen(["eager", "ours"]))) == {"eager": [1.0, 1.0], "ours": [1.0, 1.0]}
    finally:
        gc.enable()


def test_a_finished_curve_is_kept_when_the_next_one_fails(tmp_path, monkeypatch):
    """And the eager one, which the others are compared with, is drawn whatever --only says."""
    console, errors = Quiet(), {"ours+fp8": RuntimeError("no kernel image")}
    bench = Bench(config(), 3, CPU, 2, console)

    def build(variant):
        if variant.name in errors:
            raise errors[variant.name]
        return lambda i: torch.tensor(1.0 + i)

    monkeypatch.setattr(bench, "build", build)
    assert module.curves(bench, chosen(["ours", "ours+fp8", "ours+routing"]), tmp_path, "small") == 1
    assert bench.failed == ["ours+fp8"] and "no kernel image" in "\n".join(console.lines)
    assert read_curves(tmp_path / "curve_small.csv") == {"eager": [1.0, 2.0], "ours": [1.0, 2.0]}
    assert (tmp_path / "curve_small.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="names none of them"):
        module.curves(bench, chosen(["ours+routing"]), tmp_path, "small")
    errors["eager"] = ValueError("another family")
    with pytest.raises(ValueError, match="nothing to compare with"):
        module.curves(bench, chosen(["ours"]), tmp_path, "small")
    assert not compare_curves({"eager": [1.0], "ours": [1.0], "ours+lean": [1.1]}, console.print)


def test_every_variant_runs_on_images_that_differ():
    loader = SyntheticLoader(3, 56, CPU)
    first = loader[1]
    assert first.group.tolist() == first.group_on_host.tolist() == [0, 1, 2] and first.positions.tolist() == [3, 4, 5]
    assert first.images.isfinite().all() and not torch.equal(first.images, loader[2].images)
    assert 0.5 < first.images.std() < 2


def test_the_routing_variant_trains():
    device = init_distributed()
    ((_, losses),) = Bench(config(), 3, device, 2, Quiet()).curve(chosen(["ours+routing"]))
    assert all(0 < loss < 10 for loss in losses)


def test_parts_of_a_step_are_told_apart():
    spans = [("teacher a", 2.0), ("forward", 5.0), ("step", 9.0), ("teacher a", 4.0), ("forward", 7.0), ("step", 11.0)]
    steps = split_steps(spans)
    assert [len(step) for step in steps] == [3, 3]
    result = Measured.from_spans("ours", 10, steps, Flops(10**9, 10**9, {"a": 4 * 10**9}), 100.0)
    assert result.parts_ms == {"teacher a": 3.0, "loss": 3.0, EVERYTHING_ELSE: 4.0}
    assert result.tflops == pytest.approx(10 * 10e9 / 10e-3 / 1e12)


def test_gaps_are_what_no_kernel_covers():
    assert merged_length([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    assert merged_length([]) == 0


def test_the_matrix_rate_is_of_this_device():
    assert 1e-3 < matrix_rate(CPU, torch.float32, 256, 3) < 100


def test_waits_that_the_debug_mode_does_not_see_are_counted(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: called.append(device))
    original = torch.cuda.Stream.synchronize
    with counted_waits() as found:
        torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    assert found == ["torch.cuda"] and called == [0, 1] and torch.cuda.Stream.synchronize is original


def test_timer_forgets_what_it_has_told():
    timer = PartTimer(CPU)
    with timer("a"), timer("b"):
        pass
    assert [part for part, _ in timer.collect()] == ["b", "a"] and timer.collect() == []


def test_bad_requests(capsys):
    assert module.main(["--only", "fastest"]) == 2
    assert "choose from eager" in capsys.readouterr().out
    assert len(chosen([])) == len(VARIANTS)


def test_the_baseline_is_the_published_step(monkeypatch):
    """Each of these made the comparison unfair when it was missing."""
    device, cfg = init_distributed(), synthetic_config(config(), 3, 4)
    gathered, seen, gather = [], [], torch.distributed.all_gather

    def noted(parts: list[torch.Tensor], features: torch.Tensor) -> None:
        gathered.append(features.shape)
        gather(parts, features)

    @contextmanager
    def timer(part: str):
        seen.append((part, torch.backends.cudnn.benchmark))
        yield

    monkeypatch.setattr(torch.distributed, "all_gather", noted)
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, 0)
    eager = EagerStep(cfg, student, device, None, timer=timer)
    assert isinstance(eager.run_student, DistributedDataParallel) and eager.run_student.find_unused_parameters
    assert eager.optimizer.defaults["fused"] and not eager.optimizer.defaults["foreach"]
    batch = SyntheticLoader(3, 56, CPU)[0]
    assert 0 < eager(batch.images, batch.positions, 0, 1e-3, 0.5) < 10
    assert gathered == [(3, 192), (3, 16, 192), (3, 16, 192), (3, 16, 192)]  # whole features
    assert {on for _, on in seen} == {True} and not torch.backends.cudnn.benchmark


def test_the_baseline_turns_queries_in_their_own_type():
    torch.manual_seed(0)
    qkv = torch.randn(2, 16, 3, 3, 8)
    cos, sin = rope2d_angles(grid_positions(4, 4), 8)
    expected = rope2d_reference(qkv, cos, sin)
    for i in range(2):
        heads = qkv[:, :, i].transpose(1, 2)
        torch.testing.assert_close(turn(heads, cos, sin).transpose(1, 2), expected[:, :, i])
        half = turn(heads.bfloat16(), cos.bfloat16(), sin.bfloat16())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), turn(heads, cos, sin), atol=0.05, rtol=0.02)


def test_the_baseline_says_what_it_cannot_run():
    cfg = config()
    cfg.teachers["xfeat"] = toy_teacher("random:1", 14, 24)
    with pytest.raises(ValueError, match="xfeat is of another family"):
        Bench(cfg, 2, init_distributed(), 2, Quiet()).build(VARIANTS[0])


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu():
    from bench.step_meter import host_syncs

    device = init_distributed()
    bench = Bench(config(), 6, device, 4, Quiet())
    step = bench.build(chosen(["ours"])[0])
    for i in range(3):  # what happens in the first steps alone is not a step's
        step(i)
    assert host_syncs(lambda: step(3)) == 0
    eager = bench.build(chosen(["eager"])[0])
    eager(0)
    assert host_syncs(lambda: eager(1)) > 20


def test_counts_without_running():
    """Fused paths launch far less, and our step reads nothing where the published one reads every value."""
    cfg, batch = config(), 6
    small = synthetic_config(cfg, batch, 4)
    eager, ours, lean, routed, narrow = (
        count_step(small, variant)
        for variant in chosen(["eager", "ours", "ours+lean", "ours+routing", "ours+bf16stream"])
    )
    trained = 2 * 14 + 5 + 3 * (14 + 2)  # tensors of the blocks, of embedding and positions, of the projectors
    values, metrics = batch * len(cfg.teachers) + 2, 3 * 4 + 1
    assert (eager.host_reads, ours.host_reads) == (values + metrics + trained, 0)
    assert sum(eager.operations.values()) > 2 * sum(ours.operations.values())
    # 12 blocks: four products, attention, two norms, bias and GELU each; and what goes before and after them
    assert 12 * 8 <= ours.operations["teacher multihmr"] <= 12 * 8 + 12
    assert ours.held_bytes < eager.held_bytes and ours.peak_bytes < eager.peak_bytes
    assert lean.operations["teacher multihmr"] == ours.operations["teacher multihmr"] - 12 + 1  # GELUs, one cast
    assert narrow.peak_bytes < ours.peak_bytes
    assert routed.host_reads == 0 and routed.peak_bytes < ours.peak_bytes
    small.train.activation_checkpointing = True
    (again,) = (count_step(small, variant) for variant in chosen(["ours"]))  # the blocks' operations once more
    assert sum(again.operations.values()) > sum(ours.operations.values()) and again.peak_bytes < ours.peak_bytes


def test_the_count_knows_how_much_is_alive():
    meter = Meter("none")
    with FakeTensorMode(), meter:
        kept = torch.zeros(1000)
        meter.start()
        for _ in range(3):
            dropped = kept + 1
            view = dropped[:10]
            del dropped, view
    assert meter.count.held_bytes == 4000 and meter.count.peak_bytes == 8000
    assert sum(meter.count.operations.values()) == 3
