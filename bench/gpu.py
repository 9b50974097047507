"""Tests and measures this project on a new GPU by one command: `python -m bench.gpu`, or `make gpu`.

Correctness first, then kernels at the targets' shapes, the training step, loss curves, and more while minutes are left.
Every job is a process of its own with a time limit; what fails or hangs does not stop the others. Results come as they
are measured, below `bench/results/<device>/`, with a page, README.md, that shows predicted beside measured and names
the targets that are missed. Runs add up: `--part N` runs one part and the page keeps what earlier runs have found.

The status is 0 if everything that ran succeeded, 1 if something failed, 2 without a GPU. Missed targets are no failure.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

from bench.gpu_jobs import Job, Outcome, jobs
from bench.gpu_page import page, read_predicted
from bench.gpu_targets import read_record
from bench.records import RESULTS, folder_name, versions, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
GRACE = 15.0
"""Seconds between the interrupt, at which pytest still sums up, and the kill."""
TAIL = 15
"""Last lines of a failed job's output that are kept."""
NO_GPU = (
    "bench.gpu measures on a CUDA GPU and found none; without one, `python -m pytest tests` checks the kernels in "
    "Triton's interpreter, and `python -m bench.kernels --aot sm_90` compiles them for an H100."
)


def run_job(job: Job, seconds: float, folder: Path, outcome: Outcome) -> None:
    """Runs a job in a process group of its own, of which nothing is left afterwards; notes how it ended.

    Args:
        job: which.
        seconds: its limit.
        folder: of the device: its name and place say where results go, its `logs` keep output.
        outcome: changed in place.
    """
    log = folder / "logs" / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    tests = job.arguments[0] == "pytest"
    more = ("-rfEs", "-o", "faulthandler_timeout=120") if tests else ("--output", str(folder.parent))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *job.arguments, *more], cwd=ROOT, env=environment | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        timer = threading.Timer(seconds, _end, [process])
        timer.start()
        outcome.status = "failed"
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                say(line.decode(errors="replace").rstrip("\n"))
            status = process.wait()
            if time.monotonic() - began >= seconds:
                outcome.reason = f"ended at its limit of {seconds / 60:.1f} minutes; what it had written is kept"
            elif status:
                outcome.reason = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            else:
                outcome.status = "done"
        except KeyboardInterrupt:
            outcome.reason = "interrupted"
            raise
        finally:
            timer.cancel()
            _end(process)
            process.stdout.close()
            outcome.seconds = round(time.monotonic() - began, 1)
            lines = tail(log, folder.parent)
            outcome.last = lines[-1] if lines else ""
            outcome.tail = [] if outcome.status == "done" else lines


def _end(process: subprocess.Popen) -> None:
    """Interrupts what still runs, then kills the whole group."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):  # nothing is left of its group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tail(log: Path, output: Path) -> list[str]:
    """The last lines of a log, without escape sequences and without where this machine keeps code and results."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", log.read_text(errors="replace"))
    python = (sysconfig.get_path(name) for name in ("purelib", "stdlib", "data"))
    for place in (*map(str, python), str(output), str(ROOT), str(Path.home())):
        if place != "/":
            text = text.replace(f"{place}/", "")
    return [line.rstrip()[:300] for line in text.splitlines() if line.strip()][-TAIL:]


def run_all(everything: Sequence[Job], chosen: Sequence[Job], device: dict, folder: Path, deadline: float) -> bool:
    """Runs what fits into the time until `deadline` (monotonic), in order; whether all of it succeeded."""
    good, without_time = True, []
    for i, job in enumerate(chosen, 1):
        left = deadline - time.monotonic()
        if job.minutes * 60 > left:
            without_time.append(job)
            continue
        limit = min(job.limit * 60, left)
        say(
            f"\n=== {i} of {len(chosen)}, part {job.part}: {job.about}; about {job.minutes:g} minutes, at most "
            f"{limit / 60:.1f}\n=== {job.command}"
        )
        outcome = Outcome(job.name, job.command, _now(), device["commit"])
        good &= keep(outcome, everything, device, folder)  # what is killed without a word has said that it runs
        try:
            run_job(job, limit, folder, outcome)
        finally:
            good &= keep(outcome, everything, device, folder) and outcome.status == "done"
            say(f"=== {job.name}: {outcome.status} {outcome.reason} ({outcome.seconds / 60:.1f} minutes)")
    if without_time:
        say("\nNot run, the minutes were used up; to run them later:")
        for job in without_time:
            say(f"  part {job.part}, {job.minutes:g} minutes: {job.command}")
    return good


def keep(outcome: Outcome, everything: Sequence[Job], device: dict, folder: Path) -> bool:
    """Puts an outcome into the folder and writes the page anew; whether that could be written."""
    record = read_record(folder)
    record["device"] = {**device, "date": _now()}
    record["jobs"][outcome.name] = asdict(outcome)
    write_json(folder / "gpu.json", record)
    try:
        write_text(folder / "README.md", page(folder, everything, read_predicted()))
    except Exception:  # a result that cannot be read must not cost the measurements that are still to come
        say(f"the page could not be written:\n{traceback.format_exc()}")
        return False
    return True


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def describe_device() -> dict | None:
    """Name, memory, versions and source of what is measured; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    from dune_fast.engine.provenance import driver_version, git_state

    found, git = torch.cuda.get_device_properties(0), git_state(ROOT)
    changed = git and [path for path in git["changed"] or () if not path.startswith("bench/results/")]
    return {
        "name": found.name,
        "memory": found.total_memory,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "driver": driver_version() or "unknown",
        "versions": versions(),
        "commit": git["commit"][:12] + (" + changes" if changed else "") if git else "",
    }


def in_own_process(function: Callable[[], dict | None]) -> dict | None:
    """A function's result; its process ends, and with it what it held of the device."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function).result()


def say(text: str) -> None:
    """Prints a line; a console that is gone must not end the measurements."""
    with suppress(OSError):
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


@contextmanager
def interruptible() -> Iterator[None]:
    """What ends this process from outside ends the running job, too, and leaves the page."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=25, help="for everything together (default: 25)")
    parser.add_argument("--part", type=int, action="append", default=[], metavar="N", help="this alone; repeatable")
    parser.add_argument("--list", action="store_true", help="show the parts and what they run")
    parser.add_argument("--output", type=Path, default=RESULTS, help="results go to a folder of the device in here")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.minutes * 60
    known = {job.part for job in jobs()}
    if unknown := sorted(set(args.part) - known):
        say(f"there is no part {', '.join(map(str, unknown))}; --list shows 1 to {max(known)}")
        return 2
    if args.list:
        say("part  estimate")
        for job in jobs():
            say(f"{job.part:4}  {job.minutes:3g} min  {job.about}\n                {job.command}")
        return 0
    if (device := in_own_process(describe_device)) is None:
        say(NO_GPU)
        return 2
    everything, folder = jobs(device["memory"]), args.output.resolve() / folder_name(device["name"])
    say(f"{device['name']}, {device['versions']}: results go to {folder}")
    try:
        with interruptible():
            chosen = [job for job in everything if not args.part or job.part in args.part]
            good = run_all(everything, chosen, device, folder, deadline)
    except KeyboardInterrupt:
        say(f"interrupted; what was measured so far: {folder / 'README.md'}")
        return 130
    say(f"\nthe page with everything measured here: {folder / 'README.md'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
