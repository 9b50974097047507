"""The small run on two hosts: started, watched, compared with one that nothing happened to."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from dune_fast.engine.metrics import read_metrics
from dune_fast.teachers.run_files import complete_steps
from tests.clusters.two_hosts import ROOT, Command, TwoHosts, wait_until
from tests.engine.conftest import small_run

STEPS, SAVE_EVERY = 120, 20
TRAIN = str(ROOT / "dune_fast" / "train.py")


class Runs:
    """Makes runs in folders of their own."""

    def __init__(self, hosts: TwoHosts, photos: Path, folder: Path) -> None:
        self.hosts, self.photos, self.folder = hosts, photos, folder
        self.hostfile = folder / "hosts"
        self.hostfile.write_text("nodeA slots=1\nnodeB slots=1\n")
        self._whole: Path | None = None

    def overrides(self, run: Path) -> list[str]:
        """Of the small run in a folder."""
        return [
            *small_run(self.photos, run), "deepspeed=zero1", f"train.steps={STEPS}", "evaluation.held_out=false",
            "objective.drop_probability=0",  # its draws are a rank's
            f"train.checkpoint_every={SAVE_EVERY}", "logging.tensorboard=false", "train.timeout_minutes=1",
        ]  # fmt: skip

    def start(self, run: Path, *more: str, host: str = "nodeA") -> Command:
        """`dune-fast distill --hostfile`, on a host."""
        command = [sys.executable, "-m", "dune_fast", "distill", "--hostfile", str(self.hostfile)]
        return self.hosts.run(host, *command, *self.overrides(run), *more)

    def whole(self) -> Path:
        """The run that nothing happens to, of two processes on one host; made once."""
        if self._whole is None:
            run = self.folder / "whole"
            command = [sys.executable, "-m", "dune_fast", "distill", "-n", "2", *self.overrides(run)]
            started = self.hosts.run("nodeA", *command)
            assert started.wait() == 0, started.text()
            self._whole = run
        return self._whole

    def reach(self, run: Path, started: Command, step: int = 33) -> None:
        """Waits until a step is recorded."""

        def there() -> bool:
            assert started.process.poll() is None, started.text()[-3000:]
            return last_step(run) >= step

        wait_until(there, f"step {step}", 240.0, 0.02)

    def finish(self, run: Path, *more: str) -> Command:
        """The same command again, to the end."""
        started = self.start(run, *more)
        assert started.wait() == 0, started.text()[-3000:]
        return started

    def compare(self, run: Path) -> None:
        """The weights, bit for bit, and the losses of every step are those of the undisturbed run."""
        ours, theirs = (load_file(folder / "student.safetensors") for folder in (run, self.whole()))
        assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        ours, theirs = (
            [(record["step"], record["loss"]) for record in read_metrics(folder / "metrics.jsonl")]
            for folder in (run, self.whole())
        )
        assert ours == theirs


def last_step(run: Path) -> int:
    """Of the records so far; 0 if there is none."""
    path = run / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return records[-1]["step"] if records else 0


def lost_steps(run: Path) -> int:
    """Steps that were computed and are not in a checkpoint."""
    return last_step(run) - max(complete_steps(run), default=0)


def says(started: Command, words: str, seconds: float = 240.0) -> float:
    """Waits until a command has said something; the seconds that it took."""
    try:
        return wait_until(lambda: words in started.text(), repr(words), seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}:\n{started.text()[-2000:]}") from None
