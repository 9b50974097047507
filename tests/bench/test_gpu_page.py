"""The page of `python -m bench.gpu`, and its targets, for a made-up run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bench.gpu_jobs import Outcome, jobs
from bench.gpu_page import markdown, page, read_predicted
from bench.gpu_targets import BOTH, FORWARD, Results, targets
from bench.kernel_cases import OPERATIONS
from bench.records import Measured, Row, write_curves, write_json, write_rows, write_step
from tests.bench.test_gpu import DEVICE


def rows(operation: str, passes: str, share: float, dtype: str = "bfloat16") -> list[Row]:
    """Every implementation; ours reaches `share` percent of a copy of 3000 GB/s."""
    us = 300_000_000 / (3000e3 * share / 100)
    about = operation, passes, dtype, "128x3x336" if operation == "augment_colour" else "128x577x1024"
    speeds = {"ours": 1.0, "compile": 1.3, "eager": 9.0}
    return [Row(*about, name, us * x, us, us, 300_000_000, 3000.0, "A", "torch 2") for name, x in speeds.items()]


def measured(variant: str, ms: float, syncs: int = 0, batch: int = 128) -> Measured:
    flops = 1.574 * batch / ms * 1e3
    return Measured(variant, batch, ms, ms - 1, ms + 1, flops, 800.0, 39 * 2**30, syncs, 1600, 0.021)


@pytest.fixture
def full(tmp_path) -> Path:
    """A made-up run in which GELU, the arithmetic of the step and one test fall short; two jobs have no result."""
    wanted = [(o.name, passes) for o in OPERATIONS if o.goal for passes in (FORWARD, BOTH)[: 1 + bool(o.bytes[1])]]
    everything = [row for key in wanted for row in rows(*key, 75 if key == ("bias_gelu", FORWARD) else 91)]
    write_rows(tmp_path / "kernels.csv", [*everything, *rows("moments", FORWARD, 60, dtype="float32")])
    steps = measured("eager", 1500, 619), measured("ours", 540), measured("ours+lean", 488), measured("ours+fp8", 430)
    for each in (*steps, measured("ours+routing", 300)):  # the fastest, but it does less
        write_step(tmp_path / "step.json", "dune_336", "Made-up GPU", each)
    write_step(tmp_path / "step.json", "dune_448", "Made-up GPU", measured("ours", 1100))
    losses = {"eager": [2.0, 1.0], "ours": [2.001, 1.001], "ours+lean": [2.001, 1.002], "ours+fp8": [2.01, 1.01]}
    write_curves(tmp_path / "curve_dune_336.csv", losses)
    ended = {
        "gpu-tests": ("failed", "exit status 1", 110, "1 failed, 15 passed", ["E   3 of 64 differ"]),
        "kernel-tests": ("done", "", 60, "612 passed, 3 skipped in 60 s"),
        "all-kernels": ("failed", "ended at its limit of 8.0 minutes"),
    }
    commands = {each.name: each.command for each in jobs()}
    outcomes = {name: asdict(Outcome(name, commands[name], "2026-01-02", "abc", *how)) for name, how in ended.items()}
    write_json(tmp_path / "gpu.json", {"device": {**DEVICE, "date": "2026-01-02"}, "jobs": outcomes})
    return tmp_path


def line(text: str, start: str) -> str:
    """The one line that starts so."""
    (found,) = (row for row in text.splitlines() if row.startswith(start))
    return found


def test_the_page_says_what_matters_first(full):
    text = page(full, jobs(), read_predicted())
    top = text.partition("## Targets")[0]
    assert text.startswith("# Made-up GPU\n") and "driver 580.1" in top and DEVICE["versions"] in top
    assert "**Correctness: FAILED** (gpu-tests: 1 failed, 15 passed; kernel-tests: 612 passed, 3 skipped" in top
    assert "- `bias_gelu` forward: 75.0 %, wanted 85 % of a copy" in top
    assert "- step, arithmetic of the fastest in bf16: 51.6 % (ours+lean), wanted 60 % of the matrix rate" in top
    assert "298 images/s at 336 px (ours+fp8), 3.5 times plain PyTorch" in top and "120 hours" in top
    record = json.loads((full / "gpu.json").read_text())
    record["jobs"]["gpu-tests"] |= {"status": "done", "last": "= 16 passed ="}
    write_json(full / "gpu.json", record)
    assert "**Correctness: passed** (gpu-tests: 16 passed; kernel-tests" in page(full, jobs(), read_predicted())


def test_the_page_shows_predicted_beside_measured(full):
    us = 300_000_000 / 3000e3 / 0.88
    predicted = {**read_predicted(), "kernels": {("moments", FORWARD, "bfloat16", "128x577x1024"): us}}
    text = page(full, jobs(), predicted)
    case = "| bfloat16 | 128x577x1024 |"
    assert line(text, f"| `moments` | forward {case}") == (
        f"| `moments` | forward {case} 110 | 88 % | 91.0 % | 9.00 x | 1.30 x |"
    )
    assert f"| `bias_gelu` | forward {case} 133 |  | 75.0 % |" in text
    assert line(text, "| `moments` | forward | float32 |").endswith("| 60.0 % | 9.00 x | 1.30 x |")
    assert line(text, "| ours | 128 | 517 |").startswith(
        "| ours | 128 | 517 | 540 (539 to 541) | 237 | 373 | 46.6 % | 38.7 | 39.0 | 0 | 2.1 % |"
    )
    assert "| losses of ours+fp8 against plain PyTorch's | within 2.0 % | 0.75 % | met |" in text
    assert "| 1 | gpu-tests | **failed**: exit status 1 | 1.8 |" in text and "3 of 64 differ" in text
    left = text.partition("## Not run yet")[2]
    assert "ours,ours+bf16stream" in left and "all-kernels" not in left


def test_targets_tell_missed_from_not_measured(full, tmp_path_factory):
    found = targets(Results.read(full))
    missed = [target.about for target in found if target.met is False]
    assert missed == ["`bias_gelu` forward", "step, arithmetic of the fastest in bf16"]
    unknown = [target.about for target in found if target.met is None]
    stream, loader = "losses of ours+bf16stream against plain PyTorch's", "loader over what the fastest step consumes"
    assert unknown == [stream, loader]
    write_json(full / "data.json", {"336 px": {"contenders": [{"name": "ours, CPU", "rates": [400.0, 500.0, 600.0]}]}})
    assert targets(Results.read(full))[-1].found == "1.17 x (500 images/s)"
    empty = targets(Results.read(tmp_path_factory.mktemp("empty")))
    assert len(empty) == len(found) and all(target.met is None for target in empty)


def test_a_kernel_that_fails_its_check_is_a_missed_target(full):
    """bench.kernels does not time it: its absence beside the others' numbers is the finding."""
    (full / "kernels.csv").unlink()
    write_rows(full / "kernels.csv", [row for row in rows("rope2d", BOTH, 90) if row.implementation != "ours"])
    target = next(target for target in targets(Results.read(full)) if target.met is False)
    assert target.about == "`rope2d` forward+backward" and "not timed" in target.found
    text = page(full, jobs(), read_predicted() | {"kernels": {}})
    assert "| `rope2d` | forward+backward | bfloat16 | 128x577x1024 |  |  | failed its check |" in text


