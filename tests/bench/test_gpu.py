"""`python -m bench.gpu` with small commands in the place of its jobs: limits, failures, budget, runs that add up."""

from __future__ import annotations

import json
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

from bench import gpu, gpu_runner
from bench.gpu_jobs import FULL_MEMORY, PACKAGES, Job, images_for, installed, jobs
from bench.gpu_runner import Outcome, read_tests, tail
from bench.gpu_targets import read_record
from bench.records import Row, read_rows

DEVICE = {
    "name": "Made-up GPU", "folder": "made-up-gpu", "memory": 80 * 2**30, "capability": "9.0", "multiprocessors": 132,
    "driver": "580", "versions": "torch 2", "commit": "abc",
}  # fmt: skip
ROW = Row("moments", "forward", "bfloat16", "128x577x1024", "ours", 10.0, 9.0, 11.0, 27_000_000, 1, 3000.0, "A", "2")
PREAMBLE = f"""
import subprocess, sys, time
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
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(folder / "pids").write_text(f"{child.pid}")
print("hanging", flush=True)
time.sleep(600)
""",
    "fake_slow": """
try:
    print("measuring", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    (folder / "report").write_text("written at the interrupt")
    raise
""",
}


def job(part: int, name: str, minutes: float = 0.01, limit: float = 0.5, needs: tuple[str, ...] = ()) -> Job:
    return Job(part, name, f"about {name}", (f"fake_{name}",), minutes, limit, needs)


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """A call of the command with the given jobs; (exit status, what it printed, the page)."""
    for name, body in MODULES.items():
        (tmp_path / f"{name}.py").write_text(PREAMBLE + body)
    monkeypatch.setenv("PYTHONPATH", f"{gpu_runner.ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.setattr(gpu, "in_own_process", lambda describe: DEVICE)
    monkeypatch.setattr(gpu_runner, "GRACE", 0.5)

    def call(chosen: list[Job], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(gpu, "jobs", lambda memory=0: chosen)
        status = gpu.main([*arguments, "--output", str(tmp_path / "results")])
        path = tmp_path / "results" / "made-up-gpu" / "README.md"
        return status, capfd.readouterr().out, path.read_text() if path.exists() else ""

    return call


def ended(pid: int) -> bool:
    """Whether a process is gone; one that nobody waits for may stay as a zombie."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def record(tmp_path: Path) -> dict[str, Outcome]:
    content = read_record(tmp_path / "results" / "made-up-gpu")
    return {name: Outcome.from_json(line) for name, line in content["jobs"].items()}


def test_a_failure_does_not_stop_the_rest_but_is_the_status(run, tmp_path):
    status, out, page = run([job(1, "bad"), job(2, "good")])
    found = record(tmp_path)
    assert status == 1
    assert (found["bad"].status, found["bad"].reason, found["good"].status) == ("failed", "exit status 3", "done")
    assert "about to fail" in out and "all is well" in out  # as it comes
    assert found["bad"].tail == ["about to fail"] and "about to fail" in page
    assert (tmp_path / "results" / "made-up-gpu" / "logs" / "good.log").read_text() == "all is well\n"
    assert run([job(2, "good")])[0] == 0


def test_what_hangs_is_ended_with_its_children_and_its_results_stay(run, tmp_path):
    began = time.monotonic()
    status, _, page = run([job(1, "hang", 0.01, limit=3 / 60), job(2, "good")])
    folder = tmp_path / "results" / "made-up-gpu"
    assert status == 1 and time.monotonic() - began < 20
    assert record(tmp_path)["hang"].reason == "ended at its limit of 0.1 minutes; what it had written is kept"
    assert record(tmp_path)["good"].status == "done"
    assert ended(int((folder / "pids").read_text()))
    assert read_rows(folder / "kernels.csv") == [ROW] and "30.0 %" not in page and "90.0 %" in page


def test_an_interrupt_comes_before_the_kill(run, tmp_path):
    """pytest writes its report then."""
    run([job(1, "slow", 0.01, limit=2 / 60)])
    assert (tmp_path / "results" / "made-up-gpu" / "report").exists()


def test_a_missing_package_is_a_reason_with_its_cure(run, tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGES, "not_a_module.deep", "not-a-package")
    status, out, page = run([job(1, "good", needs=("not_a_module.deep",)), job(2, "bad", needs=("json",))])
    assert status == 1 and "all is well" not in out
    for text in (out, page):
        assert "not_a_module.deep not installed: python -m pip install not-a-package" in text
    assert record(tmp_path)["good"].status == "skipped"
    assert run([job(1, "good", needs=("not_a_module.deep",))])[0] == 0  # nothing has failed


def test_what_does_not_fit_into_the_minutes_is_named(run, tmp_path):
    everything = [job(1, "good", 1), job(2, "bad", 30, 40), job(3, "slow", 26, 30)]
    status, out, page = run(everything, "--minutes", "25")
    assert status == 0 and set(record(tmp_path)) == {"good"}
    for text in (out, page):
        assert "python -m fake_bad" in text and "python -m fake_slow" in text
    assert "## Not run yet" in page


def test_a_limit_does_not_outlast_the_minutes(run, monkeypatch):
    limits = []
    monkeypatch.setattr(gpu, "run_job", lambda job, seconds, *_: limits.append(seconds) or Outcome("a", "b", "done"))
    run([job(1, "good", 1, 8), job(2, "good", 1, 2)], "--minutes", "5")
    assert 290 < limits[0] <= 300 and limits[1] == 120


def test_parts_add_up(run, tmp_path):
    everything = [job(1, "good"), job(2, "bad"), job(3, "good")]
    everything[2] = Job(3, "third", "the third", ("fake_good",), 0.01, 1)
    assert run(everything, "--part", "1")[0] == 0
    _, _, page = run(everything, "--part", "3")
    assert set(record(tmp_path)) == {"good", "third"}
    assert "| 1 | good | done" in page and "| 3 | third | done" in page
    assert "## Not run yet" in page and "| 2 | about bad |" in page
    status, _, page = run(everything, "--part", "2", "--part", "1")
    assert status == 1 and set(record(tmp_path)) == {"good", "bad", "third"} and "## Not run yet" not in page
    skipping = [everything[0], Job(2, "bad", "about bad", ("fake_bad",), 0.01, 1, ("no_such_module_",)), everything[2]]
    PACKAGES["no_such_module_"] = "none"
    run(skipping, "--part", "2")
    assert record(tmp_path)["bad"].reason == "exit status 3"  # what was found before is not lost to a skip
    del PACKAGES["no_such_module_"]


def test_cut_off_by_a_kill_it_leaves_the_page(run, tmp_path):
    """What has no time to say goodbye has said before each job that it runs."""
    folder = tmp_path / "results" / "made-up-gpu"
    (tmp_path / "fake_look.py").write_text(PREAMBLE + "print((folder / 'README.md').read_text())")
    _, out, _ = run([Job(1, "look", "looks", ("fake_look",), 0.01, 1)])
    seen = out.split("=== look")[0]
    assert "| 1 | look | **cut off**" in seen and json.loads((folder / "gpu.json").read_text())["device"]["date"]


def test_a_termination_ends_the_job_and_leaves_the_page(tmp_path):
    for name, body in MODULES.items():
        (tmp_path / f"{name}.py").write_text(PREAMBLE + body)
    code = (
        "import sys; from bench import gpu, gpu_runner; from bench.gpu_jobs import Job; gpu_runner.GRACE = 0.5\n"
        f"gpu.in_own_process = lambda describe: {DEVICE!r}\n"
        "gpu.jobs = lambda memory=0: [Job(1, 'hang', 'hangs', ('fake_hang',), 0.01, 5)]\n"
        f"sys.exit(gpu.main(['--output', {str(tmp_path / 'results')!r}]))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{gpu_runner.ROOT}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line == "hanging\n":
            break
    process.send_signal(signal.SIGTERM)
    assert "interrupted; what was measured so far" in process.communicate(timeout=20)[0] and process.returncode == 130
    folder = tmp_path / "results" / "made-up-gpu"
    assert record(tmp_path)["hang"].reason == "interrupted" and "interrupted" in (folder / "README.md").read_text()
    assert ended(int((folder / "pids").read_text()))


def test_a_result_that_cannot_be_read_does_not_stop_the_measurements(run, tmp_path):
    folder = tmp_path / "results" / "made-up-gpu"
    folder.mkdir(parents=True)
    (folder / "step.json").write_text("{")
    status, out, _ = run([job(1, "bad"), job(2, "good")])
    assert status == 1 and "the page could not be written" in out and set(record(tmp_path)) == {"bad", "good"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_what_to_do(tmp_path, capsys, monkeypatch):
    assert gpu.in_own_process(dict) == {}
    monkeypatch.setattr(gpu, "in_own_process", lambda describe: describe())  # torch is here already
    assert gpu.main(["--output", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "found none" in out and "--aot sm_90" in out and not list(tmp_path.iterdir())


def test_describes_the_device(monkeypatch):
    found = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=1, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr("dune_fast.engine.provenance.driver_version", lambda: "580.1")
    device = gpu.describe_device()
    assert (device["folder"], device["capability"], device["driver"]) == ("nvidia-h100-80gb-hbm3", "9.0", "580.1")
    assert set(device) == set(DEVICE) and f"torch {torch.__version__}" in device["versions"]
    git = {"commit": "0123456789abcdef", "changed": ["bench/results/a/step.json"]}
    assert gpu.source(git) == "0123456789ab"
    assert gpu.source(git | {"changed": ["bench/step.py"]}) == "0123456789ab + changes"


def test_bad_requests_and_the_list(capsys):
    assert gpu.main(["--part", "99"]) == 2
    assert "no part 99; --list shows 1 to" in capsys.readouterr().out
    assert gpu.main(["--list"]) == 0
    assert all(job.command in capsys.readouterr().out for job in jobs()[:1])


def test_every_part_fits_half_an_hour_in_pieces():
    """Commands are understood, a part takes at most eight minutes, every variant of the step is in one of them."""
    from bench import kernels, step
    from bench.step_variants import VARIANTS

    everything, variants = jobs(), set()
    for part in {job.part for job in everything}:
        assert sum(job.limit for job in everything if job.part == part) <= 8
    assert len({job.name for job in everything}) == len(everything)
    for each in everything:
        assert each.minutes <= each.limit and set(each.needs) <= set(PACKAGES)
        module, *arguments = each.arguments
        if module == "bench.kernels":
            assert kernels.parse(arguments).shape is None or all(s[0] == 128 for s in kernels.parse(arguments).shape)
        elif module == "bench.step":
            variants |= {variant.name for variant in step.chosen(step.parse(arguments).only)}
    assert variants == {variant.name for variant in VARIANTS}


def test_a_small_device_gets_fewer_images():
    assert images_for(80 * 2**30) == images_for(FULL_MEMORY) == 128
    assert (images_for(40 * 2**30), images_for(24 * 2**30), images_for(2**30)) == (64, 32, 8)
    small = {job.name: job.command for job in jobs(24 * 2**30)}
    assert "--shape 32,577,1024" in small["kernels"] and "--batch 32" in small["step"]
    assert "-n" not in next(job for job in jobs(8 * 2**30) if job.name == "kernel-tests").arguments


def test_reads_pytests_report_and_hides_where_it_ran(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n"
        "@pytest.mark.skip(reason='needs a moon')\ndef test_skipped(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError\ndef test_error(broken): pass\n"
    )
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.skip('no DeepSpeed', allow_module_level=True)\n")
    (tmp_path / "test_import.py").write_text("import no_such_module_\n")
    report, log = tmp_path / "report.xml", tmp_path / "log"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", str(tmp_path)]
    with log.open("w") as file:
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        subprocess.run([*command, "--continue-on-collection-errors"], cwd=tmp_path, stdout=file, env=environment)
    tests = read_tests(report)
    assert tests.passed == 1 and tests.skipped == {"needs a moon": 1, "no DeepSpeed": 1}
    assert sorted(tests.failed) == ["test_import", "test_it::test_bad", "test_it::test_error"]
    assert read_tests(tmp_path / "none.xml") is None
    log.write_text(f"\x1b[31m{gpu_runner.ROOT}/bench/step.py\x1b[0m\nwritten to {tmp_path}/a\n\n")
    assert tail(log, tmp_path) == ["bench/step.py", "written to a"]


def test_modules_are_found_without_importing_them():
    assert installed("json.decoder") and not installed("no_such_module_.part") and not installed("no_such_module_")
