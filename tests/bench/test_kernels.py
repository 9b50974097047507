"""The kernels' benchmark as far as a CPU goes: ahead-of-time compilation, cases, bytes, checks, CSV, messages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import kernels as bench
from bench.aot import Resources, specialize
from bench.kernel_cases import OPERATIONS, check, draw_upstream, moved_bytes, select
from bench.records import Row, folder_name, read_rows, write_rows
from dune_fast.kernels.launching import Recorded, recording
from dune_fast.kernels.library import INTERPRETER, interpreted
from tests.kernels.conftest import rounding_to_nearest  # noqa: F401  # the interpreter's float8 loses carries

CPU = torch.device("cpu")
ROW = Row(
    "moments", "forward", "bfloat16", "2x3x4", "ours", 10.0, 9.5, 11.0, 30_000, 3000.0, "A GPU", "torch 2"
)


def run_bench(*arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.kernels", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_without_spills():
    result = run_bench("--aot", "sm_80,sm_90,sm_100")
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(f"{name}._" in result.stdout for name in ("moments", "distill_loss", "teacher_drop"))
    assert "0 spill or do not compile" in result.stdout


def test_one_case_of_every_kernel_file_compiles_without_spills():
    result = run_bench("--aot", "sm_90", "--quick")
    assert result.returncode == 0 and "0 spill or do not compile" in result.stdout, result.stdout + result.stderr
    assert re.search(r"moments\._split_kernel +sm_90 +1 ", result.stdout)


def test_predictions_are_a_table_and_a_file(tmp_path):
    path = tmp_path / "predicted.csv"
    case = ("--only", "quantize_rows", "--shape", "8,257,384", "--dtype", "bfloat16")
    result = run_bench("--aot", "sm_90", "--predict", *case, "--csv", str(path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search("quantize_rows +forward +bfloat16 +8x257x384 .*85 below", result.stdout)
    assert "1 launches in" in result.stdout
    header, line = path.read_text().splitlines()
    assert header.count(",") == line.count(",") and line.startswith("sm_90,quantize_rows,forward,bfloat16,8x257x384")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    result = run_bench()
    assert result.returncode == 2
    assert "found none" in result.stdout and "--aot" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--aot", "sm_70"], "'sm_70' is unknown; choose from sm_80"),
        (["--aot", "sm_90", "--only", "philox"], "no kernels named 'philox'; choose one of .*moments"),
        (["--aot", "sm_80", "--predict"], "predictions are for an H100: --aot sm_90 --predict"),
        (["--only", "nothing"], "choose one of moments"),
        (["--only", "augment", "--shape", "2,5,64"], "no --shape is for this operation: .* IMAGES,3,SIDE"),
    ],
)
def test_messages(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("dune_fast.kernels.library.INTERPRETER", False)
    assert bench.main(arguments) == 2
    assert re.search(words, capsys.readouterr().out.replace("\n", " "))


@pytest.mark.skipif(not INTERPRETER, reason="the interpreter is off")
def test_ahead_of_time_needs_the_compiler(capsys):
    assert bench.main(["--aot", "sm_90"]) == 2
    assert "TRITON_INTERPRET not set" in capsys.readouterr().out


def test_specialization_is_tritons():
    names = ("x", "none", "one", "sixteen", "count", "large", "scale", "BLOCK", "misaligned")
    params = [
        SimpleNamespace(
            num=num, name=name, default=None, is_constexpr=name == "BLOCK", do_not_specialize=name == "count"
        )
        for num, name in enumerate(names)
    ]
    kernel = SimpleNamespace(__name__="kernel", params=params)
    x = torch.empty(64, dtype=torch.bfloat16, device="meta")
    source = specialize(
        Recorded(kernel, (x, None, 1, 48, 16, 2**40 + 1, 1.0), {"BLOCK": 8, "misaligned": x[1:], "num_warps": 4})
    )
    assert source.signature == {
        "x": "*bf16", "none": "constexpr", "one": "constexpr", "sixteen": "i32", "count": "i32", "large": "i64",
        "scale": "fp32", "BLOCK": "constexpr", "misaligned": "*bf16",
    }  # fmt: skip
    assert source.constants == {"none": None, "one": 1, "BLOCK": 8}
    assert set(source.attributes) == {(0,), (3,)}
    assert source.options == {"num_warps": 4}


def test_recorded_launches_are_those_of_a_run():
    from dune_fast.kernels import moments

    with recording("sm_90") as launches:
        moments._moments_triton(torch.empty(128, 577, 1024, device="meta", dtype=torch.bfloat16)[:, 1:])
        first, second = launches
    assert first.args[2] == 128 * 576 and first.options["CHANNELS"] == 1024 and first.options["PERIOD"] == 576
    assert second.args[4] <= 132 * 8


def test_resources_that_fail():
    good = Resources("a", "b", "c", "sm_90", 40, 0, 0, 128)
    assert good.ok and not good._replace(spilled=8).ok and not good._replace(error="no").ok
    table = bench.aot_table([good, good._replace(registers=60)])
    assert table.row_count == 1 and list(table.columns[3].cells) == ["60"]


def test_bytes():
    shape = (128, 577, 1024)
    numel = 128 * 577 * 1024
    (loss,) = select("distill_loss")
    assert moved_bytes(loss, shape, torch.bfloat16, backward=False) == 4 * numel
    assert moved_bytes(loss, shape, torch.bfloat16, backward=True) == 10 * numel
    (moments,) = select("moments")
    assert moved_bytes(moments, shape, torch.float32, backward=False) == 4 * numel
    fp8 = select("fp8")
    assert len(fp8) > 1 and moved_bytes(fp8[0], shape, torch.bfloat16, backward=False) == 3 * numel
    pixels = 8 * 3 * 112 * 112
    (augment,), (resize,) = select("augment"), select("resize")
    assert moved_bytes(augment, (8, 3, 112), torch.bfloat16, backward=False) == 3 * pixels
    assert moved_bytes(resize, (8, 3, 112), torch.float32, backward=False) == 4 * (pixels + 8 * 3 * 128 * 128)


@pytest.mark.skipif(not INTERPRETER, reason="the interpreter is off")
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_case_checks_its_kernel(operation):
    torch.manual_seed(0)
    inputs = operation.make((2, 3, 28) if operation.on_images else (2, 5, 64), torch.float32, CPU)
    with interpreted():
        upstream = draw_upstream(operation, inputs)
        errors = list(check(operation, operation.ours, inputs, upstream))
    assert errors and all(error <= allowed for error, allowed in errors)
    assert bool(upstream) == bool(operation.bytes[1])


def test_the_cache_is_flushed_without_a_write(monkeypatch):
    """Dirty lines in the cache would be written back in the timed kernel's time."""
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 0.01)
    for name, stand_in in (("Event", lambda enable_timing: event), ("synchronize", int), ("_sleep", int)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    stopwatch = bench.Stopwatch.__new__(bench.Stopwatch)
    stopwatch.other, stopwatch.largest = torch.zeros(1 << 16), torch.empty(())
    calls = []
    median, low, high = stopwatch.time([lambda: calls.append(0), lambda: calls.append(1)], repetitions=6)
    assert stopwatch.largest._version == 6 and stopwatch.other._version == 0  # writes, which torch counts
    assert (median, low, high) == (10.0, 10.0, 10.0) and calls[-6:] == [0, 1] * 3


class FakeStopwatch:
    """Calls everything once and takes as long as it is told."""

    device, device_name, l2_bytes = CPU, "A GPU", 1 << 20

    def time(self, calls):
        for call in calls:
            call()
        return 20.0, 19.0, 21.0


@pytest.mark.skipif(not INTERPRETER, reason="the interpreter is off")
def test_measures_both_passes_and_refuses_a_wrong_kernel():
    (operation,) = select("distill_loss")
    lines: list[str] = []
    with interpreted():
        arguments = ((2, 3, 32), torch.float32, FakeStopwatch(), 3000.0, ["compile"], lines.append)
        rows, correct = bench.measure(operation, *arguments)
        assert correct and [(row.implementation, row.passes) for row in rows] == [
            (name, passes) for name in ("ours", "eager") for passes in ("forward", "forward+backward")
        ]
        assert rows[0].percent_of_copy == pytest.approx(100 * rows[0].bytes / 20e-6 / 3e12)
        wrong = replace(operation, ours=lambda *x: operation.ours(*x[:-1], x[-1] * 1.01))
        rows, correct = bench.measure(wrong, *arguments)
        assert not correct and {row.implementation for row in rows} == {"eager"}
        assert any("ours: error" in line for line in lines)
        broken = replace(operation, ours=lambda *x: 1 / 0)
        assert not bench.measure(broken, *arguments)[1]


def test_newer_rows_replace_older_ones(tmp_path):
    path = tmp_path / "device" / "kernels.csv"
    other = replace(ROW, implementation="eager", median_us=80.0)
    write_rows(path, [ROW, other])
    newer = replace(ROW, median_us=8.0)
    write_rows(path, [newer])
    assert read_rows(path) == [other, newer]
    text = path.read_text().splitlines()
    assert text[0].endswith("percent_of_copy") and text[2].endswith(",0.12")


def test_a_shape_goes_to_the_operations_that_take_it():
    """Images of 1024 x 1024 pixels, or features without a whole head, would end the run."""
    (moments,), (augment,) = select("moments"), select("augment")
    given = [(2, 5, 64), (2, 3, 28)]
    assert bench.shapes_of(moments, given) == given[:1] and bench.shapes_of(augment, given) == given[1:]
    assert bench.shapes_of(augment, None) == bench.IMAGE_SHAPES and bench.shapes_of(moments, []) == bench.SHAPES


def test_folder_is_named_for_the_device():
    assert folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_command_line():
    args = bench.parse(["--dtype", "float16", "--shape", "1,2,3", "--shape", "4,5,6", "--skip", "compile,eager"])
    assert args.dtype == [torch.float16] and args.shape == [(1, 2, 3), (4, 5, 6)] and args.skip == ["compile", "eager"]
    for wrong in (["--dtype", "int8"], ["--shape", "1,2"]):
        with pytest.raises(SystemExit):
            bench.parse(wrong)
