"""SLURM on the two hosts: a controller on nodeA, a node on each; its own keys, sockets and states in one folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.clusters.two_hosts import _PATH, ADDRESSES, PACKAGES, Command, TwoHosts, wait_until

CONFIG = """
ClusterName=two
SlurmctldHost=nodeA(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
ReturnToService=2
JobRequeue=1
KillWait=30
SlurmdTimeout=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=df1 NodeHostname=nodeA NodeAddr=10.77.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=df2 NodeHostname=nodeB NodeAddr=10.77.0.2 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=df1,df2 Default=YES MaxTime=INFINITE State=UP
"""
NODES = dict(zip(ADDRESSES, ("df1", "df2"), strict=True))


def why_not() -> str:
    """Why there can be no SLURM here; "" if there can."""
    lost = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=_PATH) is None]
    return f"{', '.join(lost)} not found: {PACKAGES}" if lost else ""


class Slurm:
    """The daemons, and commands of a user on nodeA."""

    def __init__(self, hosts: TwoHosts, folder: Path) -> None:
        self.hosts, self.folder, self.daemons = hosts, folder, {}

    def begin(self) -> None:
        """Starts the daemons, waits until both nodes are idle."""
        (self.folder / "state").mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        places = {"key-file": "key", "seed-file": "seed", "socket": "socket", "pid-file": "pid", "log-file": "log"}
        options = [f"--{option}={self.folder}/munge.{name}" for option, name in places.items()]
        self.daemons["munged"] = self.hosts.begin_command("nodeA", "munged", "--foreground", "--force", *options)
        wait_until((self.folder / "munge.socket").exists, "munged", 20.0)
        self.daemons["slurmctld"] = self._daemon("nodeA", "slurmctld", "-D", "-i")
        for host in NODES:
            self.start(host)
        self.wait_for_nodes()

    def start(self, host: str) -> None:
        """The daemon of a node."""
        self.daemons[host] = self._daemon(host, "slurmd", "-D", "-N", NODES[host])

    def bring_back(self) -> None:
        """Both hosts and their daemons run again, nobody has a job."""
        for state in ("RUNNING", "PENDING", "SUSPENDED"):
            self.call("scancel", f"--state={state}")
        for host in NODES:
            self.hosts.bring_back(host)
            if self.daemons[host].process.poll() is not None:
                self.start(host)
        self.wait_for_nodes()

    def end(self) -> None:
        """Ends the daemons."""
        for daemon in self.daemons.values():
            daemon.end()

    def _daemon(self, host: str, *command: str) -> Command:
        return self.hosts.begin_command(host, *command, "-f", str(self.folder / "slurm.conf"))

    def wait_for_nodes(self) -> None:
        """Until both nodes take jobs."""
        wait_until(lambda: self.call("sinfo", "-h", "-o", "%t").split() == ["idle"], self._logs(), 90.0, 0.5)

    def _logs(self) -> str:
        logs = [path.read_text(errors="replace")[-800:] for path in sorted(self.folder.glob("slurm*.log"))]
        return "idle nodes; the daemons say\n" + "\n".join(logs)

    def variables(self) -> dict[str, str]:
        """Under which SLURM's commands find it."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, **variables: str) -> Command:
        """Starts a command of a user on nodeA."""
        return self.hosts.run("nodeA", *command, **self.variables(), **variables)

    def call(self, *command: str) -> str:
        """What a short command says."""
        environment = os.environ | self.variables() | {"PATH": _PATH}
        done = subprocess.run(
            [*self.hosts.enter("nodeA"), *command], env=environment, text=True, capture_output=True, timeout=60
        )
        return done.stdout

    def submit(self, script: Path, *options: str) -> str:
        """The number of the job."""
        said = self.call("sbatch", f"--output={script}.out", *options, str(script))
        found = re.search(r"Submitted batch job (\d+)", said)
        assert found, said
        return found[1]

    def field(self, job: str, name: str) -> str:
        """A field of a job's record, e.g. JobState."""
        found = re.search(rf"\b{name}=(\S+)", self.call("scontrol", "show", "job", job))
        return found[1] if found else ""

    def wait(self, job: str, *states: str, seconds: float = 300.0) -> str:
        """Waits until a job is in one of some states."""
        wait_until(
            lambda: self.field(job, "JobState") in states, f"{states} of {self.call('scontrol', 'show', 'job', job)}",
            seconds, 0.5,
        )  # fmt: skip
        return self.field(job, "JobState")
