"""A small run: generated photographs, two tiny teachers, a student of two blocks."""

from __future__ import annotations

import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


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
        "train.precision=fp32", "optimizer.lr_per_256=0.05", "evaluation.figure_size=56",
        f"output_dir={folder}",
    ]  # fmt: skip


@pytest.fixture
def overrides(photos, tmp_path) -> list[str]:
    """The small run in a folder of this test's own."""
    return small_run(photos, tmp_path / "run")


@pytest.fixture(scope="session")
def trained_run(photos, tmp_path_factory) -> Path:
    """The folder of a small run of six steps, with checkpoints after 3 and 6; not to be changed."""
    from dune_fast.engine.config import compose_config
    from dune_fast.engine.trainer import Trainer

    folder = tmp_path_factory.mktemp("trained") / "run"
    Trainer(compose_config([*small_run(photos, folder), "logging.tensorboard=false"])).run()
    return folder


@pytest.fixture
def finished(trained_run, tmp_path) -> Path:
    """A run of six steps with checkpoints after 3 and 6, this test's own copy."""
    return shutil.copytree(trained_run, tmp_path / "run")
