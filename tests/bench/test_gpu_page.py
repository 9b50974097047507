"""The page of `python -m bench.gpu` on a made-up run, written by the stores of `bench.kernels` and `bench.step`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bench.gpu_jobs import jobs
from bench.gpu_page import markdown, page, read_predicted
from bench.gpu_runner import Outcome, Tests
from bench.gpu_targets import BOTH, FORWARD, OF_COPY, Results, missed, targets
from bench.kernel_cases import OPERATIONS
from bench.records import Measured, Row, write_curves, write_rows, write_steps

VERSIONS = "torch 2.13.0, triton 3.7.1, CUDA 13.0, Linux"
DEVICE = {
    "name": "Made-up GPU", "folder": "made-up-gpu", "memory": 80 * 2**30, "capability": "9.0", "multiprocessors": 132,
    "driver": "580.1", "versions": VERSIONS, "commit": "abc", "date": "2026-01-02 03:04 UTC",
}  # fmt: skip
SPEEDS = {"ours": 1.0, "compile": 1.3, "eager": 9.0}


def rows(operation: str, passes: str, percent: float, dtype: str = "bfloat16") -> list[Row]:
    """Every implementation; ours reaches `percent` of a copy of 3000 GB/s."""
    size = 300_000_000
    us = size / (3000e3 * percent / 100)
    common = size, 10 * size, 3000.0, "Made-up GPU", VERSIONS
    about = operation, passes, dtype, "128x3x336" if operation == "augment_colour" else "128x577x1024"
    return [Row(*about, name, us * times, us, us, *common) for name, times in SPEEDS.items()]


def step(variant: str, ms: float, syncs: int = 0, batch: int = 128, fp8: float | None = None) -> Measured:
    return Measured(
        variant, batch, ms, ms - 1, ms + 1, {"backward": ms}, batch / ms * 1e3, 1.574 * batch / ms * 1e3, 800.0, fp8,
        peak_bytes=39 * 2**30, host_syncs=syncs, kernels=1500, launches=1600, gap_share=0.021,
    )  # fmt: skip


def outcome(name: str, status: str = "done", **more: object) -> Outcome:
    command = next(job.command for job in jobs() if job.name == name)
    return Outcome(name, command, status, date="2026-01-02 03:04 UTC", commit="abc", seconds=110, **more)


def full_run(folder: Path) -> None:
    """A made-up run in which GELU, the arithmetic of the step and one test fall short; two jobs have no result."""
    measured = [row for key in OF_COPY for row in rows(*key, 75 if key == ("bias_gelu", FORWARD) else 91)]
    write_rows(folder / "kernels.csv", [*measured, *rows("moments", FORWARD, 60, dtype="float32")])
    steps = [step("eager", 1500, 619), step("ours", 540), step("ours+lean", 488), step("ours+fp8", 430, fp8=1500)]
    steps.append(step("ours+routing", 300))  # the fastest, but it does less
    write_steps(folder / "step.json", "dune_336", "Made-up GPU", VERSIONS, steps)
    write_steps(folder / "step.json", "dune_448", "Made-up GPU", VERSIONS, [step("ours", 1100)])
    losses = {"eager": [2.0, 1.0], "ours": [2.001, 1.001], "ours+lean": [2.001, 1.002], "ours+fp8": [2.01, 1.01]}
    write_curves(folder / "curve_dune_336.csv", losses)
    tests = Tests(15, ["tests/kernels/test_fp8.py::test_same_bits"], {"DALI is not installed": 1})
    tail = ["E   AssertionError: 3 of 64 differ", "1 failed, 15 passed"]
    outcomes = [
        outcome("gpu-tests", "failed", reason="exit status 1", tests=tests, tail=tail),
        outcome("kernel-tests", tests=Tests(612)), outcome("kernels"), outcome("step"), outcome("curves"),
        outcome("all-kernels", "failed", reason="ended at its limit of 8.0 minutes"), outcome("step-448"),
        outcome("data", "skipped", reason="nvidia.dali not installed: python -m pip install nvidia-dali-cuda130"),
    ]  # fmt: skip
    record = {"device": DEVICE, "jobs": {each.name: asdict(each) for each in outcomes}}
    (folder / "gpu.json").write_text(json.dumps(record))
    (folder / "kernels.png").touch()


@pytest.fixture
def folder(tmp_path) -> Path:
    full_run(tmp_path)
    return tmp_path


def line(text: str, start: str) -> str:
    """The one line that starts so."""
    (found,) = (row for row in text.splitlines() if row.startswith(start))
    return found


def test_the_page_says_what_matters_first(folder):
    text = page(folder, jobs(), read_predicted())
    top = text.partition("## Targets")[0]
    assert text.startswith("# Made-up GPU\n") and "driver 580.1" in top and VERSIONS in top and "2026-01-02" in top
    assert "**Correctness: FAILED**, 1 of 628 tests" in top
    assert "- `bias_gelu` forward: 75.0 %, wanted 85 % of a copy" in top
    assert "- step, arithmetic of the fastest in bf16: 51.6 % (ours+lean), wanted 60 % of the matrix rate" in top
    assert "298 images/s at 336 px (ours+fp8), 3.5 times plain PyTorch" in top and "120 hours" in top
    assert "gpu-tests, all-kernels, data" in top
    record = json.loads((folder / "gpu.json").read_text())
    record["jobs"]["gpu-tests"] |= {"status": "done", "tests": asdict(Tests(16, [], {"DALI is not installed": 1}))}
    (folder / "gpu.json").write_text(json.dumps(record))
    assert "**Correctness: passed**, 628 tests; 1 were skipped" in page(folder, jobs(), read_predicted())


def test_the_page_shows_predicted_beside_measured(folder):
    us = 300_000_000 / 3000e3 / 0.88
    predicted = {**read_predicted(), "kernels": {("moments", FORWARD, "bfloat16", "128x577x1024"): us}}
    text = page(folder, jobs(), predicted)
    assert line(text, "| `moments` | forward | 110 |") == (
        "| `moments` | forward | 110 | 88 % | 91.0 % | 85 % met | 9.00 x | 1.30 x |"
    )
    assert "| `bias_gelu` | forward | 133 |  | 75.0 % | 85 % **missed** |" in text
    assert line(text, "| `moments` | forward | float32 |").endswith("| 60.0 % | 9.00 x | 1.30 x |")
    assert line(text, "| ours | 128 | 517 |") == (
        "| ours | 128 | 517 | 540 (539 to 541) | 237 | 373 | 46.6 % | 38.7 | 39.0 | 0 | 2.1 % |"
    )
    assert "| ours+fp8 | 2.0100 | 1.0100 | 0.75 % | 2.0 % met |" in text
    assert "![Roofline" in text and "(step_dune_336.png)" not in text  # plots that are there
    assert "| 1 | gpu-tests | **failed**: exit status 1 | 1.8 |" in text and "3 of 64 differ" in text
    assert "- failed: `tests/kernels/test_fp8.py::test_same_bits`" in text
    assert "skipped, 1 of gpu-tests: DALI is not installed" in text
    assert f"share of a copy's bandwidth | all | {len(OF_COPY) - 1} of {len(OF_COPY)} | **missed** |" in text
    left = text.partition("## Not run yet")[2]
    assert "eager+compile,ours" in left and "bench.data" not in left


def test_targets_tell_missed_from_not_measured(folder, tmp_path_factory):
    found = targets(Results.read(folder))
    assert [target.about for target in missed(found)] == [
        "`bias_gelu` forward", "step, arithmetic of the fastest in bf16"
    ]  # fmt: skip
    unknown = [target.about for target in found if target.met is None]
    assert unknown == [
        "step, ours over torch.compile of it", "losses of ours+bf16stream against plain PyTorch's",
        "losses of ours+stream against plain PyTorch's", "loader over what the fastest step consumes",
    ]  # fmt: skip
    empty = targets(Results.read(tmp_path_factory.mktemp("empty")))
    assert len(empty) == len(found) and all(target.met is None for target in empty)


def test_a_kernel_that_fails_its_check_is_a_missed_target(folder):
    """bench.kernels does not time it: its absence beside the others' numbers is the finding."""
    (folder / "kernels.csv").unlink()
    write_rows(folder / "kernels.csv", [row for row in rows("rope2d", BOTH, 90) if row.implementation != "ours"])
    (target,) = missed(targets(Results.read(folder)))[:1]
    assert target.about == "`rope2d` forward+backward" and "not timed" in target.found
    assert "| `rope2d` | forward+backward |  |  | failed its check | 85 % **missed** |" in page(
        folder, jobs(), read_predicted() | {"kernels": {}}
    )


