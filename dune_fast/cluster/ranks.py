"""The ranks of one machine: the command that starts them, signals that reach them, how they ended."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

logger = logging.getLogger(__name__)

TRAIN_SCRIPT = Path(__file__).parents[1] / "train.py"

_BY_SIGNAL = {
    "SIGKILL": ": often the system's, for want of memory (`dmesg` says so); `dune-fast plan` estimates the need",
    "SIGSEGV": ", in compiled code: `dune-fast doctor` looks for packages that do not fit each other",
}


def visible_devices(environment: Mapping[str, str], count: int) -> list[str]:
    """Names of the first `count` devices: those of CUDA_VISIBLE_DEVICES if it has as many, else "0", "1", ..."""
    chosen = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return chosen[:count] if len(chosen) >= count else [str(index) for index in range(count)]


def host_command(
    world: Mapping[str, Sequence[str]], node: int, address: str, port: int, arguments: Sequence[str], debug: bool
) -> list[str]:
    """What starts the ranks of one machine: DeepSpeed's launcher for a host.

    Args:
        world: host -> its devices, a rank each, in the order of ranks.
        node: index of the machine.
        address: of rank 0's host.
        arguments: of `train.py`; --config-dir reaches the ranks as a variable.
        debug: whether the launcher speaks; otherwise the ranks alone say what is wrong.
    """
    encoded = base64.urlsafe_b64encode(json.dumps({name: list(slots) for name, slots in world.items()}).encode())
    return [
        sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={encoded.decode()}",
        f"--node_rank={node}", f"--master_addr={address}", f"--master_port={port}",
        "--log_level", "info" if debug else "critical", str(TRAIN_SCRIPT), *arguments,
    ]  # fmt: skip


@contextlib.contextmanager
def caught_signals(pass_on: Callable[[int], None]) -> Iterator[None]:
    """Within it, signals that end a command are handed on to the ranks, which save and end before it does.

    SIGTERM and SIGUSR1 are handed on as they are. Ctrl-C and the end of the terminal, unless they were ignored before
    (nohup), ask for the same by SIGTERM; a second Ctrl-C hands on SIGKILL.
    """
    pressed = []

    def handle(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            pressed.append(number)
            logger.warning("the run saves and stops" if len(pressed) < 2 else "the run is ended at once")
        asked = signal.SIGTERM if number in (signal.SIGINT, signal.SIGHUP) else number
        pass_on(signal.SIGKILL if len(pressed) > 1 else asked)

    numbers = [signal.SIGTERM, signal.SIGUSR1]
    numbers += [n for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_launcher(command: list[str], environment: dict[str, str], output: IO[bytes] | None = None) -> int:
    """Runs a launcher of this machine's ranks to its end; the exit status.

    The launcher has a session of its own: Ctrl-C in the terminal reaches this process alone, which passes signals on
    to the ranks. DeepSpeed's launcher, if it got them, would kill the ranks half a minute later.

    Args:
        command: `host_command`'s.
        output: takes what the ranks write, by a thread, for as long as it can; None for this process's own streams.
    """

    def pass_on(number: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(launcher.pid)
            for process in first.children() or [first]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if output else {}
    launcher = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
    with launcher, caught_signals(pass_on):
        if output:
            pump = threading.Thread(target=_pump, args=(launcher.stdout, output), daemon=True)
            pump.start()
        status = launcher.wait()
        if output:
            pump.join(5.0)  # a process that outlives the ranks may hold the pipe
    if name := ended_by(status):
        logger.error("a process of the run was ended by %s%s", name, _BY_SIGNAL.get(name, ""))
    return status


def _pump(source: IO[bytes], output: IO[bytes]) -> None:
    """Copies lines until the end; ranks must not notice that nobody listens any more."""
    for line in source:
        with contextlib.suppress(OSError, ValueError):
            output.write(line)
            output.flush()


def ended_by(status: int) -> str | None:
    """The signal that ended a rank, from the launcher's exit status; None for a program's own status."""
    number = 256 - status if status > 192 else -status  # the launcher passes on -number, of which a byte is left
    return signal.Signals(number).name if number in set(signal.Signals) else None