def test_waits_losses_and_memory_that_miss(full):
    for each in (measured("ours", 540, syncs=2), measured("ours+lean", 488)):
        write_step(full / "step.json", "dune_336", "Made-up GPU", each)
    content = json.loads((full / "step.json").read_text())
    content["experiments"]["dune_448"] = {"ours+fp8": content["experiments"]["dune_336"]["ours+fp8"]}
    write_json(full / "step.json", content)
    losses = {"eager": [2.0, 1.0], "ours": [2.1, 1.0], "ours+lean": [2.0, float("nan")]}
    write_curves(full / "curve_dune_336.csv", losses)
    found = {target.about: target.found for target in targets(Results.read(full)) if target.met is False}
    assert found["step, host syncs of all our variants"] == "ours 2"
    assert found["128 images a step at 448 px"] == "no result"
    assert found["losses of ours against plain PyTorch's"] == "2.50 %"
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


def test_predictions_are_for_full_batches(full):
    write_step(full / "step.json", "dune_336", "Made-up GPU", measured("ours", 150, batch=32))
    text = page(full, jobs(24 * 2**30), read_predicted())
    assert "| ours | 32 |  | 150 (149 to 151) |" in text
    assert "| step, ours over plain PyTorch | 2.5 x | 2.50 x | met |" in text  # an image, not a step


def test_an_empty_folder_still_has_a_page(tmp_path):
    write_json(tmp_path / "gpu.json", {"device": {**DEVICE, "date": ""}, "jobs": {}})
    text = page(tmp_path, jobs(), read_predicted())
    assert "**Correctness: not tested" in text and "0 met, 0 missed" in text and "## Kernels" not in text


def test_a_cell_may_hold_a_bar():
    assert markdown(("a",), [("b|c",)]) == "| a |\n| --- |\n| b\\|c |"
