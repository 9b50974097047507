"""The small trainings, from shards, of `python -m bench.faults`: started, watched, killed, compared with an undisturbed
one."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig
from dune_fast.dali_pipelines.sharding import ShardSettings, shard_dataset
from dune_fast.engine import checkpoints
from dune_fast.engine.launch import free_port
from dune_fast.engine.metrics import read_metrics
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.teachers.architecture import architecture_metadata

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVE_EVERY = 60, 5
START_SECONDS = 240.0
"""What a start, and what a whole run, may take before it counts as hung."""


class Lost(AssertionError):
    """Something that a run should survive, it did not; the message says what."""


@dataclass
class Started:
    """The processes of one start of a training."""

    processes: list[subprocess.Popen]
    logs: list[Path]
    pipes: list[int] = field(default_factory=list)
    """The reading ends of what the ranks write to, where that is no log."""

    def alive(self) -> bool:
        """Whether all ranks run."""
        return all(process.poll() is None for process in self.processes)

    def wait(self, seconds: float = START_SECONDS) -> list[int]:
        """Exit codes, once all ranks have ended; Lost if they do not."""
        end = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill()
                raise Lost(f"rank {rank} did not end within {seconds:.0f} s") from None
        return [process.returncode for process in self.processes]

    def kill(self) -> None:
        """SIGKILL for every rank; those that have ended are left alone."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def close_pipes(self) -> None:
        """Nobody reads any more what the ranks write."""
        while self.pipes:
            os.close(self.pipes.pop())

    def text(self) -> str:
        """What all ranks have written."""
        return "\n".join(path.read_text(errors="replace") for path in self.logs)

    def said(self) -> str:
        """The last line, for messages."""
        lines = [line.strip() for line in self.text().splitlines() if line.strip()]
        return lines[-1] if lines else "nothing"


