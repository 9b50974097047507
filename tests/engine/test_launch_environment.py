"""Which rank a process is, from the environments that launchers leave."""

from __future__ import annotations

import pytest

from dune_fast.engine.launch import LaunchError, Place, first_host, place

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "2", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_JOB_NODELIST": "gpu[03-04],big1",
}  # fmt: skip


def test_deepspeed_and_torchrun():
    assert place(TORCHRUN) == Place(5, 8, 1, "env://")


def test_torchrun_inside_a_slurm_job():
    assert place(SRUN | TORCHRUN) == Place(5, 8, 1, "env://")


def test_srun():
    assert place(SRUN) == Place(9, 16, 1, f"tcp://gpu03:{20000 + 1234569 % 20000}")


def test_srun_with_a_chosen_address():
    chosen = SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000", "SLURM_STEP_NODELIST": "gpu04"}
    assert place(chosen).init_method == "tcp://10.0.0.1:4000"


@pytest.mark.parametrize("extra", [{}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"}])
def test_a_batch_script_or_shell_of_an_allocation_is_one_process(extra):
    environment = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", **extra}
    assert (place(environment).rank, place(environment).world_size) == (0, 1)


def test_no_launcher():
    alone = place({})
    assert (alone.rank, alone.world_size, alone.local_rank) == (0, 1, 0)
    assert alone.init_method.startswith("tcp://127.0.0.1:")


def test_half_an_environment_is_explained():
    with pytest.raises(LaunchError, match="RANK=5 is set, but MASTER_ADDR, MASTER_PORT are not"):
        place({k: v for k, v in TORCHRUN.items() if not k.startswith("MASTER")})
    with pytest.raises(LaunchError, match="set MASTER_ADDR"):
        place({k: v for k, v in SRUN.items() if "NODELIST" not in k})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"), ("gpu1,gpu2", "gpu1"), ("gpu[03-05,9],login1", "gpu03"), ("gpu[7,9-11]", "gpu7"),
        ("rack[1-2]node[08-09].cluster", "rack1node08.cluster"), ("a-b-01,c", "a-b-01"), ("", ""),
    ],
)  # fmt: skip
def test_first_host_of_slurms_list(nodes, first):
    assert first_host(nodes) == first
