"""Which rank this process is and which cores are its own, started by our command, DeepSpeed, torchrun, srun or itself.

    dune-fast distill [--hostfile H] ...                 RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    deepspeed [--hostfile H] dune_fast/train.py ...      the same
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
import uuid
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import psutil

JOB, HOSTS = "DUNE_FAST_JOB", "DUNE_FAST_HOSTS"
"""Set for the ranks by `dune-fast distill`: what tells this start from others; its hosts, by commas."""
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class LaunchError(ValueError):
    """The environment describes no complete launch; the message says what is missing."""


@dataclass(frozen=True)
class Place:
    """This process among all of a run, and where the processes meet (see `engine.rendezvous`)."""

    rank: int
    world_size: int
    local_rank: int
    """Among the processes of this machine."""
    address: str = "127.0.0.1"
    """Of rank 0's host, or the host's name."""
    port: int = 0
    """Of the store there; 0 for a process that has nobody to meet."""
    serves: bool = True
    """Whether rank 0 serves the store; torchrun's agent does so itself."""
    job: str = ""
    """What tells this start from others, in words; "" where the launcher does not say."""
    node: int = 0
    """Index of this machine."""
    nodes: tuple[str, ...] = ("host 0",)
    """Names of all machines, by index."""


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


def new_job() -> dict[str, str]:
    """The variable that tells a start from all others."""
    return {JOB: f"launch {uuid.uuid4().hex[:8]}"}


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def expand_hosts(nodes: str) -> list[str]:
    """The machines of SLURM's list: "gpu[03-05,9],login1" -> gpu03, gpu04, gpu05, gpu9, login1."""
    hosts = []
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        before, bracket, rest = entry.partition("[")
        inside, _, after = rest.partition("]")
        if not bracket:
            hosts.append(entry)
            continue
        tails = expand_hosts(after) or [""]
        for part in inside.split(","):
            first, _, last = part.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            hosts += [f"{before}{number:0{len(first)}}{tail}" for number in numbers for tail in tails]
    return hosts


def slurm_port(environment: Mapping[str, str]) -> int:
    """Where the ranks of a SLURM step meet: the same on every rank.

    Another one for each of 500 jobs in a row, for each of ten of their steps, and for each of four requeues in a row.
    Below 32768, where Linux begins to give ports to outgoing connections.
    """
    job, step, again = (int(environment.get(f"SLURM_{name}", "0")) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return 12000 + job % 500 * 40 + step % 10 * 4 + again % 4


def _hosts(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Names of a launch's machines: as `dune-fast distill --hostfile` gives them, or by number."""
    if names := environment.get(HOSTS, ""):
        return tuple(names.split(","))
    count = int(environment.get("CROSS_SIZE") or environment.get("GROUP_WORLD_SIZE") or 1)
    return tuple(f"host {index}" for index in range(count))


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
        return Place(
            *(int(environment[name]) for name in _ENVIRONMENT[:3]),
            environment["MASTER_ADDR"], int(environment["MASTER_PORT"]),
            serves=environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            job=environment.get(JOB) or environment.get("TORCHELASTIC_RUN_ID", ""),
            node=int(environment.get("CROSS_RANK") or environment.get("GROUP_RANK") or 0), nodes=_hosts(environment),
        )  # fmt: skip
    # srun sets it for its own step alone: a batch script, or a shell inside an allocation, is one process
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        nodes = expand_hosts(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))
        host = environment.get("MASTER_ADDR") or (nodes[0] if nodes else "")
        if not host:
            raise LaunchError("srun has started several tasks, but SLURM_JOB_NODELIST is empty: set MASTER_ADDR")
        job, step, again = (environment.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
        return Place(
            int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"]),
            int(environment["SLURM_LOCALID"]), host, int(environment.get("MASTER_PORT") or slurm_port(environment)),
            job=f"SLURM job {job}.{step}" + f", requeue {again}" * (again != "0"),
            node=int(environment.get("SLURM_NODEID", "0")), nodes=tuple(nodes) or ("host 0",),
        )  # fmt: skip
    return Place(0, 1, 0)
