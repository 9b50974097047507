"""Which rank this process is: started by DeepSpeed's launcher or torchrun, by srun, or by itself.

    deepspeed [--hostfile H] dune_fast/train.py ...      RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    torchrun --nproc-per-node 8 dune_fast/train.py ...   the same
    srun --ntasks-per-node 8 python dune_fast/train.py   SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, ...
    python dune_fast/train.py ...                        one process
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class LaunchError(ValueError):
    """The environment describes no complete launch; the message says what is missing."""


@dataclass(frozen=True)
class Place:
    """This process among all of a run."""

    rank: int
    world_size: int
    local_rank: int
    """Among the processes of this machine."""
    init_method: str
    """Where the processes meet, for `torch.distributed.init_process_group`."""


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def first_host(nodes: str) -> str:
    """The first machine of SLURM's list: "gpu[03-05,9],login1" -> "gpu03"."""
    entry = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", entry[0]) if entry else ""


def place(environment: Mapping[str, str]) -> Place:
    """Reads the environment that a launcher has left.

    Raises:
        LaunchError: only a part of it is there.
    """
    if "RANK" in environment:
        if missing := [name for name in _ENVIRONMENT if name not in environment]:
            raise LaunchError(
                f"RANK={environment['RANK']} is set, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
                "not: start through deepspeed, torchrun or srun, or unset RANK to run one process"
            )
        rank, world_size, local_rank = (int(environment[name]) for name in _ENVIRONMENT[:3])
        return Place(rank, world_size, local_rank, "env://")
    # srun sets it for its own step alone: a batch script, or a shell inside an allocation, is one process
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        host = environment.get("MASTER_ADDR") or first_host(nodes)
        if not host:
            raise LaunchError("srun has started several tasks, but SLURM_JOB_NODELIST is empty: set MASTER_ADDR")
        # the same on every rank, and another for another job on the same machine
        job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
        port = environment.get("MASTER_PORT") or 20000 + job % 20000
        return Place(
            int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"]),
            int(environment["SLURM_LOCALID"]), f"tcp://{host}:{port}",
        )  # fmt: skip
    return Place(0, 1, 0, f"tcp://127.0.0.1:{free_port()}")
