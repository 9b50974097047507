"""Tests and measures this project on a new GPU by one command: `python -m bench.gpu`, or `make gpu`.

Correctness first, then kernels at the targets' shapes, the training step, loss curves, and more while minutes are left.
Every job is a process of its own with a time limit; what fails or hangs does not stop the others. Results come as they
are measured, below `bench/results/<device>/`, with a page, README.md, that shows predicted beside measured and names
the targets that are missed. Runs add up: `--part N` runs one part and the page keeps what earlier runs have found.

The status is 0 if everything that ran succeeded, 1 if something failed, 2 without a GPU. Missed targets are no failure.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from bench.gpu_jobs import Job, install_command, installed, jobs
from bench.gpu_page import page, read_predicted
from bench.gpu_runner import ROOT, Outcome, now, run_job
from bench.gpu_targets import read_record
from bench.records import RESULTS, folder_name, versions, write_json, write_text

REQUIRED = ("numpy", "torch", "triton", "rich", "matplotlib", "pytest")
NO_GPU = (
    "bench.gpu measures on a CUDA GPU and found none; without one, `python -m pytest tests` checks the kernels in "
    "Triton's interpreter, `python -m bench.kernels --aot sm_90` compiles them for an H100, and `python -m bench.step "
    "--count` counts what a step launches, reads and holds."
)


def describe_device() -> dict | None:
    """Name, memory, versions and source of what is measured; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    from dune_fast.engine.provenance import driver_version, git_state

    found = torch.cuda.get_device_properties(0)
    git = git_state(ROOT)
    return {
        "name": found.name,
        "folder": folder_name(found.name),
        "memory": found.total_memory,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "driver": driver_version() or "unknown",
        "versions": versions(),
        "commit": source(git) if git else "",
    }


def source(git: dict) -> str:
    """Commit, and whether any file differs from it; results do not count."""
    changed = [path for path in git["changed"] or () if not path.startswith("bench/results/")]
    return git["commit"][:12] + (" + changes" if changed else "")


def in_own_process(function: Callable[[], dict | None]) -> dict | None:
    """A function's result; its process ends, and with it what it held of the device."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function).result()


@dataclass
class Session:
    """One call of the command."""

    folder: Path
    """Of the device."""
    device: dict
    jobs: Sequence[Job]
    """All that there are; the page lists them."""
    deadline: float
    """On the monotonic clock."""
    broken: bool = False
    """Whether the page could not be written."""

    def run(self, chosen: Sequence[Job]) -> list[Outcome]:
        """Runs what fits into the time that is left, in order."""
        outcomes, without_time = [], []
        for i, job in enumerate(chosen, 1):
            left = self.deadline - time.monotonic()
            if not job.missing and job.minutes * 60 > left:
                without_time.append(job)
                continue
            limit = min(job.limit * 60, max(left, 0))
            say(
                f"\n=== {i} of {len(chosen)}, part {job.part}: {job.about}; about {job.minutes:g} minutes, at most "
                f"{limit / 60:.1f}\n=== {job.command}"
            )
            outcome = run_job(job, limit, self.folder, self.device["commit"], self.keep)
            outcomes.append(outcome)
            reason = f": {outcome.reason}" if outcome.reason else ""
            say(f"=== {job.name}: {outcome.status}{reason} ({outcome.seconds / 60:.1f} minutes)")
        if without_time:
            say("\nNot run, the minutes were used up; to run them later:")
            for job in without_time:
                say(f"  part {job.part}, {job.minutes:g} minutes: {job.command}")
        return outcomes

    def keep(self, outcome: Outcome) -> None:
        """Puts an outcome into the folder and writes the page anew; a skipped job leaves an earlier result alone."""
        record = read_record(self.folder)
        record["device"] = {**self.device, "date": now()}
        if outcome.status != "skipped" or outcome.name not in record["jobs"]:
            record["jobs"][outcome.name] = asdict(outcome)
        write_json(self.folder / "gpu.json", record)
        try:
            write_text(self.folder / "README.md", page(self.folder, self.jobs, read_predicted()))
        except Exception:  # a result that cannot be read must not cost the measurements that are still to come
            self.broken = True
            say(f"the page could not be written:\n{traceback.format_exc()}")


def overview(everything: Sequence[Job]) -> str:
    """A line a job."""
    lines = []
    for job in everything:
        missing = f"   skipped, needs: {install_command(job.missing)}" if job.missing else ""
        lines.append(f"{job.part:4}  {job.minutes:3g} min  {job.about}\n                {job.command}{missing}")
    return "part  estimate\n" + "\n".join(lines)


def select(everything: Sequence[Job], parts: Sequence[int]) -> list[Job]:
    """Jobs of the given parts, all if none is given; ValueError for a part that there is not."""
    known = {job.part for job in everything}
    if unknown := sorted(set(parts) - known):
        raise ValueError(f"there is no part {', '.join(map(str, unknown))}; --list shows 1 to {max(known)}")
    return [job for job in everything if not parts or job.part in parts]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=25, help="for everything together (default: 25)")
    parser.add_argument("--part", type=int, action="append", default=[], metavar="N", help="this alone; repeatable")
    parser.add_argument("--list", action="store_true", help="show the parts and what they run")
    parser.add_argument("--output", type=Path, default=RESULTS, help="results go to a folder of the device in here")
    return parser.parse_args(argv)


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


def main(argv: Sequence[str] | None = None, describe: Callable[[], dict | None] = describe_device) -> int:
    """Entry point; returns the exit status."""
    args = parse(argv)

    began = time.monotonic()
    try:
        select(jobs(), args.part)
        if args.list:
            say(overview(jobs()))
            return 0
        if missing := [name for name in REQUIRED if not installed(name)]:
            raise ValueError(f"bench.gpu needs {', '.join(missing)}: {install_command(missing)}")
        if (device := in_own_process(describe)) is None:
            raise ValueError(NO_GPU)
    except ValueError as error:
        say(str(error))
        return 2
    everything = jobs(device["memory"])
    folder = args.output.resolve() / device["folder"]
    session = Session(folder, device, everything, began + args.minutes * 60)
    say(f"{device['name']}, {device['versions']}: results go to {folder}")
    try:
        with interruptible():
            outcomes = session.run(select(everything, args.part))
    except KeyboardInterrupt:
        say(f"interrupted; what was measured so far: {folder / 'README.md'}")
        return 130
    say(f"\nthe page with everything measured here: {folder / 'README.md'}")
    return 1 if session.broken or any(outcome.status == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
