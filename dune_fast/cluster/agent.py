"""What `dune-fast distill --hostfile` starts on every host by ssh: it answers questions, then runs the host's ranks.

It reads a JSON object a line from its input, {"do": NAME, ...}, and answers each by a line MARK + JSON. After "run"
the lines are names of signals, which it hands to the ranks. Where the input ends, the command or the connection is
gone: the ranks are asked to save and stop, and are killed later.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

MARK = "dune-fast-host "
"""Begins an answer: a host's shell may write other lines."""
ABANDONED = 300.0
"""Seconds that ranks have to save and end once nobody listens to them."""
OWN = ("HOME", "USER", "LOGNAME", "SHELL", "PWD", "OLDPWD", "HOSTNAME", "TERM", "DISPLAY", "MAIL", "TMPDIR", "_")
OWN_PREFIXES = ("SSH_", "XDG_", "SLURM", "TMUX", "DBUS_")
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
"""Variables that are a host's own, or a launch's, and are not forwarded; all others are, as srun does."""


def forwarded(environment: dict[str, str]) -> dict[str, str]:
    """The variables that ranks of other hosts get too."""
    left = {*OWN, *LAUNCH}
    return {k: v for k, v in environment.items() if k not in left and not k.startswith(OWN_PREFIXES)}


def look() -> dict[str, Any]:
    """What must be the same on all hosts ("same"), and what is this host's own."""
    import torch

    from dune_fast.engine.overrides import own_folders
    from dune_fast.engine.provenance import files_hash, packages

    same = packages()
    same["the code of dune_fast"] = files_hash([Path(__file__).parents[1]], (".py", ".yaml"))
    same["the configurations"] = files_hash(own_folders(), (".yaml",))
    entries = itertools.chain(*psutil.net_if_addrs().values())
    found = (e.address.partition("%")[0] for e in entries if e.family in (socket.AF_INET, socket.AF_INET6))
    addresses = [address for address in found if not address.startswith(("127.", "::1", "fe80"))]
    return {"same": same, "gpus": torch.cuda.device_count(), "addresses": addresses}


def mark(folder: str, name: str) -> str:
    """Leaves a file in the run's folder; what is wrong, or ""."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, name).touch()
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    return ""


def see(folder: str, names: list[str], seconds: float) -> list[str]:
    """Which files of a folder are not to be seen; a network's file system shows new ones a little later."""
    end = time.monotonic() + seconds
    while lost := [name for name in names if not Path(folder, name).exists()]:
        if time.monotonic() > end:
            break
        with contextlib.suppress(OSError):
            os.listdir(folder)  # makes NFS look again
        time.sleep(0.2)
    return lost


def reach(addresses: list[str], port: int, seconds: float) -> tuple[list[str], str]:
    """The addresses at which somebody listens on the port, and why the last of the others does not answer."""
    reached, reason = [], ""
    for address in addresses:
        try:
            socket.create_connection((address, port), timeout=seconds).close()
            reached.append(address)
        except OSError as error:
            reason = f"{address}: {error.strerror or error}"
    return reached, reason


def listen(port: int) -> socket.socket:
    """Listens on a port of all interfaces, 0 for a free one; connections wait in its queue."""
    return socket.create_server(("", port), backlog=1024)


def interface(address: str, port: int) -> str:
    """The network interface that leads to an address, "" if this host's own name leads to it anyway, or none does."""
    with contextlib.suppress(OSError):
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return ""
    with contextlib.suppress(OSError):
        family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing
            own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(entry.address.partition("%")[0] == own for entry in addresses) and not own.startswith("127."):
                return name
    return ""


class Agent:
    """One host's side of the conversation."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def answer(self, request: dict[str, Any]) -> Any:
        """What one request asks for."""
        match request["do"]:
            case "look":
                return look()
            case "listen":
                self._listener = listen(request["port"])
                return self._listener.getsockname()[1]
            case "reach":
                return reach(request["addresses"], request["port"], request["seconds"])
            case "mark":
                return mark(request["folder"], request["name"])
            case "see":
                return see(request["folder"], request["names"], request["seconds"])
            case "unmark":
                for name in request["names"]:
                    Path(request["folder"], name).unlink(missing_ok=True)
        return None

    def run(self, request: dict[str, Any]) -> int:
        """Runs this host's ranks; the exit status."""
        import torch

        from dune_fast.cluster.ranks import run_launcher

        if self._listener is not None:
            self._listener.close()
        environment = {**os.environ, **request["environment"]}
        if not torch.cuda.is_available():
            environment.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn that it found no other
        if "GLOO_SOCKET_IFNAME" not in environment and (name := interface(*request["meet"])):
            environment["GLOO_SOCKET_IFNAME"] = name  # gloo would give the others an address that leads to themselves
        threading.Thread(target=_obey, daemon=True).start()
        return run_launcher(request["command"], environment, sys.stdout.buffer)


def _obey() -> None:
    """Hands signals to the ranks: by name, and at the end of the input."""
    for line in sys.stdin:
        number = signal.Signals[line.strip()]
        if number == signal.SIGKILL:
            _kill_ranks()
        else:
            os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ABANDONED)
    _kill_ranks()


def _kill_ranks() -> None:
    """Ends everything that this process has started."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def main() -> int:
    """Entry point; returns the exit status."""
    agent = Agent()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if request["do"] == "run":
            return agent.run(request)
        try:
            answer = {"answer": agent.answer(request)}
        except (OSError, ValueError) as error:
            answer = {"error": str(error)}
        sys.stdout.write(MARK + json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status % 256)  # threads may wait for the input
