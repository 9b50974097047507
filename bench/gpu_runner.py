"""Runs one job of `python -m bench.gpu` in a process group of its own, with a time limit, and notes how it ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

from bench.gpu_jobs import Job, install_command

ROOT = Path(__file__).resolve().parents[1]
GRACE = 15.0
"""Seconds between the interrupt, at which pytest still writes its report, and the kill."""
TAIL = 15
"""Last lines of a failed job's output that are kept."""
HANGS = 120
"""Seconds after which a test that has not ended says where it is."""


@dataclass
class Tests:
    """What a pytest report counts."""

    __test__ = False  # not a test itself, whatever pytest thinks of its name

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    """Names; also of what could not be collected."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason -> how many."""


@dataclass
class Outcome:
    """How a job ended."""

    name: str
    command: str
    status: str
    """ "done", "failed", "skipped"; "running" while it runs, which stays if everything is cut off."""
    reason: str = ""
    seconds: float = 0.0
    date: str = ""
    commit: str = ""
    tail: list[str] = field(default_factory=list)
    tests: Tests | None = None

    @classmethod
    def from_json(cls, content: dict) -> Outcome:
        """The inverse of `dataclasses.asdict`."""
        tests = content.pop("tests")
        return cls(**content, tests=tests and Tests(**tests))


Note = Callable[[Outcome], None]
"""Is told when a job begins and when it has ended."""


def run_job(job: Job, seconds: float, folder: Path, commit: str, note: Note) -> Outcome:
    """Runs a job, or skips it where its packages are missing.

    Args:
        job: which.
        seconds: its limit.
        folder: of the device: its name and place say where results go, its `logs` keep output and pytest's report.
        commit: of the source, kept with the outcome.
        note: told of the outcome so far, before and after.
    """
    outcome = Outcome(job.name, job.command, "running", "cut off before its end", 0.0, now(), commit)
    if job.missing:
        outcome.status = "skipped"
        outcome.reason = f"{', '.join(job.missing)} not installed: {install_command(job.missing)}"
        note(outcome)
        return outcome
    note(outcome)
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log, report = logs / f"{job.name}.log", logs / f"{job.name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", *job.arguments]
    if job.is_test:
        command += [f"--junitxml={report}", "-o", f"faulthandler_timeout={HANGS}"]
    else:
        command += ["--output", str(folder.parent)]
    began = time.monotonic()
    outcome.status = "failed"
    try:
        status = run_limited(command, seconds, log)
        outcome.reason = _reason(status, seconds)
        outcome.status = "done" if status == 0 else "failed"
    except KeyboardInterrupt:
        outcome.reason = "interrupted"
        raise
    finally:
        outcome.seconds = round(time.monotonic() - began, 1)
        if job.is_test:
            outcome.tests = read_tests(report)
        if outcome.status != "done":
            outcome.tail = tail(log, folder.parent)
        note(outcome)
    return outcome


def run_limited(command: Sequence[str], seconds: float, log: Path, echo: BinaryIO | None = None) -> int | None:
    """Runs a command, its output going to a log and to `echo`; the exit status, None if it was ended at its limit.

    Nothing of its process group is left afterwards, also if this process is interrupted.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONUNBUFFERED"] = "1"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        targets = [file, sys.stdout.buffer if echo is None else echo]
        reader = threading.Thread(target=_copy, args=(process.stdout, targets), daemon=True)
        reader.start()
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)
            reader.join(GRACE)  # longer only where a process that left the group holds the pipe


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


def _copy(stream: BinaryIO, targets: list[BinaryIO]) -> None:
    """Copies as it comes; a target that takes nothing any more is left out, so that the command is not held up."""
    with stream:
        while chunk := stream.read1(1 << 16):
            for target in list(targets):
                try:
                    target.write(chunk)
                    target.flush()
                except (OSError, ValueError):
                    targets.remove(target)


def _reason(status: int | None, seconds: float) -> str:
    if status is None:
        return f"ended at its limit of {seconds / 60:.1f} minutes; what it had written is kept"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}" if status else ""


def now() -> str:
    """Date and time, to the minute."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def tail(log: Path, output: Path, lines: int = TAIL) -> list[str]:
    """The last lines of a log, without escape sequences and without where this machine keeps code and results."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", log.read_text(errors="replace"))
    python = (sysconfig.get_path(name) for name in ("purelib", "stdlib", "data"))
    for place in (*map(str, python), str(output), str(ROOT), str(Path.home())):
        if place != "/":
            text = text.replace(f"{place}/", "")
    return [line.rstrip()[:300] for line in text.splitlines() if line.strip()][-lines:]


def read_tests(report: Path) -> Tests | None:
    """Counts of a JUnit report; None if pytest has not come to write one."""
    if not report.exists():
        return None
    tests, skipped = Tests(), Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        name = "::".join(part for part in (case.get("classname"), case.get("name")) if part)
        if (skip := case.find("skipped")) is not None:
            text = f"{skip.get('message')}\n{skip.text}"  # of a whole file the reason is in the text
            found = re.search(r"Skipped: (.+?)['\"]\)", text)
            skipped[found[1] if found else text.splitlines()[0]] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            if name not in tests.failed:
                tests.failed.append(name)
        else:
            tests.passed += 1
    tests.skipped = dict(skipped.most_common())
    return tests
