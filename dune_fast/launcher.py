"""Starts the ranks of a run on this machine, through DeepSpeed's launcher, and waits until they have ended."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import psutil

logger = logging.getLogger(__name__)

TRAIN_SCRIPT = Path(__file__).with_name("train.py")

_BY_SIGNAL = {
    "SIGKILL": ": often the system's, for want of memory (`dmesg` says so); `dune-fast plan` estimates the need",
    "SIGSEGV": ", in compiled code: `dune-fast doctor` looks for packages that do not fit each other",
}


def launch_training(args: argparse.Namespace, run: Path | None) -> int:
    """Starts the ranks of a new run or, with `run`, of one that goes on; the exit status.

    0 for a run that has finished, `run_state.STOPPED_STATUS` for one that was stopped by a signal and saved.
    """
    import torch

    from dune_fast.engine.launch import free_port
    from dune_fast.engine.run_state import command_status
    from dune_fast.train import run_config

    if args.processes < 0:
        raise ValueError(f"--processes is {args.processes}; give how many to start, at least 1")
    cfg = run_config(run, args.overrides)  # a wrong configuration is said once, before anything is launched
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner",
        "--log_level", "info" if args.debug else "critical",  # the ranks say what is wrong
        "--num_accelerators", str(args.processes or max(1, torch.cuda.device_count())),
        "--master_port", str(args.port or free_port()),
        str(TRAIN_SCRIPT), *(["--debug"] if args.debug else []), *(["--run", str(run)] if run else []),
        *args.overrides,  # --config-dir reaches the ranks as a variable
    ]  # fmt: skip
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # the launcher would warn that it found no other
    return command_status(Path(cfg.output_dir), lambda: run_launcher(command, environment))


def run_launcher(command: list[str], environment: dict[str, str]) -> int:
    """Runs DeepSpeed's launcher to its end, so that the ranks save and end before this process does.

    Ctrl-C reaches all processes of the terminal: everybody ignores it but the launcher's second process, which sends
    SIGTERM to the ranks. SIGTERM and SIGUSR1 may reach this process alone (`kill`, a container's end), which passes
    them on to the ranks.
    """

    def pass_on(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(launcher.pid)
            ranks = [rank for second in first.children() for rank in second.children()]
            for process in ranks or [*first.children(), first]:
                process.send_signal(number)

    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}  # the launcher inherits it
    try:
        with subprocess.Popen(command, env=environment) as launcher:
            before |= {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
            status = launcher.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if name := ended_by(status):
        logger.error("a process of the run was ended by %s%s", name, _BY_SIGNAL.get(name, ""))
    return status


def ended_by(status: int) -> str | None:
    """The signal that ended a rank, from the launcher's exit status; None for a program's own status."""
    number = 256 - status if status > 192 else -status  # the launcher passes on -number, of which a byte is left
    return signal.Signals(number).name if number in set(signal.Signals) else None
