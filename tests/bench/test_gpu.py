"""`python -m bench.gpu`: small commands in the place of its jobs, and the page of a made-up run.

More than 350 lines: runner, targets and page share one made-up GPU.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from bench import gpu, kernels, step
from bench.gpu_jobs import FULL_MEMORY, Job, Outcome, images_for, jobs
from bench.gpu_page import markdown, page, read_predicted
from bench.gpu_targets import BOTH, FORWARD, Results, read_record, targets
from bench.kernel_cases import OPERATIONS
from bench.records import Measured, Row, read_rows, write_curves, write_json, write_rows, write_step
from bench.step_variants import VARIANTS

DEVICE = {
    "name": "Made-up GPU", "memory": 80 * 2**30, "capability": "9.0", "multiprocessors": 132, "driver": "580.1",
    "versions": "torch 2.13.0, triton 3.7.1", "commit": "abc",
}  # fmt: skip
ROW = Row("moments", "forward", "bfloat16", "128x577x1024", "ours", 10.0, 9.0, 11.0, 27_000_000, 3000.0, "A", "2")
PREAMBLE = f"""
import signal, subprocess, sys, time
from pathlib import Path
from bench.records import Row, write_rows
folder = Path(sys.argv[sys.argv.index("--output") + 1]) / "made-up-gpu"
write_rows(folder / "kernels.csv", [{ROW!r}])
"""
MODULES = {
    "fake_good": "print('all is well')",
    "fake_bad": "print('about to fail'); raise SystemExit(3)",
    # a child of its own, and both ignore the interrupt
    "fake_hang": """
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(folder / "pids").write_text(f"{child.pid}")
print("hanging", flush=True)
time.sleep(600)
""",
    "fake_slow": """
try:
    time.sleep(600)
except KeyboardInterrupt:
    (folder / "report").write_text("written at the interrupt")
    raise
""",
    "fake_look": "print((folder / 'README.md').read_text())",
}


def job(part: int, name: str, minutes: float = 0.05) -> Job:
    return Job(part, name, f"about {name}", (f"fake_{name}",), minutes)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where results go."""
    for name, body in MODULES.items():
        (tmp_path / f"{name}.py").write_text(PREAMBLE + body)
    monkeypatch.setenv("PYTHONPATH", f"{gpu.ROOT}{os.pathsep}{tmp_path}")
    return tmp_path / "results" / "made-up-gpu"


