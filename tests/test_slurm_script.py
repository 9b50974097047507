"""The batch script of `dune-fast launch slurm`, run by bash with programs in the places of srun and scontrol."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from dune_fast import cli
from dune_fast.cluster.slurm import Job, script

SRUN = """\
printf '%s\\n' "$@" > srun.arguments
env > srun.environment
cp after.json run/state.json 2>/dev/null
exit $(cat srun.status)
"""
SCONTROL = """\
case "$1 $2" in
    "show hostnames") echo df1; echo df2;;
    "show node") echo "NodeName=$3 Arch=x86_64"; echo "   NodeAddr=10.77.0.1 NodeHostName=nodeA Version=22.05";;
    requeue*) echo "$2" > requeued; exit $(cat requeue.status);;
esac
"""
ARGUMENTS = ["experiment=demo", 'data.datasets={a: {root: "/x y"}}', "name=it's"]


@pytest.fixture
def batch(program, tmp_path, monkeypatch):
    """Runs the script in a folder of its own; what srun and scontrol are to do, and what became of it."""
    program("srun", SRUN)
    program("scontrol", SCONTROL)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)

    def call(before: dict | None, after: dict | None, status: int, requeue: int = 0, **variables: str):
        for name, state in (("run/state.json", before), ("after.json", after)):
            Path(name).write_text(json.dumps(state)) if state else Path(name).unlink(missing_ok=True)
        Path("srun.status").write_text(str(status))
        Path("requeue.status").write_text(str(requeue))
        Path("requeued").unlink(missing_ok=True)
        text = script(Job("a b", 2, 8, 8, "1:00:00"), ARGUMENTS, "run", {"DUNE_FAST_CACHE": "/c d"})
        environment = {k: v for k, v in os.environ.items() if k != "MASTER_ADDR"}
        environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "df[1-2]"}
        done = subprocess.run(
            ["bash", "-s"], input=text, env=environment | variables, text=True, capture_output=True, timeout=60
        )
        return done, Path("requeued").exists()

    return call


def state(name: str, step: int) -> dict:
    return {"state": name, "step": step, "steps": 100, "why": ""}


def test_the_ranks_get_everything(batch):
    done, _ = batch(None, state("finished", 100), 0, SLURM_CPUS_PER_TASK="12")
    assert done.returncode == 0, done.stderr
    given = Path("srun.arguments").read_text().splitlines()
    assert given[:2] == ["--kill-on-bad-exit=1", "--wait=0"] and given[-3:] == ARGUMENTS
    environment = Path("srun.environment").read_text().splitlines()
    assert {"MASTER_ADDR=10.77.0.1", "SRUN_CPUS_PER_TASK=12", "DUNE_FAST_CACHE=/c d"} <= set(environment)


def test_an_address_of_the_users_stays(batch):
    batch(None, state("finished", 100), 0, MASTER_ADDR="ib0.df1")
    assert "MASTER_ADDR=ib0.df1" in Path("srun.environment").read_text().splitlines()


@pytest.mark.parametrize(
    ("before", "after", "status", "exit_status", "again"),
    [
        (None, state("finished", 100), 0, 0, False),
        (None, state("stopped", 40), 0, 0, True),
        (state("stopped", 40), state("stopped", 40), 0, 0, True),  # asked before its first step
        (state("stopped", 40), state("running", 60), 137, 0, True),  # killed, on its way
        (state("running", 60), state("running", 60), 137, 137, False),  # killed again, at the same step
        (state("stopped", 40), state("failed", 60), 1, 0, True),  # another rank was lost, say
        (state("failed", 60), state("failed", 60), 1, 1, False),
        (None, state("failed", 0), 2, 2, False),
        (None, None, 2, 2, False),  # it never began
        (state("stopped", 40), None, 2, 2, False),  # nor did this start, so the state is the old one
    ],
)
def test_it_is_queued_again_as_long_as_it_gets_on(batch, before, after, status, exit_status, again):
    done, requeued = batch(before, after, status)
    assert (done.returncode, requeued) == (exit_status, again), done.stderr


def test_a_cluster_that_queues_nothing_again_is_said(batch):
    done, _ = batch(None, state("stopped", 40), 0, requeue=1)
    assert done.returncode == 85 and "not queued again; `sbatch` with this script goes on" in done.stderr


def test_the_command_prints_a_script(capsys, monkeypatch):
    monkeypatch.setenv("DUNE_FAST_CACHE", "/c")
    options = ["--nodes", "2", "--gpus-per-node", "4", "--cpus-per-task", "12", "--sbatch=--account=mine"]
    options += ["--time", "24:00:00", "--partition", "gpu"]
    assert cli.main(["launch", "slurm", *options, "experiment=demo", "train.steps=10"]) == 0
    text = capsys.readouterr().out
    wanted = (
        "job-name=demo", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=12", "partition=gpu",
        "time=24:00:00", "signal=USR1@300", "open-mode=append", "requeue", "account=mine",
    )  # fmt: skip
    assert text.startswith("#!/bin/bash\n") and all(f"#SBATCH --{option}\n" in text for option in wanted)
    assert "train.py experiment=demo train.steps=10\n" in text and "export DUNE_FAST_CACHE=/c\n" in text
    assert " runs/demo/state.json " in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "0", "experiment=demo"], "--nodes is 0"),
        (["experiment=dmeo"], "did you mean demo"),
        (["--nodes", "3", "--gpus-per-node", "7", "experiment=demo"], "of the 21 processes; choose for example 21"),
        (["experiment=demo", "train.overwrite=true"], "would start anew whenever"),
        (["--submit", "experiment=demo"], "there is no program sbatch here"),
    ],
)
def test_mistakes_are_sentences(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["launch", "slurm", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 2)])
def test_a_script_is_submitted(status, expected, program, tmp_path, capsys):
    said = "echo Submitted batch job 7\necho no partition >&2"
    program("sbatch", f"cat > {tmp_path}/job\n{said}\nexit {status}\n")
    assert cli.main(["launch", "slurm", "--submit", "experiment=demo"]) == expected
    said = capsys.readouterr()
    assert "Submitted batch job 7" in said.out if status == 0 else "refuses the script: no partition" in said.err
    assert (tmp_path / "job").read_text().startswith("#!/bin/bash\n")
