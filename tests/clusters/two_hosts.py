"""Two hosts on this machine: namespaces of their own for network, processes, name and mounts, an sshd in each.

Nothing of it has a name outside: it is gone with the process that made it, even if that is killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = {"nodeA": "10.77.0.1", "nodeB": "10.77.0.2"}
NAMESPACES = ["unshare", "--uts", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child"]
DIES = ["setpriv", "--pdeathsig", "KILL"]
"""Before a command: it is killed when its parent ends."""
PACKAGES = "apt-get install openssh-server pdsh slurm-wlm munge"
SSHD_CONFIG = """
HostKey {folder}/host_key
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile none
"""


def why_not() -> str:
    """Why there can be no two hosts here; "" if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "two hosts on one machine need Linux and root"
    needed = ("sshd", "ssh", "ssh-keygen", "ip", "tc", "unshare", "nsenter", "setpriv")
    if lost := [name for name in needed if shutil.which(name, path=_PATH) is None]:
        return f"{', '.join(lost)} not found: {PACKAGES}"
    for command in (
        [*NAMESPACES, "true"], ["unshare", "--net", "ip", "link", "add", "vA", "type", "veth", "peer", "name", "vB"],
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            return f"`{' '.join(command)}` is not permitted here: {done.stderr.strip()}"
    return ""


_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120.0, pause: float = 0.05) -> float:
    """Waits for a condition; the seconds that it took. AssertionError where it takes too long."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"{what} did not come within {seconds:.0f} s"
        time.sleep(pause)
    return time.monotonic() - began


@dataclass
class Command:
    """Something that runs on a host."""

    process: subprocess.Popen
    log: Path

    def text(self) -> str:
        """What it has written."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 300.0) -> int:
        """Its exit status; it is killed, and the test fails, where that takes too long."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"it did not end within {seconds:.0f} s:\n{self.text()[-3000:]}") from None

    def send_signal(self, number: int) -> None:
        """To the command itself, the child of the program that entered the host."""
        psutil.Process(self.process.pid).children()[0].send_signal(number)

    def end(self) -> None:
        """SIGKILL for it and all that it has started here."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            self.process.kill()
        self.process.wait(30)


