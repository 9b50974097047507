"""srun, and the script of `dune-fast launch slurm`, under SLURM on two hosts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from dune_fast.engine.launch import slurm_port
from dune_fast.teachers.run_files import complete_steps
from tests.clusters import slurm as installed
from tests.clusters.runs import ROOT, TRAIN, last_step, lost_steps, says
from tests.clusters.slurm import Slurm
from tests.clusters.two_hosts import wait_until

pytestmark = [
    pytest.mark.clusters,
    pytest.mark.skipif(bool(installed.why_not()), reason=installed.why_not()),
]


@pytest.fixture(scope="module")
def slurm(hosts, tmp_path_factory) -> Iterator[Slurm]:
    made = Slurm(hosts, tmp_path_factory.mktemp("slurm") / "two")
    try:
        made.begin()
        yield made
    finally:
        made.end()


@pytest.fixture(autouse=True)
def no_jobs(slurm) -> Iterator[None]:
    yield
    slurm.bring_back()


def train(run, runs, *more: str) -> list[str]:
    """The command of a rank."""
    return [sys.executable, TRAIN, *runs.overrides(run), *more]


@pytest.mark.parametrize("nodes", [1, 2])
def test_srun(slurm, runs, row, tmp_path, nodes):
    """A node's name in SLURM, df1, is known to nobody: MASTER_ADDR says where it is."""
    run = tmp_path / "run"
    row.note = f"{nodes} nodes"
    started = slurm.run("srun", f"--nodes={nodes}", "--ntasks=2", *train(run, runs), MASTER_ADDR="10.77.0.1")
    assert started.wait() == 0, started.text()[-3000:]
    runs.compare(run)


def test_a_nodes_name_is_not_known(slurm, runs, row, tmp_path):
    began, ends = time.monotonic(), "--kill-on-bad-exit=1"  # rank 0 would wait for the other
    started = slurm.run("srun", ends, "--nodes=2", "--ntasks=2", *train(tmp_path / "run", runs))
    says(started, "the name df1 of rank 0's host is not known here")
    row.seconds = time.monotonic() - began
    assert started.wait() != 0 and "set MASTER_ADDR" in started.text() and "Traceback" not in started.text()


def test_two_jobs_use_one_port(slurm, runs, row, tmp_path):
    """Regression: a rank joined the other job's store."""
    port = str(slurm_port({"SLURM_JOB_ID": "1"}))
    shared = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": port}
    first = slurm.run("srun", "--nodes=2", "--ntasks=2", *train(tmp_path / "one", runs), **shared)
    runs.reach(tmp_path / "one", first, 1)
    began = time.monotonic()
    second = slurm.run("srun", "-K1", "--nodes=2", "--ntasks=2", *train(tmp_path / "two", runs), **shared)
    assert second.wait() != 0
    row.seconds = time.monotonic() - began
    assert "two runs use one port" in second.text() or "cannot listen on port" in second.text(), second.text()[-3000:]
    assert first.wait() == 0, first.text()[-3000:]
    runs.compare(tmp_path / "one")


def script(runs, run, folder, *options: str, nodes: int = 2):
    """The script that the command prints."""
    command = [sys.executable, "-m", "dune_fast", "launch", "slurm", f"--nodes={nodes}", "--gpus-per-node=0"]
    done = subprocess.run([*command, *options, *runs.overrides(run)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = folder / "job.sh"
    path.write_text(done.stdout)
    return path


def output(path) -> str:
    out = path.with_name(path.name + ".out")
    return out.read_text(errors="replace") if out.exists() else ""


def test_the_time_limit_comes(slurm, runs, row, tmp_path):
    """The run saves, is queued again, and ends like one that nothing happened to."""
    run = tmp_path / "run"
    path = script(runs, run, tmp_path, "--save-ahead=60", "--time=2")
    job = slurm.submit(path)
    wait_until(lambda: last_step(run) > 10, f"steps in {output(path)}", 240.0)
    slurm.call("scancel", "--signal=USR1", job)  # as SLURM does ahead of the limit, which is minutes away
    began = time.monotonic()
    wait_until(lambda: slurm.field(job, "Restarts") == "1", "a requeue", 90.0, 0.5)
    row.seconds, row.lost = time.monotonic() - began, lost_steps(run)
    assert row.lost == 0 and json.loads((run / "state.json").read_text())["state"] == "stopped"
    # SLURM starts a job again after two minutes, until which nodes refuse what they know of the start before
    assert slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT", seconds=400.0) == "COMPLETED", output(path)[-3000:]
    runs.compare(run)


def test_the_job_is_cancelled(slurm, runs, row, tmp_path):
    run = tmp_path / "run"
    path = script(runs, run, tmp_path)
    job = slurm.submit(path)
    wait_until(lambda: last_step(run) > 10, f"steps in {output(path)}", 240.0)
    began = time.monotonic()
    slurm.call("scancel", job)
    slurm.wait(job, "CANCELLED")
    wait_until(lambda: "idle" in slurm.call("sinfo", "-h", "-o", "%t"), "the end", 60.0)
    row.seconds, row.lost = time.monotonic() - began, lost_steps(run)
    assert row.lost == 0 and complete_steps(run)
    again = slurm.submit(path)
    assert slurm.wait(again, "COMPLETED", "FAILED") == "COMPLETED", output(path)[-3000:]
    runs.compare(run)


def test_a_node_is_lost_for_good(slurm, runs, row, tmp_path):
    """`sbatch --nodes=1` goes on with the other one."""
    run = tmp_path / "run"
    path = script(runs, run, tmp_path)
    job = slurm.submit(path)
    wait_until(lambda: last_step(run) > 30, f"steps in {output(path)}", 240.0)
    began = time.monotonic()
    slurm.hosts.lose_power("nodeB")
    wait_until(lambda: "rank" in output(path).lower() and "error" in output(path).lower(), "a message", 150.0)
    row.seconds, row.lost = time.monotonic() - began, lost_steps(run)
    slurm.call("scancel", job)
    wait_until(lambda: "df1" in slurm.call("sinfo", "-h", "-t", "idle", "-N", "-o", "%N"), "df1", 120.0, 0.5)
    again = slurm.submit(path, "--nodes=1", "--ntasks-per-node=1")
    assert slurm.wait(again, "COMPLETED", "FAILED") == "COMPLETED", output(path)[-3000:]
    assert "saved by 2 x ZeRO 1" in output(path)
