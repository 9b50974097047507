"""Which rank a process is, from the environments that launchers leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dune_fast.engine import launch
from dune_fast.engine.launch import LaunchError, Place, expand_hosts, local_processes, place, set_openmp, slurm_port

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "2", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_JOB_NODELIST": "gpu[03-04],big1",
}  # fmt: skip


def test_deepspeed_and_torchrun():
    """Inside a SLURM job too."""
    assert place(TORCHRUN) == place(SRUN | TORCHRUN) == Place(5, 8, 1, "node7", 29500)
    deepspeed = TORCHRUN | {"CROSS_RANK": "1", "CROSS_SIZE": "2"}
    assert place(deepspeed) == Place(5, 8, 1, "node7", 29500, node=1, nodes=("host 0", "host 1"))
    ours = deepspeed | {"DUNE_FAST_HOSTS": "a,b", "DUNE_FAST_JOB": "mine"}
    assert place(ours) == Place(5, 8, 1, "node7", 29500, job="mine", node=1, nodes=("a", "b"))
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "r", "GROUP_RANK": "1"}
    elastic = place(TORCHRUN | agent | {"GROUP_WORLD_SIZE": "2"})
    assert (elastic.serves, elastic.job, elastic.node, len(elastic.nodes)) == (False, "r", 1, 2)


def test_srun():
    here = place(SRUN | {"SLURM_NODEID": "1"})
    assert here == Place(
        9, 16, 1, "gpu03", slurm_port(SRUN), job="SLURM job 1234567.2", node=1, nodes=("gpu03", "gpu04", "big1")
    )
    assert place(SRUN | {"SLURM_RESTART_COUNT": "3"}).job == "SLURM job 1234567.2, requeue 3"
    chosen = place(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000", "SLURM_STEP_NODELIST": "gpu04"})
    assert (chosen.address, chosen.port) == ("10.0.0.1", 4000)


def test_jobs_and_steps_have_ports_of_their_own():
    """Regression: job 8's step 0 had the port of job 7's step 1, and its rank joined that run."""
    starts = [
        slurm_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(again)})
        for job in range(1234, 1734) for step in range(10) for again in range(4)
    ]  # fmt: skip
    assert len(set(starts)) == len(starts) and min(starts) >= 12000 and max(starts) < 32000


@pytest.mark.parametrize("extra", [{}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"}])
def test_a_plain_start_a_batch_script_and_a_shell_of_an_allocation_are_one_process(extra):
    environment = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", **extra}
    assert place(environment) == place({}) == Place(0, 1, 0)


def test_half_an_environment_is_explained():
    with pytest.raises(LaunchError, match="RANK=5 is set, but MASTER_ADDR, MASTER_PORT are not"):
        place({k: v for k, v in TORCHRUN.items() if not k.startswith("MASTER")})
    with pytest.raises(LaunchError, match="set MASTER_ADDR"):
        place({k: v for k, v in SRUN.items() if "NODELIST" not in k})


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("gpu1", "gpu1"), ("gpu1,gpu2", "gpu1 gpu2"), ("gpu[03-05,9],login1", "gpu03 gpu04 gpu05 gpu9 login1"),
        ("rack[1-2]node[08-09].cluster", "rack1node08.cluster rack1node09.cluster rack2node08.cluster "
         "rack2node09.cluster"), ("gpu[099-101]", "gpu099 gpu100 gpu101"), ("a-b-01,c", "a-b-01 c"), ("", ""),
    ],
)  # fmt: skip
def test_hosts_of_slurms_list(nodes, hosts):
    assert expand_hosts(nodes) == hosts.split()


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, 1),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, 4),
        (TORCHRUN | {"LOCAL_SIZE": "2"}, 2),  # DeepSpeed's launcher
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NODEID": "1"}, 8),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "6(x2),4", "SLURM_NODEID": "2"}, 4),
        (SRUN | TORCHRUN | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "LOCAL_WORLD_SIZE": "8"}, 8),
    ],
)
def test_processes_of_this_machine(environment, processes):
    assert local_processes(environment) == processes


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}, None),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "5"}, "3"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "32"}, "1"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_CPUS_PER_TASK": "16"}, "16"),  # a task that is bound
    ],
)
def test_ranks_of_a_machine_share_its_cores(monkeypatch, environment, threads):
    monkeypatch.setattr(launch, "_cores", lambda: 16)
    environment = dict(environment)
    set_openmp(environment)
    assert environment.get("OMP_NUM_THREADS") == threads and environment["OMP_WAIT_POLICY"] == "passive"


def test_what_the_user_has_set_stays():
    chosen = TORCHRUN | {"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "1000"}
    environment = dict(chosen)
    set_openmp(environment)
    assert environment == chosen


def test_openmp_is_told_before_torch_is_imported():
    """Regression: idle OpenMP threads spun, so that a step beside other work took several times its processor time."""
    look = (
        "import os, sys, dune_fast.cli, dune_fast.train; assert 'torch' not in sys.modules\n"
        "{call}\n"
        "assert os.environ['OMP_WAIT_POLICY'] == 'passive'; import torch; print(torch.get_num_threads())"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "RANK"))}
    environment |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    ranks = TORCHRUN | {"LOCAL_SIZE": "1000"}
    for call, more in (
        ("try: dune_fast.train.main(['--help'])\nexcept SystemExit: pass", ranks),
        ("try: dune_fast.cli.main(['--help'])\nexcept SystemExit: pass", {}),
    ):
        command = [sys.executable, "-c", look.format(call=call)]
        found = subprocess.run(command, env=environment | more, text=True, capture_output=True, timeout=120)
        assert found.returncode == 0, found.stderr
        if more:
            assert found.stdout.split()[-1] == "1"


@pytest.mark.parametrize(
    ("told", "ranks", "threads"), [({}, 1, None), ({}, 2, 8), ({"LOCAL_WORLD_SIZE": "2"}, 2, None), ({}, 32, 1)]
)
def test_ranks_that_share_processors_share_them_out(monkeypatch, told, ranks, threads):
    """Regression: two containers of a machine, in which each rank counted itself alone, took all cores twice."""
    monkeypatch.setattr(launch, "_cores", lambda: 16)
    environment = TORCHRUN | told
    set_openmp(environment)
    assert launch.shared_threads(environment, ranks) == threads
    assert launch.shared_threads(environment | {"OMP_NUM_THREADS": "5"}, ranks) is None


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/pod/box", {"pod/cpu.max": "250000 100000", "pod/box/cpu.max": "max 100000"}, 2.5),
        ("0::/", {"cpu.max": "50000 100000"}, 0.5),
        ("4:cpu,cpuacct:/box\n0::/", {"cpu,cpuacct/box/cpu.cfs_quota_us": "300000",
                                      "cpu,cpuacct/box/cpu.cfs_period_us": "100000"}, 3.0),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        ("3:memory:/box", {}, float("inf")),
    ],
)  # fmt: skip
def test_the_quota_of_a_container(tmp_path, groups, files, quota):
    for name, content in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert launch._quota(tmp_path) == quota


def test_one_process_in_a_container_has_the_threads_of_its_quota(monkeypatch):
    monkeypatch.setattr(launch, "_allowed", lambda: 64)
    monkeypatch.setattr(launch, "_quota", lambda: 2.5)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 32)
    environment: dict[str, str] = {}
    set_openmp(environment)
    assert environment["OMP_NUM_THREADS"] == "2"
