"""Which rank this process is and which cores are its own, started by DeepSpeed's launcher, torchrun, srun or itself.

    deepspeed [--hostfile H] dune_fast/train.py ...      RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    torchrun --nproc-per-node 8 dune_fast/train.py ...   the same
    srun --ntasks-per-node 8 python dune_fast/train.py   SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, ...
    python dune_fast/train.py ...                        one process
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import psutil

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


def set_openmp(environment: MutableMapping[str, str]) -> None:
    """Sets how torch's OpenMP threads wait, and how many they are, where the environment does not say so already.

    To be called before torch is imported, which reads them. Threads that wait for work sleep: by default they spin,
    and take the processor from other ranks, from DALI's threads and from whatever else runs. The ranks of a machine
    share its cores, and a container has as many as its quota.
    """
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        environment["OMP_WAIT_POLICY"] = "passive"
    if "OMP_NUM_THREADS" not in environment and (threads := _told_threads(environment)):
        environment["OMP_NUM_THREADS"] = str(threads)


def _told_threads(environment: Mapping[str, str]) -> int | None:
    """A rank's threads by what the launcher tells; None for all cores, which is the library's own choice."""
    processes = local_processes(environment)
    if processes == 1:
        return _cores() if _quota() < _allowed() else None
    # a rank of srun is bound to its own processors, if it has been given several
    return max(1, _cores() // (1 if "SLURM_CPUS_PER_TASK" in environment else processes))


def processors() -> str:
    """Names this machine and the processors that this process may use; ranks that give the same name share them."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine
    machine = boot.read_text().strip() if boot.is_file() else socket.gethostname()
    return f"{machine} {sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else ''}"


def shared_threads(environment: Mapping[str, str], ranks: int) -> int | None:
    """A rank's threads among `ranks` that share its processors, counted once they have met; None to leave them alone.

    Launchers count the ranks of what they take for a host: containers, say, of which a machine has several.
    """
    told = _told_threads(environment)
    if environment.get("OMP_NUM_THREADS", str(told)) != str(told):
        return None  # the user's own number
    counted = max(1, _cores() // ranks)
    return counted if ranks > 1 and counted < (told or _cores()) else None


def local_processes(environment: Mapping[str, str]) -> int:
    """How many processes of this run a launcher has started on this machine: torchrun, DeepSpeed's, or srun."""
    if "RANK" in environment:
        return int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 1)
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # "8(x2),4": tasks of each node, in its order
        counts: list[int] = []
        for entry in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
            tasks, _, times = entry.partition("(x")
            counts += [int(tasks)] * int(times.rstrip(")") or 1)
        return counts[min(int(environment.get("SLURM_NODEID", "0")), len(counts) - 1)]
    return 1


def _cores() -> int:
    """Physical cores that this process may use."""
    allowed = _allowed()
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed, int(min(_quota(), allowed))))


def _allowed() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota(system: Path = Path("/")) -> float:
    """Processors whose time this process's control group may use, as a container's limit is set; inf for no limit."""
    quota, mounts = math.inf, system / "sys/fs/cgroup"
    try:
        groups = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return quota
    for _, controllers, path in (group.split(":", 2) for group in groups):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = mounts / controllers
        for folder in (place := top / path.strip("/"), *place.parents):
            if not folder.is_relative_to(top):
                break
            with contextlib.suppress(OSError, ValueError):
                if controllers:
                    limit, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    limit, period = (folder / "cpu.max").read_text().split()
                if limit.strip() not in ("max", "-1"):
                    quota = min(quota, float(limit) / float(period))
    return quota


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
