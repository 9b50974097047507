"""Does a run survive what happens to runs? `python -m bench.faults --kills 5`.

A small training (two toy teachers, a ViT of two blocks, generated photographs) is hit by one fault after the other, in
processes of its own on the CPU, and started again by the same command. It has survived if it then ends by itself, with
the weights of a run that nothing happened to, bit for bit, and one record a step with that run's losses. Exit status 1
if anything is lost.

More than 300 lines: a function a fault.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.fault_runs import STEPS, Bench, Lost, Started, last_step, newest, partial
from dune_fast.engine import checkpoints
from dune_fast.teachers.run_files import MANIFEST

HANG_SECONDS = 15.0
"""`train.timeout_minutes` of the run in which a rank hangs."""
SMALL_FILE = 2**16
"""Bytes that a file may grow to while the disk is "full"; records and logs stay below."""
TRIES = 20
"""Starts after which a kill that is to hit a save gives up."""

Happened = str


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run."""

    name: str
    happen: Callable[[Bench, Path], Happened]
    """Brings it about, in a fresh folder; leaves a run that can be started again and says what was seen."""
    ranks: int = 1
    images: str = "shards"
    """See `Bench.images`."""


def kill(bench: Bench, run: Path, count: int = 1, ranks: int = 1, who: int | None = None) -> Happened:
    """SIGKILL at random steps, of all ranks or of one, again and again."""
    at = []
    for i in range(count):
        started = bench.start(run, ranks)
        bench.wait_for_step(started, run, bench.later_step(run, more=count - 1 - i))
        if who is None:
            started.kill()
        else:
            started.processes[who].kill()
            codes = started.wait()  # the others must not hang
            if codes[1 - who] == 0:
                raise Lost(f"rank {1 - who} ended with 0 although rank {who} was killed")
        at.append(str(last_step(run)))
    return f"killed at step {', '.join(at)}"


def kill_in_save(bench: Bench, run: Path) -> Happened:
    """SIGKILL while a checkpoint is being written: what it leaves proves that."""
    for attempt in range(TRIES):
        started = bench.start(run, 1)
        after = bench.draw.randrange(newest(run), STEPS - 5)
        bench.wait_until(started, lambda after=after: last_step(run) > after and partial(run), "a save", pause=0.0)
        started.kill()
        if partial(run):
            return f"killed in the save after step {newest(run)}, attempt {attempt + 1}"
        if newest(run) >= STEPS - 10:
            break
    raise Lost(f"no kill of {TRIES} hit a save: nothing was tried")


@contextmanager
def full_disk(started: Started) -> Iterator[None]:
    """Files of the processes cannot grow: write(2) fails, as on a full disk."""
    for process in started.processes:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (SMALL_FILE, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        for process in started.processes:
            if process.poll() is None:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def disk_fills_and_is_freed(bench: Bench, run: Path) -> Happened:
    """A save fails; the run goes on and saves again."""
    started = bench.start(run, 1)
    bench.wait_until(started, lambda: newest(run) > 0, "a checkpoint")
    with full_disk(started):
        bench.wait_until(started, lambda: "could not be saved" in started.text(), "a save that fails")
        kept = newest(run)
    bench.wait_until(started, lambda: newest(run) > kept, "a save after the disk was freed")
    codes = started.wait()
    if any(codes):
        raise Lost(f"it ended with {codes}: {started.said()}")
    return f"warned, kept step {kept}, saved again, went on to the end"


def disk_stays_full(bench: Bench, run: Path) -> Happened:
    """All saves from some moment on fail, the last one too: the run must say so."""
    started = bench.start(run, 1)
    bench.wait_until(started, lambda: newest(run) > 0, "a checkpoint")
    with full_disk(started):
        codes = started.wait()
    if not codes[0] or "Traceback" in started.text():
        raise Lost(f"it ended with {codes[0]} although its last checkpoint could not be saved: {started.said()}")
    return f"ended with {codes[0]}, kept step {newest(run)}"


def damage(bench: Bench, run: Path, spoil: Callable[[Path], None]) -> Happened:
    """The newest checkpoint is damaged after a kill: the one before must serve."""
    started = bench.start(run, 1)
    bench.wait_until(started, lambda: len(checkpoints.complete_steps(run)) > 1, "two checkpoints")
    started.kill()
    steps = checkpoints.complete_steps(run)
    spoil(checkpoints.folder(run) / checkpoints.tag(steps[-1]))
    again = bench.start(run, 1)
    bench.wait_until(again, lambda: "going on from" in again.text(), "the checkpoint before")
    again.kill()
    if "is broken" not in again.text() or f"going on from step {steps[-2]} " not in again.text():
        raise Lost(f"step {steps[-1]} was damaged, and it did not say that it went back to {steps[-2]}")
    return f"step {steps[-1]} damaged, went back to {steps[-2]}"


def flip_bit(folder: Path) -> None:
    """One bit in the middle of the weights' file."""
    path = next(folder.glob("rank_*.safetensors"))
    content, half = path.read_bytes(), path.stat().st_size // 2
    path.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])


