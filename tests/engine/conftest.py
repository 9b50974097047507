"""A small run: generated photographs, two tiny teachers, a student of two blocks."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from dune_fast.engine.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """24 JPEG files of smooth noise."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(24):
        coarse = np.random.default_rng(i).integers(0, 256, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((100, 80), Image.BICUBIC).save(folder / f"{i:02}.jpg", quality=92)
    return folder


@contextmanager
def full_disk(size: int):
    """Files of this process cannot grow beyond `size` bytes: write(2) fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def small_run(photos: Path, folder: Path) -> list[str]:
    """Hydra overrides of the small run, which writes to `folder`."""
    return [
        "+teachers@teachers.one=conv_patchify", "teachers.one.weights=random:1", "teachers.one.num_features=24",
        "+teachers@teachers.two=conv_patchify", "teachers.two.weights=random:2", "teachers.two.num_features=32",
        "teachers.two.patch_size=16", "teachers.two.token_types=[patch]",
        "student=vit_tiny14", "student.depth=2", "student.embed_dim=48", "image_size=56",
        "data=folder", f"data.datasets.images.root={photos}", "data.datasets.images.holdout=4", "data.num_threads=1",
        "deepspeed=zero0", "train.global_batch=8", "train.steps=6", "train.log_every=1", "train.checkpoint_every=3",
        "train.precision=fp32", "optimizer.lr_per_256=0.05", "evaluation.figure_size=56", "logging.tensorboard=false",
        f"output_dir={folder}",
    ]  # fmt: skip


@pytest.fixture
def overrides(photos, tmp_path) -> list[str]:
    """The small run in a folder of this test's own."""
    return small_run(photos, tmp_path / "run")


@pytest.fixture(scope="session")
def trained_run(photos, tmp_path_factory) -> Path:
    """The folder of a small run of six steps, with checkpoints after 3 and 6; not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    build(small_run(photos, folder)).run()
    return folder


@pytest.fixture
def finished(trained_run, tmp_path) -> Path:
    """A run of six steps with checkpoints after 3 and 6, this test's own copy."""
    return shutil.copytree(trained_run, tmp_path / "run")


def build(overrides: list[str], *more: str, before_step: Callable | None = None) -> Trainer:
    """A run that is about to begin, or to go on; `before_step` takes trainer and batch."""
    from dune_fast.engine.config import compose_config
    from dune_fast.engine.trainer import Trainer

    trainer = Trainer(compose_config([*overrides, *more]))
    if before_step is not None:
        plain = trainer.train_step
        trainer.train_step = lambda batch: (before_step(trainer, batch), plain(batch))[1]
    return trainer


def train(overrides: list[str], *more: str, before_step: Callable | None = None) -> Trainer:
    """A run that has ended."""
    trainer = build(overrides, *more, before_step=before_step)
    trainer.run()
    return trainer


def timeless(run: Path) -> list[dict]:
    """Records without what depends on the machine, and without the diagnostics that a resumed run starts anew."""
    from dune_fast.engine.metrics import CLOCK, read_metrics

    left_out = (*CLOCK, "conflict/")
    return [{k: v for k, v in r.items() if not k.startswith(left_out)} for r in read_metrics(run / "metrics.jsonl")]


def same_weights(one: Path, other: Path, file: str = "student.safetensors", others: str = "") -> bool:
    """Whether two runs have exported the same bits, in a file of this name (the other run's, if it has another)."""
    import torch
    from safetensors.torch import load_file

    ours, theirs = load_file(one / file), load_file(other / (others or file))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def run_ranks(count: int, script: str, *arguments: str, **environment: str) -> None:
    """Runs a script of this repository on so many ranks of one machine; fails with what a failed one has written."""
    from dune_fast.engine.launch import free_port

    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    kept |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    with tempfile.TemporaryFile("w+") as log:
        try:
            for rank in range(count):
                own = kept | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, script, *arguments]
                ranks.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=log, stderr=log))
            codes = [rank.wait(timeout=300) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        log.seek(0)
        assert codes == [0] * count, log.read()[-4000:]