@pytest.fixture
def run(folder, monkeypatch, capfd):
    """A call of the command with the given jobs; (exit status, what it printed, the page)."""
    monkeypatch.setattr(gpu, "in_own_process", lambda describe: DEVICE)
    monkeypatch.setattr(gpu, "GRACE", 0.5)

    def call(chosen: list[Job], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(gpu, "jobs", lambda memory=0: chosen)
        status = gpu.main([*arguments, "--output", str(folder.parent)])
        return status, capfd.readouterr().out, (folder / "README.md").read_text()

    return call


def ended(pid: int) -> bool:
    """Whether a process is gone; one that nobody waits for may stay as a zombie."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def record(folder: Path) -> dict[str, Outcome]:
    return {name: Outcome(**line) for name, line in read_record(folder)["jobs"].items()}


def test_a_failure_does_not_stop_the_rest_but_is_the_status(run, folder):
    status, out, text = run([job(1, "bad"), job(2, "good")])
    found = record(folder)
    assert status == 1
    assert (found["bad"].status, found["bad"].reason, found["good"].status) == ("failed", "exit status 3", "done")
    assert "about to fail" in out and "all is well" in out  # as it comes
    assert found["bad"].tail == ["about to fail"] and "about to fail" in text and found["good"].last == "all is well"
    assert (folder / "logs" / "good.log").read_text() == "all is well\n"
    assert run([job(2, "good")])[0] == 0


def test_what_hangs_is_ended_with_its_children_and_its_results_stay(run, folder):
    began = time.monotonic()
    status, _, text = run([job(1, "hang", 0.025), job(2, "good")])
    assert status == 1 and time.monotonic() - began < 20
    assert record(folder)["hang"].reason == "ended at its limit of 0.1 minutes; what it had written is kept"
    assert record(folder)["good"].status == "done"
    assert ended(int((folder / "pids").read_text()))
    assert read_rows(folder / "kernels.csv") == [ROW] and "90.0 %" in text


def test_an_interrupt_comes_before_the_kill(run, folder):
    """pytest writes its report then."""
    run([job(1, "slow", 0.017)])
    assert (folder / "report").exists()


def test_what_does_not_fit_into_the_minutes_is_named_and_no_limit_outlasts_them(run, folder, monkeypatch):
    limits = []

    def run_job(job, seconds, folder, outcome):
        limits.append(seconds)
        outcome.status = "done"

    monkeypatch.setattr(gpu, "run_job", run_job)
    everything = [job(1, "good", 4), job(2, "bad", 30), job(3, "slow", 1)]
    status, out, text = run(everything, "--minutes", "5")
    assert status == 0 and set(record(folder)) == {"good", "slow"}
    assert 290 < limits[0] <= 300 and limits[1] == 120
    assert "python -m fake_bad" in out and "python -m fake_bad" in text.partition("## Not run yet")[2]


def test_parts_add_up(run, folder):
    everything = [job(1, "good"), job(2, "bad"), job(3, "look")]
    assert run(everything, "--part", "1")[0] == 0
    _, out, text = run(everything, "--part", "3")
    assert set(record(folder)) == {"good", "look"}
    assert "| 1 | good | done" in text and "| 3 | look | done" in text
    assert "| 3 | look | **cut off**" in out.split("=== look")[0]  # what is killed without a word has said that it runs
    assert "## Not run yet" in text and "| 2 | about bad |" in text
    status, _, text = run(everything, "--part", "2", "--part", "1")
    assert status == 1 and set(record(folder)) == {"good", "bad", "look"} and "## Not run yet" not in text


def test_a_termination_ends_the_job_and_leaves_the_page(folder):
    code = (
        "import sys; from bench import gpu; from bench.gpu_jobs import Job; gpu.GRACE = 0.5\n"
        f"gpu.in_own_process = lambda describe: {DEVICE!r}\n"
        "gpu.jobs = lambda memory=0: [Job(1, 'hang', 'hangs', ('fake_hang',), 0.5)]\n"
        f"sys.exit(gpu.main(['--output', {str(folder.parent)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line == "hanging\n":
            break
    process.send_signal(signal.SIGTERM)
    assert "interrupted; what was measured so far" in process.communicate(timeout=20)[0] and process.returncode == 130
    assert record(folder)["hang"].reason == "interrupted" and "interrupted" in (folder / "README.md").read_text()
    assert ended(int((folder / "pids").read_text()))


def test_a_result_that_cannot_be_read_does_not_stop_the_measurements(run, folder):
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("older")
    (folder / "step.json").write_text("{")
    status, out, _ = run([job(1, "bad"), job(2, "good")])
    assert status == 1 and "the page could not be written" in out and set(record(folder)) == {"bad", "good"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_what_to_do(tmp_path, capsys, monkeypatch):
    assert gpu.in_own_process(dict) == {}
    monkeypatch.setattr(gpu, "in_own_process", lambda describe: describe())  # torch is here already
    assert gpu.main(["--output", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "found none" in out and "--aot sm_90" in out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("changed", "mark"), [("bench/results/a/step.json", ""), ("bench/step.py", " + changes")])
def test_describes_the_device(monkeypatch, changed, mark):
    found = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=1, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr("dune_fast.engine.provenance.driver_version", lambda: "580.1")
    git = {"commit": "0123456789abcdef", "changed": [changed]}
    monkeypatch.setattr("dune_fast.engine.provenance.git_state", lambda root: git)
    device = gpu.describe_device()
    assert (device["capability"], device["driver"], device["commit"]) == ("9.0", "580.1", f"0123456789ab{mark}")
    assert device.keys() == DEVICE.keys() and f"torch {torch.__version__}" in device["versions"]


def test_bad_requests_and_the_list(capsys):
    assert gpu.main(["--part", "99"]) == 2
    assert "no part 99; --list shows 1 to" in capsys.readouterr().out
    assert gpu.main(["--list"]) == 0
    assert jobs()[0].command in capsys.readouterr().out


def test_every_part_is_short_and_its_commands_are_understood():
    everything, variants = jobs(), set()
    for part in {job.part for job in everything}:
        assert sum(job.limit for job in everything if job.part == part) <= 8
    assert len({job.name for job in everything}) == len(everything)
    for module, *arguments in (job.arguments for job in everything):
        if module == "bench.kernels":
            assert all(shape[0] == 128 for shape in kernels.parse(arguments).shape or ())
        elif module == "bench.step":
            variants |= {variant.name for variant in step.chosen(step.parse(arguments).only)}
    assert variants == {variant.name for variant in VARIANTS}


def test_a_small_device_gets_fewer_images():
    assert images_for(80 * 2**30) == images_for(FULL_MEMORY) == 128
    assert (images_for(40 * 2**30), images_for(24 * 2**30), images_for(2**30)) == (64, 32, 8)
    small = {job.name: job.command for job in jobs(24 * 2**30)}
    assert "--shape 32,577,1024" in small["kernels"] and "--batch 32" in small["step"]
    assert "-n" not in next(job for job in jobs(8 * 2**30) if job.name == "kernel-tests").arguments


def test_a_log_hides_where_it_ran(tmp_path):
    log = tmp_path / "log"
    log.write_text(f"\x1b[31m{gpu.ROOT}/bench/step.py\x1b[0m\nwritten to {tmp_path}/a\n\n")
    assert gpu.tail(log, tmp_path) == ["bench/step.py", "written to a"]


# ---------------------------------------------------------------- the page


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