def cut_short(folder: Path) -> None:
    """Half of the weights' file."""
    path = next(folder.glob("rank_*.safetensors"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


@contextmanager
def missing_shard(bench: Bench) -> Iterator[str]:
    """A shard, whose name this gives, is not there."""
    shard = bench.draw.choice(sorted(bench.shards.glob("**/*.tar")))
    hidden = shard.with_name(shard.name + ".hidden")
    shard.rename(hidden)
    try:
        yield shard.name
    finally:
        hidden.rename(shard)


def remove_shard(bench: Bench, run: Path) -> Happened:
    """A shard disappears between two starts: the run must refuse to go on without it, not train on other images."""
    started = bench.start(run, 1)
    bench.wait_for_step(started, run, bench.later_step(run))
    started.kill()
    with missing_shard(bench) as shard:
        refused = bench.start(run, 1)
        code, text = refused.wait()[0], refused.text()
    if not code or shard not in text or "Traceback" in text:
        raise Lost(f"without {shard} it ended with {code}: {refused.said()}")
    return f"without {shard}: exit {code}, the shard named; then put back"


def remove_shard_in_run(bench: Bench, run: Path) -> Happened:
    """A shard disappears under a running training, and is put back once that has ended or gone on."""
    started = bench.start(run, 1)
    bench.wait_until(started, lambda: newest(run) > 0, "a checkpoint")
    with missing_shard(bench) as shard:
        code = started.wait()[0]
    if code and shard not in started.text():
        raise Lost(f"it ended with {code} without naming {shard}: {started.said()}")
    return f"{shard} removed: " + (f"exit {code}, the shard named" if code else "read from what was open")


def preempt(bench: Bench, run: Path, ranks: int) -> Happened:
    """SIGTERM to the last rank: one save, exit code 0 of all."""
    started = bench.start(run, ranks)
    bench.wait_for_step(started, run, bench.draw.randint(8, STEPS // 2))
    started.processes[-1].send_signal(signal.SIGTERM)
    return saved_all(started, run, 0)


def saved_all(started: Started, run: Path, status: int) -> Happened:
    """Waits for the end; Lost unless it comes early, with this status, and all steps are saved."""
    codes = started.wait()
    if set(codes) != {status}:
        raise Lost(f"it ended with {codes}, not {status}: {started.said()}")
    last = last_step(run)
    if last >= STEPS:
        raise Lost("it was not stopped")
    if newest(run) != last:
        raise Lost(f"it stopped after step {last}, but its newest checkpoint is {newest(run)}")
    return f"exit {status} after step {last}, which was saved"


def close_output(bench: Bench, run: Path) -> Happened:
    """Nobody reads what a run writes any more (`| head`, Ctrl-C for `| tee`): it goes on; SIGTERM saves."""
    started = bench.start(run, 1, piped=True)
    bench.wait_for_step(started, run, 4)
    started.close_pipes()
    bench.wait_for_step(started, run, bench.draw.randint(8, STEPS // 2))
    started.processes[0].send_signal(signal.SIGTERM)
    return saved_all(started, run, 0)


@contextmanager
def without_photos(bench: Bench, frozen: bool) -> Iterator[None]:
    """The photographs are gone or, `frozen`, cannot be read to an end: pipes that nobody writes to."""
    photos, hidden = bench.work / "photos", bench.work / "hidden"
    photos.rename(hidden)
    try:
        if frozen:
            photos.mkdir()
            for path in hidden.iterdir():
                os.mkfifo(photos / path.name)
        yield
    finally:
        shutil.rmtree(photos, ignore_errors=True)
        hidden.rename(photos)


def lose_photos(bench: Bench, run: Path, frozen: bool, told: bool = False) -> Happened:
    """The photographs go away under a run: it saves, and ends by itself or, `told`, by SIGTERM."""
    started = bench.start(run, 1, [f"train.timeout_minutes={HANG_SECONDS / 60}"])
    bench.wait_for_step(started, run, bench.draw.randint(8, STEPS // 2))
    with without_photos(bench, frozen):
        if told:
            time.sleep(1.0)  # until it waits
            started.processes[0].send_signal(signal.SIGTERM)
        return saved_all(started, run, 0 if told else 2)


def own_folders(bench: Bench, run: Path) -> Happened:
    """Each rank has a folder of its own for the run: all must refuse at the start, and name the rank."""
    folders = [run / name for name in ("host_a", "host_b")]
    for folder in folders:
        folder.mkdir(parents=True)
    started = bench.start(run, 2, ["output_dir=mine"], folders=folders)
    codes = started.wait()
    if codes != [2, 2] or "rank 1 on" not in started.text() or "Traceback" in started.text():
        raise Lost(f"with two folders it ended with {codes}: {started.said()}")
    return "exit 2, rank 1 named"


def hang(bench: Bench, run: Path) -> Happened:
    """SIGSTOP for rank 1 of 2: rank 0 must end by itself and name it."""
    started = bench.start(run, 2, [f"train.timeout_minutes={HANG_SECONDS / 60}"])
    bench.wait_for_step(started, run, bench.draw.randint(8, STEPS // 2))
    began = time.monotonic()
    started.processes[1].send_signal(signal.SIGSTOP)
    try:
        started.processes[0].wait(8 * HANG_SECONDS)
    except Exception as error:
        raise Lost(f"rank 0 still waited for rank 1 after {8 * HANG_SECONDS:.0f} s") from error
    finally:
        started.kill()
    if started.processes[0].returncode == 0 or "rank 1" not in started.logs[0].read_text():
        raise Lost(f"rank 0 ended with {started.processes[0].returncode} and did not name rank 1: {started.said()}")
    return f"rank 0 ended after {time.monotonic() - began:.0f} s and named rank 1"


def faults(kills: int) -> list[Fault]:
    """Everything that is tried."""
    return [
        Fault(f"kill, {kills} times", lambda bench, run: kill(bench, run, kills)),
        Fault("kill in a save", kill_in_save),
        Fault("kill one of two ranks", lambda bench, run: kill(bench, run, ranks=2, who=bench.draw.randrange(2)), 2),
        Fault("kill both ranks", lambda bench, run: kill(bench, run, ranks=2), 2),
        Fault("disk full, then freed", disk_fills_and_is_freed),
        Fault("disk full to the end", disk_stays_full),
        Fault("a bit of a checkpoint flips", lambda bench, run: damage(bench, run, flip_bit)),
        Fault("a checkpoint cut short", lambda bench, run: damage(bench, run, cut_short)),
        Fault("a checkpoint's manifest lost", lambda bench, run: damage(bench, run, lose_manifest)),
        Fault("a shard removed, then back", remove_shard),
        Fault("a shard removed in a run", remove_shard_in_run),
        Fault("SIGTERM", lambda bench, run: preempt(bench, run, 1)),
        Fault("SIGTERM for one of two ranks", lambda bench, run: preempt(bench, run, 2), 2),
        Fault("a rank hangs", hang, 2),
        Fault("output that nobody reads", close_output),
        Fault("frozen storage", lambda *run: lose_photos(*run, frozen=True), images="photos"),
        Fault("SIGTERM at frozen storage", lambda *run: lose_photos(*run, frozen=True, told=True), images="photos"),
        Fault("lost storage", lambda *run: lose_photos(*run, frozen=False), images="photos"),
        Fault("a run's folder for each rank", own_folders, 2),
        Fault("kill a head's training", lambda bench, run: kill(bench, run, kills), images="labels"),
        Fault("SIGTERM for a head's ranks", lambda bench, run: preempt(bench, run, 2), 2, images="labels"),
    ]


def undergo(bench: Bench, fault: Fault, run: Path) -> tuple[bool, str]:
    """Lets a fault happen and the run be started again; whether it survived, and what was seen."""
    seen, bench.images = "", fault.images
    try:
        seen = fault.happen(bench, run)
        reached = newest(run)
        bench.finish(run, fault.ranks)
        bench.compare(run, fault.ranks)
        return True, f"{seen}; went on from step {reached}, ended like the uninterrupted run"
    except Lost as lost:
        return False, f"{seen}; {lost}" if seen else str(lost)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=3, help="kills at random steps, one after the other (3)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (0)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the faults whose name contains this")
    parser.add_argument("--keep", type=Path, default=None, metavar="DIR", help="keep the runs' folders there")
    args = parser.parse_args(argv)
    chosen = [fault for fault in faults(args.kills) if args.only in fault.name]
    if not chosen or args.kills < 1:
        known = ", ".join(fault.name for fault in faults(1))
        parser.error(f"--only {args.only!r} --kills {args.kills}: kill at least once, and choose from: {known}")
    logging.getLogger("dune_fast").setLevel(logging.ERROR)  # records are read while they are written
    console = Console(highlight=False, soft_wrap=True)
    lost = 0
    with tempfile.TemporaryDirectory(prefix="faults_") as temporary:
        bench = Bench((args.keep or Path(temporary)) / "faults", random.Random(args.seed))
        for i, fault in enumerate(chosen):
            survived, seen = undergo(bench, fault, bench.work / f"run_{i:02}")
            lost += not survived
            verdict = "survived" if survived else "LOST"
            console.print(f"{fault.name:<30} {verdict:<9} {seen}", style="" if survived else "bold red")
    console.print(f"{len(chosen) - lost} of {len(chosen)} survived" + (f", {lost} LOST" if lost else ", nothing lost"))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
