"""An ssh connection to one host of a hostfile, and the agent at its other end."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any

from dune_fast.cluster.agent import MARK

SSH = [
    "ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15",
    "-o", "ServerAliveCountMax=4", "-o", "LogLevel=ERROR",
]  # fmt: skip
"""A host that loses its power sends no farewell: ssh asks every 15 seconds, and gives up after a minute."""
ANSWER = 120.0
"""Seconds that a host has for an answer; it may have to read torch from a slow disk first."""


class HostError(ValueError):
    """A host cannot take part; the message says which and why."""


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    """As ssh knows it, perhaps USER@NAME."""
    slots: int
    """Ranks there, one a GPU."""


class Session:
    """The connection to one host and to the agent there."""

    def __init__(self, host: Host) -> None:
        self.host, self.running = host, False
        path = [f"PYTHONPATH={value}"] if (value := os.environ.get("PYTHONPATH")) else []
        agent = shlex.join(["env", *path, sys.executable, "-u", "-m", "dune_fast.cluster.agent"])
        remote = f"cd {shlex.quote(os.getcwd())} && exec {agent}"
        # a session of its own: Ctrl-C is for this process, which lets the ranks save
        self.process = subprocess.Popen(
            [*SSH, host.name, remote], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Sorts answers from other lines, which are shown once the ranks run."""
        for raw in self.process.stdout:
            line = raw.decode(errors="replace")
            if line.startswith(MARK):
                self._answers.put(json.loads(line.removeprefix(MARK)))
            elif self.running:
                sys.stderr.write(f"{self.host.name}: {line}")
                sys.stderr.flush()
            else:
                self._said.append(line.strip())
        self._answers.put(None)

    def send(self, line: str) -> None:
        """A line to the agent; one that is gone is noticed elsewhere."""
        with contextlib.suppress(OSError):
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def ask(self, do: str, **details: Any) -> Any:
        """The agent's answer to a request; HostError if there is none, or it is an error."""
        self.send(json.dumps({"do": do, **details}))
        try:
            answer = self._answers.get(timeout=ANSWER)
        except queue.Empty:
            raise HostError(f"{self.host.name} has not answered within {ANSWER:.0f} s") from None
        if answer is None:
            raise HostError(f"{self.host.name}: {self._reason()}")
        if "error" in answer:
            raise HostError(f"{self.host.name}: {answer['error']}")
        return answer["answer"]

    def _reason(self) -> str:
        """Why the agent is not there."""
        status, said = self.process.wait(), " / ".join(line for line in self._said[-3:] if line) or "it said nothing"
        if status == 255:
            return f"ssh cannot reach it without a password ({said}); `ssh {self.host.name} true` tries it"
        return (
            f"dune_fast does not start there ({said}): {os.getcwd()}, {sys.executable} and its packages must be there "
            "under the same paths"
        )

    def run(self, request: dict[str, Any]) -> None:
        """Starts the host's ranks."""
        self.running = True
        self.send(json.dumps({"do": "run", **request}))

    def end(self) -> None:
        """Closes the connection; the agent then ends."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(5.0)
        self.process.stdout.close()
