"""`dune-fast distill --hostfile` and torchrun on two hosts, and what happens to hosts."""

from __future__ import annotations

import signal
import sys
import time
from statistics import median

import pytest

from dune_fast.engine.metrics import read_metrics
from dune_fast.teachers.run_files import complete_steps
from tests.clusters.runs import ROOT, STEPS, TRAIN, last_step, lost_steps, says
from tests.clusters.two_hosts import wait_until

pytestmark = pytest.mark.clusters


def test_nothing_happens(runs, row, tmp_path):
    runs.finish(tmp_path / "run")
    runs.compare(tmp_path / "run")


def test_a_rank_of_the_other_host_is_killed(runs, row, tmp_path):
    run = tmp_path / "run"
    started = runs.start(run)
    runs.reach(run, started)
    for rank in runs.hosts.processes("nodeB", "--local_rank"):
        rank.kill()
    row.seconds = says(started, "a process on nodeB has ended by SIGKILL")
    assert started.wait() != 0
    row.lost = lost_steps(run)
    runs.finish(run)
    runs.compare(run)


def test_the_other_host_crashes(runs, row, tmp_path):
    run = tmp_path / "run"
    started = runs.start(run)
    runs.reach(run, started)
    runs.hosts.kill("nodeB")
    row.seconds = says(started, "the connection to nodeB is lost")
    assert started.wait() != 0
    row.lost = lost_steps(run)
    runs.hosts.bring_back("nodeB")
    runs.finish(run)
    runs.compare(run)


def test_the_other_host_loses_power_for_good(runs, row, tmp_path):
    """One command goes on with the hosts that are left."""
    run = tmp_path / "run"
    started = runs.start(run, "train.timeout_minutes=3")  # the ranks' own limit; ssh gives up after one minute
    runs.reach(run, started)
    runs.hosts.lose_power("nodeB")
    row.seconds = says(started, "the connection to nodeB is lost")
    assert started.wait() != 0
    row.lost = lost_steps(run)
    refused = runs.start(run)
    assert refused.wait() == 2 and "nodeB: ssh cannot reach it" in refused.text()
    again = runs.finish(run, "--missing-hosts")
    assert "nodeB" in again.text() and "left out" in again.text() and "saved by 2 x ZeRO 1" in again.text()
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (run, runs.whole()))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_the_link_is_down_for_ten_seconds(runs, row, tmp_path):
    run = tmp_path / "run"
    started = runs.start(run)
    runs.reach(run, started)
    runs.hosts.link("nodeB", "down")
    time.sleep(10)
    runs.hosts.link("nodeB", "up")
    assert started.wait() == 0, started.text()[-3000:]
    row.lost = 0
    runs.compare(run)


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_command(runs, row, tmp_path, number):
    run = tmp_path / "run"
    row.note = number
    started = runs.start(run)
    runs.reach(run, started)
    began = time.monotonic()
    started.send_signal(getattr(signal, number))
    status = started.wait()
    row.seconds = time.monotonic() - began
    assert status in (0, 85), started.text()[-3000:]
    assert complete_steps(run)[-1] == last_step(run) < STEPS
    row.lost = lost_steps(run)
    runs.finish(run)
    runs.compare(run)


def test_the_command_is_killed(runs, row, tmp_path):
    """The ranks save, and nothing stays behind."""
    run = tmp_path / "run"
    started = runs.start(run)
    runs.reach(run, started)
    started.send_signal(signal.SIGKILL)
    row.seconds = wait_until(
        lambda: not any(runs.hosts.processes(name, "--local_rank") for name in ("nodeA", "nodeB")), "the end", 60.0
    )
    row.lost = lost_steps(run)
    assert row.lost == 0 and last_step(run) < STEPS
    runs.finish(run)
    runs.compare(run)