@dataclass
class TwoHosts:
    """Two hosts, a link between them, one file system."""

    folder: Path
    networks: dict[str, subprocess.Popen] = field(default_factory=dict)
    hosts: dict[str, subprocess.Popen] = field(default_factory=dict)
    commands: list[Command] = field(default_factory=list)
    begun: int = 0

    def begin(self) -> None:
        """Makes the network, starts both hosts."""
        self.folder.mkdir(parents=True)
        keys = self.folder / "dotssh"
        keys.mkdir(mode=0o700)
        for path in (self.folder / "host_key", keys / "id_ed25519"):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))
        shutil.copy(keys / "id_ed25519.pub", keys / "authorized_keys")
        (keys / "config").write_text("StrictHostKeyChecking accept-new\n")
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        for name in ADDRESSES:
            self.networks[name] = subprocess.Popen([*DIES, "unshare", "--net", "sleep", "infinity"])
        own = os.stat("/proc/self/ns/net").st_ino
        for process in self.networks.values():
            wait_until(lambda p=process: os.stat(f"/proc/{p.pid}/ns/net").st_ino != own, "a network", 10.0)
        _, second = self.networks.values()
        other = ["peer", "name", "veth0", "netns", str(second.pid)]
        self.inside("nodeA", "ip", "link", "add", "veth0", "type", "veth", *other)
        for name, address in ADDRESSES.items():
            self.inside(name, "ip", "link", "set", "lo", "up")
            self.inside(name, "ip", "address", "add", f"{address}/24", "dev", "veth0")
            self.inside(name, "ip", "link", "set", "veth0", "up")
        for name in ADDRESSES:
            self.start(name)

    def inside(self, name: str, *command: str) -> None:
        """Runs a command in a host's network."""
        _call("nsenter", "-t", str(self.networks[name].pid), "-n", *command)

    def start(self, name: str) -> None:
        """Starts a host that is down, and waits until it answers."""
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it
        folder, ssh = self.folder, Path.home() / ".ssh"
        script = (
            f"hostname {name}; mount --bind {folder}/dotssh {ssh}; mount --bind {folder}/hosts /etc/hosts; "
            f"exec $(command -v sshd || echo /usr/sbin/sshd) -D -e -f {folder}/sshd_config"
        )
        ssh.mkdir(mode=0o700, exist_ok=True)
        enter = ["nsenter", "-t", str(self.networks[name].pid), "-n"]
        with (folder / f"{name}.log").open("a") as log:
            self.hosts[name] = subprocess.Popen(
                [*DIES, *enter, *NAMESPACES, "bash", "-c", script], stdout=log, stderr=log,
                env=os.environ | {"PATH": _PATH},
            )  # fmt: skip
        wait_until(lambda: bool(psutil.Process(self.hosts[name].pid).children()), name, 20.0)
        ready = [*self.enter(name), "ssh", "-o", "ConnectTimeout=2", name, "true"]
        wait_until(lambda: subprocess.run(ready, capture_output=True).returncode == 0, f"sshd of {name}", 30.0)

    def enter(self, name: str) -> list[str]:
        """Before a command: it runs on the host."""
        init = psutil.Process(self.hosts[name].pid).children()[0].pid
        return ["nsenter", "-t", str(init), "-n", "-u", "-p", "-m", f"--wd={ROOT}", "--"]

    def run(self, name: str, *command: str, **variables: str) -> Command:
        """Starts a command on a host; it ends with the test."""
        self.commands.append(self.begin_command(name, *command, **variables))
        return self.commands[-1]

    def begin_command(self, name: str, *command: str, **variables: str) -> Command:
        """Starts a command on a host, which the caller ends."""
        self.begun += 1
        log = self.folder / f"command_{self.begun:03}.log"
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
            "OMP_NUM_THREADS": "1", "COLUMNS": "300", "PYTHONPATH": str(ROOT), "PATH": _PATH,
            "DUNE_FAST_CONFIGS": str(ROOT / "bench" / "toy"),
        }  # fmt: skip
        with log.open("w") as output:
            process = subprocess.Popen(
                [*DIES, *self.enter(name), *DIES, *command], stdout=output, stderr=subprocess.STDOUT,
                env=environment | variables, start_new_session=True,
            )  # fmt: skip
        return Command(process, log)

    def processes(self, name: str, words: str) -> list[psutil.Process]:
        """A host's processes whose command line holds some words."""
        init = psutil.Process(self.hosts[name].pid).children()
        namespace = os.readlink(f"/proc/{init[0].pid}/ns/pid") if init else ""
        found = []
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/pid") == namespace and words in " ".join(process.cmdline()):
                    found.append(process)
            except (OSError, psutil.Error):
                continue
        return found

    def kill(self, name: str) -> None:
        """All of a host's processes end at once; its network says so to the others."""
        self.hosts[name].kill()
        self.hosts[name].wait(30)

    def link(self, name: str, state: str) -> None:
        """Pulls a host's cable ("down"), or plugs it in ("up")."""
        self.inside(name, "ip", "link", "set", "veth0", state)

    def limit_link(self, rate: str) -> None:
        """Both directions carry `rate` at most, in tc's notation ("1gbit"); "" for no limit."""
        for name in ADDRESSES:
            if rate:
                limit = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
                self.inside(name, "tc", "qdisc", "replace", "dev", "veth0", "root", *limit)
            else:
                self.inside(name, "tc", "qdisc", "del", "dev", "veth0", "root")

    def lose_power(self, name: str) -> None:
        """The host is gone and sends no farewell."""
        self.link(name, "down")
        self.kill(name)

    def bring_back(self, name: str) -> None:
        """A host that was killed or lost its power is started again."""
        self.link(name, "up")
        if self.hosts[name].poll() is not None:
            self.start(name)

    def end(self) -> None:
        """Takes everything down."""
        for command in self.commands:
            command.end()
        for process in [*self.hosts.values(), *self.networks.values()]:
            process.send_signal(signal.SIGKILL)
            process.wait(30)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"PATH": _PATH})
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
