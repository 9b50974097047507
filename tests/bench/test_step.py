"""bench.step on a CPU: the eager baseline computes what ours computes, and the measurement adds up."""

from __future__ import annotations

import json
import time
import weakref

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from bench import step as module
from bench.eager_step import EagerStep, check_plain, turn
from bench.records import CURVE_LIMITS, Measured, read_curves, read_steps, relative_difference, write_step
from bench.step import Bench, chosen
from bench.step_meter import counted_waits, matrix_rate, merged_length, time_calls
from bench.step_variants import VARIANTS, SyntheticLoader, synthetic_config
from bench.toy.conv_patchify import toy_teacher
from dune_fast.engine.config import RunConfig
from dune_fast.engine.config_sections import TrainConfig
from dune_fast.engine.deepspeed_engine import init_distributed
from dune_fast.kernels.rope2d import grid_positions, rope2d_angles, rope2d_reference
from dune_fast.student import StudentConfig, build_student
from dune_fast.teachers.config import TeacherConfig

CPU = torch.device("cpu")
HALF = [0.5, 0.5, 0.5]


def config() -> RunConfig:
    """Three ViT teachers of the published families, as small as published sizes are."""
    return RunConfig(
        image_size=56,
        student=StudentConfig(image_size=56, embed_dim=48, depth=2, num_heads=3),
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
    bench = Bench(config(), 6, init_distributed(), 8, Quiet())
    return {variant.name: bench.curve(variant) for variant in chosen(["eager", "ours", "ours+fp8"])}


def test_eager_and_ours_train_alike(curves):
    """The same losses step by step, in float32: kernels, fused chain and device-side dropping change nothing."""
    assert relative_difference(curves["ours"], curves["eager"]) < 1e-4
    assert curves["ours"][-1] != curves["ours"][0]


def test_the_eager_step_is_adamws():
    cfg = config()
    cfg.optimizer.name = "lamb"
    with pytest.raises(ValueError, match="the eager baseline has optimizer.name=adamw only, not lamb"):
        check_plain(cfg, build_student(cfg.student, cfg.projector, cfg.teacher_features), {})


def test_fp8_teachers_stay_within_the_limit(curves):
    difference = relative_difference(curves["ours+fp8"], curves["eager"])
    assert 1e-6 < difference < CURVE_LIMITS["ours+fp8"]


def test_a_bf16_stream_of_the_student_stays_within_the_limit():
    cfg = config()
    cfg.train.precision = "bf16"
    bench = Bench(cfg, 6, init_distributed(), 8, Quiet())
    ours, narrow = (bench.curve(variant) for variant in chosen(["ours", "ours+bf16stream"]))
    assert 0 < relative_difference(narrow, ours) < CURVE_LIMITS["ours+bf16stream"] and ours[-1] < ours[0]


def test_the_routing_variant_trains():
    losses = Bench(config(), 3, init_distributed(), 2, Quiet()).curve(chosen(["ours+routing"])[0])
    assert all(0 < loss < 10 for loss in losses)


def test_a_result_is_kept_under_its_experiment_and_variant(tmp_path):
    bench = Bench(config(), 3, init_distributed(), 6, Quiet())
    results = [bench.measure(variant, 1, 1.0) for variant in chosen(["eager", "ours"])]
    for result in results:
        assert 0 < result.p20_ms <= result.median_ms <= result.p80_ms
        assert result.images_per_second == pytest.approx(3e3 / result.median_ms)
        assert result.share_of_matrix_rate == result.tflops > 0
    path = tmp_path / "step.json"
    for result in (*results, results[1]):
        write_step(path, "small", "cpu", result)
    assert read_steps(path) == {"small": results}
    assert "torch" in json.loads(path.read_text())["experiments"]["small"]["ours"]["versions"]


@pytest.mark.parametrize(
    ("fails_at", "error", "says"),
    [
        (0, torch.OutOfMemoryError("no room"), "left out: out of memory"),
        (2, ValueError("float8 needs a newer GPU"), "left out: float8 needs a newer GPU"),
        (2, RuntimeError("no kernel image"), "left out: failed:"),
    ],
    ids=["no room", "not on this device", "an error"],
)
def test_a_variant_that_fails_is_left_out(monkeypatch, tmp_path, fails_at, error, says):
    """The others are measured all the same, and nothing of the failed one, or of the one before, stays."""
    held, lines = [], []

    class State(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hook = self.named_parameters  # which refers to its owner

    def build(self, variant):
        assert all(state() is None for state in held)
        state = State()
        held.append(weakref.ref(state))

        def step(i: int) -> torch.Tensor:
            if variant.name == "eager" and i == fails_at:
                raise type(error)(*error.args)  # whose traceback nobody holds
            return torch.zeros(()) if state else None

        return step

    monkeypatch.setattr(Bench, "build", build)
    monkeypatch.setattr(module, "compose_config", lambda overrides: config())
    monkeypatch.setattr(module, "matrix_rate", lambda *_: 1.0)
    monkeypatch.setattr(module.Console, "print", lambda self, *text: lines.extend(map(str, text)))
    status = module.main(["--only", "eager,ours", "--steps", "3", "--warm-up", "1", "--output", str(tmp_path)])
    assert status == isinstance(error, RuntimeError) - isinstance(error, torch.OutOfMemoryError)
    assert any(line.startswith(f"eager: {says}") for line in lines)
    (path,) = tmp_path.glob("*/step.json")
    assert [result.variant for result in read_steps(path)["dune_336"]] == ["ours"]
    assert len(held) == 2 and held[0]() is None


def test_what_cannot_be_inspected_does_not_cost_the_times(monkeypatch):
    """A profiler without the right to read counters, or a step that has no room under it, came after all timing."""
    console = Quiet()
    bench = Bench(config(), 3, CPU, 6, console)
    monkeypatch.setattr(module, "peak_memory", lambda step: 11)
    monkeypatch.setattr(module, "host_syncs", lambda step: step())

    def no_counters(step):
        raise ValueError("max() iterable argument is empty")

    monkeypatch.setattr(module, "profile", no_counters)
    result = Measured("ours", 3, 1.0, 1.0, 1.0)
    bench.inspect(result, lambda: 2, before=1)
    assert (result.peak_bytes, result.host_syncs, result.launches) == (10, 2, None)
    assert bench.failed == ["ours, launches and gaps"] and "launches and gaps not measured" in console.lines[-1]


def test_a_finished_curve_is_kept_when_the_next_one_fails(tmp_path, monkeypatch):
    """And the eager one, which the others are compared with, is drawn whatever --only says."""
    console, errors = Quiet(), {"ours+fp8": RuntimeError("no kernel image")}
    bench = Bench(config(), 3, CPU, 2, console)

    def build(variant):
        if variant.name in errors:
            raise errors[variant.name]
        return lambda i: torch.tensor(1.1 if variant.name == "ours+lean" else 1.0)

    monkeypatch.setattr(bench, "build", build)
    path = tmp_path / "curve_small.csv"
    assert module.curves(bench, chosen(["ours", "ours+fp8", "ours+routing"]), path) == 1
    assert bench.failed == ["ours+fp8"] and "no kernel image" in "\n".join(console.lines)
    assert read_curves(path) == {"eager": [1.0, 1.0], "ours": [1.0, 1.0]}
    bench.failed.clear()
    assert module.curves(bench, chosen(["ours"]), path) == 0
    assert module.curves(bench, chosen(["ours+lean"]), path) == 1 and "FAIL" in console.lines[-1]
    with pytest.raises(ValueError, match="names none of them"):
        module.curves(bench, chosen(["ours+routing"]), path)
    errors["eager"] = ValueError("another family")
    with pytest.raises(ValueError, match="nothing to compare with"):
        module.curves(bench, chosen(["ours"]), path)


def test_the_batches_differ():
    loader = SyntheticLoader(3, 56, CPU)
    first = loader[1]
    assert first.group.tolist() == first.group_on_host.tolist() == [0, 1, 2] and first.positions.tolist() == [3, 4, 5]
    assert first.images.isfinite().all() and not torch.equal(first.images, loader[2].images)
    assert 0.5 < first.images.std() < 2


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


def test_every_call_is_timed():
    times = time_calls(lambda i: time.sleep(0.02 * i), range(3), CPU)
    assert times[0] < 15 < 20 <= times[1] < 40 <= times[2]


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
        seen.append(torch.backends.cudnn.benchmark)
        gather(parts, features)

    monkeypatch.setattr(torch.distributed, "all_gather", noted)
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, 0)
    eager = EagerStep(cfg, student, device, None)
    assert isinstance(eager.student, DistributedDataParallel) and eager.student.find_unused_parameters
    assert eager.optimizer.defaults["fused"] and not eager.optimizer.defaults["foreach"]
    batch = SyntheticLoader(3, 56, CPU)[0]
    assert 0 < eager(batch.images, batch.positions, 0, 1e-3, 0.5) < 10
    assert gathered == [(3, 192), (3, 16, 192), (3, 16, 192), (3, 16, 192)]  # whole features
    assert all(seen) and not torch.backends.cudnn.benchmark


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