@dataclass
class Bench:
    """Where it happens, and what a run looks like that nothing happens to."""

    work: Path
    draw: random.Random
    images: str = "shards"
    """What runs read from now on: "shards", which stay open, or "photos", which a fault can take away; "labels": the
    run trains a head, on photographs with labels."""
    whole: dict[tuple[str, int], Path] = field(default_factory=dict)
    """(images, ranks) -> folder of the uninterrupted run."""

    def __post_init__(self) -> None:
        photos = self.work / "photos"
        photos.mkdir(parents=True)
        for i in range(24):
            coarse = np.random.default_rng(i).integers(0, 256, (8, 10, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((100, 80), Image.Resampling.BICUBIC).save(photos / f"{i:02}.jpg")

    @cached_property
    def shards(self) -> Path:
        """The photographs in several tar files."""
        config = DataConfig({"images": DatasetConfig(root=str(self.work / "photos"))})
        shard_dataset("images", config, self.work / "shards", ShardSettings(megabytes=0.02), 1)
        return self.work / "shards"

    @cached_property
    def labels(self) -> tuple[Path, Path]:
        """Photographs whose dark pixels are class 1, in the plain layout; a drawn encoder."""
        root = self.work / "labels"
        for split, part in (("train", slice(0, 20)), ("val", slice(20, None))):
            for kind in ("images", "labels"):
                (root / kind / split).mkdir(parents=True)
            for path in sorted((self.work / "photos").glob("*.jpg"))[part]:
                shutil.copy(path, root / "images" / split)
                dark = np.array(Image.open(path).convert("L")) < 128
                Image.fromarray(dark.astype(np.uint8)).save(root / "labels" / split / f"{path.stem}.png")
        cfg = ViTConfig(56, embed_dim=96, depth=2, num_heads=3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            state = VisionTransformer(cfg).init_weights().state_dict()
        save_file(state, root / "encoder.safetensors", architecture_metadata(cfg))
        return root, root / "encoder.safetensors"

    def _trained(self) -> list[str]:
        """Overrides that say what is trained, on what."""
        if self.images == "labels":
            root, encoder = self.labels
            return [
                "experiment=seg_ade20k", f"head.encoder='{encoder}'", f"head.data.root='{root}'",
                "head.data.layout=plain", "head.data.size=56", "head.data.stride=56", "evaluation.every=0",
            ]  # fmt: skip
        return [
            "+teachers@teachers.one=conv_patchify", "teachers.one.weights=random:1", "teachers.one.num_features=24",
            "+teachers@teachers.two=conv_patchify", "teachers.two.weights=random:2", "teachers.two.num_features=32",
            "teachers.two.patch_size=16", "teachers.two.token_types=[patch]", "student=vit_tiny14", "student.depth=2",
            "student.embed_dim=96", "image_size=56", "data=folder", "data.num_threads=1",
            f"data.datasets.images.root='{self.shards.with_name(self.images)}'", "data.read_patience=1",
            "optimizer.lr_per_256=0.05",
        ]  # fmt: skip

    def start(
        self, run: Path, ranks: int, more: Sequence[str] = (), piped: bool = False,
        folders: Sequence[Path] = (ROOT, ROOT),
    ) -> Started:  # fmt: skip
        """Starts a training, or goes on with it.

        Args:
            run: its folder.
            ranks: processes.
            more: overrides.
            piped: the ranks write to pipes (`Started.pipes`), not to logs.
            folders: the working folder of each rank.
        """
        overrides = [
            *self._trained(), f"deepspeed=zero{ranks - 1}", "train.global_batch=8", f"train.steps={STEPS}",
            "train.log_every=1", "train.precision=fp32", f"train.checkpoint_every={SAVE_EVERY}",
            "evaluation.held_out=false", "logging.tensorboard=false", f"output_dir='{run}'", *more,
        ]  # fmt: skip
        run.mkdir(parents=True, exist_ok=True)
        port, number = str(free_port()), len(list(run.glob("log_*")))
        processes, logs, pipes = [], [], []
        for rank in range(ranks):
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
                "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "500", "RANK": str(rank),
                "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "PYTHONPATH": str(ROOT), "DUNE_FAST_CONFIGS": str(ROOT / "bench" / "toy"),
            }  # fmt: skip
            logs.append(run / f"log_{number + rank:03}")
            reader, writer = os.pipe() if piped else (-1, -1)
            with open(writer, "w") if piped else logs[-1].open("w") as log:
                command = [sys.executable, str(ROOT / "dune_fast" / "train.py"), *overrides]
                process = subprocess.Popen(
                    command, cwd=folders[rank], env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            processes.append(process)
            pipes += [reader] * piped
        return Started(processes, [] if piped else logs, pipes)

    def finish(self, run: Path, ranks: int) -> Started:
        """Starts a training and lets it end by itself; Lost if it does not end well."""
        started = self.start(run, ranks)
        if any(codes := started.wait()):
            raise Lost(f"started again, it ended with {codes}: {started.said()}")
        return started

    def compare(self, run: Path, ranks: int) -> None:
        """Lost unless weights and records are those of a run that nothing happens to, which is made once."""
        whole = self.work / f"whole_{self.images}_{ranks}"
        if (self.images, ranks) not in self.whole:
            self.finish(whole, ranks)
            self.whole[self.images, ranks] = whole
        whole = self.whole[self.images, ranks]
        name = "head.safetensors" if self.images == "labels" else "student.safetensors"
        ours, theirs = (load_file(folder / name) for folder in (run, whole))
        if wrong := [name for name in theirs if not torch.equal(ours[name], theirs[name])]:
            raise Lost(f"{len(wrong)} of {len(theirs)} tensors differ from those of the uninterrupted run")
        ours, theirs = (
            [(record["step"], record["loss"]) for record in read_metrics(folder / "metrics.jsonl")]
            for folder in (run, whole)
        )
        if ours != theirs:
            raise Lost("the records differ from those of the uninterrupted run: steps are missing, doubled or other")

    def wait_for_step(self, started: Started, run: Path, step: int) -> None:
        """Waits until the run has recorded a step, and a random moment more; Lost if it ends before."""
        self.wait_until(started, lambda: last_step(run) >= step, f"step {step}")
        time.sleep(self.draw.uniform(0, 0.05))

    @staticmethod
    def wait_until(started: Started, condition: Callable[[], bool], what: str, pause: float = 0.002) -> None:
        """Waits for a condition; Lost if a rank ends first, or it takes too long."""
        end = time.monotonic() + START_SECONDS
        while not condition():
            if not started.alive() or time.monotonic() > end:
                started.kill()
                raise Lost(f"it did not reach {what}: {started.said()}")
            time.sleep(pause)

    def later_step(self, run: Path, more: int = 0) -> int:
        """A random step after the newest checkpoint, such that `more` of them have room before the end."""
        first = newest(run) + 1
        return self.draw.randint(first, first + (STEPS - 1 - first) // (more + 1))


def last_step(run: Path) -> int:
    """Of the records so far; 0 if there is none."""
    path = run / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return records[-1]["step"] if records else 0


def newest(run: Path) -> int:
    """Step of the newest complete checkpoint, 0 if there is none."""
    return max(checkpoints.complete_steps(run), default=0)


def partial(run: Path) -> bool:
    """Whether a checkpoint is being written, or was cut short."""
    return any(checkpoints.folder(run).glob(f"*{checkpoints.PART}"))