def test_waits_losses_and_memory_that_miss(folder):
    steps = [step("ours", 540, syncs=2), step("ours+lean", 488, syncs=0)]
    write_steps(folder / "step.json", "dune_336", "Made-up GPU", VERSIONS, steps)
    content = json.loads((folder / "step.json").read_text())
    content["experiments"]["dune_448"] = {"ours+fp8": content["experiments"]["dune_336"]["ours+fp8"]}
    (folder / "step.json").write_text(json.dumps(content))
    losses = {"eager": [2.0, 1.0], "ours": [2.1, 1.0], "ours+lean": [2.0, float("nan")]}
    write_curves(folder / "curve_dune_336.csv", losses)
    found = {target.about: target.found for target in missed(targets(Results.read(folder)))}
    assert found["step, host syncs of all our variants"] == "ours 2"
    assert found["128 images a step at 448 px"] == "no result"
    assert found["losses of ours against plain PyTorch's"] == "2.50 % over 2 steps"
    assert "nan" in found["losses of ours+lean against plain PyTorch's"]


def test_launches_of_a_prediction_add_up(tmp_path):
    """The CSV has a line a launch, forward and backward apart; what does not compile has no time."""
    (tmp_path / "predicted.json").write_text(json.dumps({"copy_gb_s": 3000}))
    assert read_predicted(tmp_path) == {"copy_gb_s": 3000, "kernels": {}}
    lines = [
        "sm_90,rope2d,forward,bfloat16,128x577x1024,a,10.5", "sm_90,rope2d,backward,bfloat16,128x577x1024,a,20",
        "sm_90,rope2d,backward,bfloat16,128x577x1024,b,5", "sm_80,rope2d,forward,bfloat16,128x577x1024,a,99",
        "sm_90,moments,forward,bfloat16,128x577x1024,a,",
    ]  # fmt: skip
    header = "target,operation,passes,dtype,shape,kernel,us"
    (tmp_path / "predicted_sm_90.csv").write_text("\n".join([header, *lines]))
    case = "bfloat16", "128x577x1024"
    assert read_predicted(tmp_path)["kernels"] == {("rope2d", FORWARD, *case): 10.5, ("rope2d", BOTH, *case): 35.5}
    assert set(read_predicted()) >= {"device", "source", "copy_gb_s", "step", "kernels"}  # the committed ones


def test_every_feature_kernel_has_a_target():
    files = {"moments", "distill_loss", "layer_norm", "gelu", "rope2d", "fp8"}
    wanted = {(op.name, FORWARD) for op in OPERATIONS if op.file in files}
    wanted |= {(op.name, BOTH) for op in OPERATIONS if op.file in files and op.bytes[1]}
    assert wanted <= set(OF_COPY)


def test_predictions_are_for_full_batches(folder):
    write_steps(folder / "step.json", "dune_336", "Made-up GPU", VERSIONS, [step("ours", 150, batch=32)])
    text = page(folder, jobs(24 * 2**30), read_predicted())
    assert "| ours | 32 |  | 150 (149 to 151) |" in text
    assert "| step, ours over plain PyTorch | 2.5 x | 2.50 x | met |" in text  # an image, not a step


def test_an_empty_folder_still_has_a_page(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps({"device": DEVICE, "jobs": {}}))
    text = page(tmp_path, jobs(), read_predicted())
    assert "**Correctness: not tested" in text and "0 met, 0 missed" in text and "## Kernels" not in text


def test_a_cell_may_hold_a_bar():
    assert markdown(("a",), [("b|c",)]) == "| a |\n| --- |\n| b\\|c |"
