"""`python -m bench.gpu`: small commands in the place of its jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from bench import gpu, kernels, step
from bench.gpu_jobs import FULL_MEMORY, Job, Outcome, images_for, jobs
from bench.gpu_targets import read_record
from bench.records import Row, read_rows
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
    """An interrupt comes before the kill: pytest writes its report then."""
    began = time.monotonic()
    status, _, text = run([job(1, "hang", 0.025), job(1, "slow", 0.017), job(2, "good")])
    assert (folder / "report").exists()
    assert status == 1 and time.monotonic() - began < 20
    assert record(folder)["hang"].reason == "ended at its limit of 0.1 minutes; what it had written is kept"
    assert record(folder)["good"].status == "done"
    assert ended(int((folder / "pids").read_text()))
    assert read_rows(folder / "kernels.csv") == [ROW] and "90.0 %" in text


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