def test_a_slow_link(runs, row, tmp_path):
    """Under ZeRO 0 the transfer hides behind the backward pass; under ZeRO 1 it comes after it. 14 MB of gradients."""
    wide = [
        "train.steps=24", "train.checkpoint_every=100", "image_size=112", "student.embed_dim=192", "student.depth=6",
        "train.global_batch=16",
    ]  # fmt: skip
    seconds = {}
    for rate in ("", "500mbit"):
        if rate:
            runs.hosts.limit_link(rate)
        for stage in (0, 1):
            run = tmp_path / f"run_{rate}_{stage}"
            runs.finish(run, *wide, f"deepspeed=zero{stage}")
            seconds[rate, stage] = median(record["step_seconds"] for record in read_metrics(run / "metrics.jsonl")[4:])
    runs.hosts.limit_link("")
    hidden, shown = (seconds["500mbit", stage] - seconds["", stage] for stage in (0, 1))
    row.note = ", ".join(f"ZeRO {stage} {rate or 'free'} {s:.3f} s" for (rate, stage), s in seconds.items())
    print(row.note)
    assert hidden < 0.7 * shown


def test_the_run_folder_is_not_shared(runs, row, tmp_path):
    (tmp_path / "own").mkdir()
    hidden = runs.hosts.run("nodeB", "mount", "-t", "tmpfs", "none", str(tmp_path / "own"))
    assert hidden.wait(10) == 0
    began = time.monotonic()
    started = runs.start(tmp_path / "own" / "run")
    assert started.wait() == 2 and "is not one folder that all hosts share" in started.text(), started.text()
    row.seconds = time.monotonic() - began


def test_a_host_has_other_code(runs, row, tmp_path):
    changed = tmp_path / "cli.py"
    changed.write_text((ROOT / "dune_fast" / "cli.py").read_text() + "\n")
    hidden = runs.hosts.run("nodeB", "mount", "--bind", str(changed), str(ROOT / "dune_fast" / "cli.py"))
    assert hidden.wait(10) == 0
    try:
        began = time.monotonic()
        started = runs.start(tmp_path / "run")
        assert started.wait() == 2 and "the code of dune_fast on nodeB is not that of nodeA" in started.text()
        row.seconds = time.monotonic() - began
    finally:
        assert runs.hosts.run("nodeB", "umount", str(ROOT / "dune_fast" / "cli.py")).wait(10) == 0


def test_a_host_never_comes(runs, row, tmp_path):
    """Each rank started by hand: it says for whom it waits, and gives up."""
    began = time.monotonic()
    started = runs.hosts.run(
        "nodeA", sys.executable, TRAIN, *runs.overrides(tmp_path / "run"), "train.rendezvous_minutes=0.3", RANK="0",
        WORLD_SIZE="2", LOCAL_RANK="0", CROSS_RANK="0", CROSS_SIZE="2", MASTER_ADDR="nodeA", MASTER_PORT="29555",
    )  # fmt: skip
    says(started, "1 of 2 hosts here (nodeA), waiting for host 1")
    row.seconds = time.monotonic() - began
    assert started.wait() == 2 and "given up after 18 s (train.rendezvous_minutes)" in started.text()
    assert "Traceback" not in started.text()


def torchrun(runs, run, host: str, restarts: int, hosts: int = 2):
    module = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(hosts), "--nproc-per-node", "1"]
    options = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "nodeA:29400", "--rdzv-id", run.name]
    return runs.hosts.run(host, *module, *options, "--max-restarts", str(restarts), TRAIN, *runs.overrides(run))


def test_torchrun_starts_again_after_a_rank_was_killed(runs, row, tmp_path):
    """Regression: both attempts failed, and one side hung."""
    run = tmp_path / "run"
    both = [torchrun(runs, run, name, 2) for name in ("nodeA", "nodeB")]
    runs.reach(run, both[0])
    began = time.monotonic()
    for rank in runs.hosts.processes("nodeB", "dune_fast/train.py"):
        if "torch.distributed.run" not in " ".join(rank.cmdline()):
            rank.kill()
    row.seconds = says(both[0], "going on from step")
    row.lost = lost_steps(run)
    assert [one.wait() for one in both] == [0, 0], both[0].text()[-3000:] + both[1].text()[-3000:]
    row.note = f"all done after {time.monotonic() - began:.0f} s"
    runs.compare(run)
