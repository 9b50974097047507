"""Statistics of teachers' features over a data set, measured before any training (`dune-fast cache statistics`)."""

from __future__ import annotations

import torch

from dune_fast.dali_pipelines.datasets import index_datasets
from dune_fast.dali_pipelines.loader import TrainLoader
from dune_fast.distill.stored_statistics import FeatureMoments, Statistics
from dune_fast.engine.config import ConfigError, RunConfig
from dune_fast.engine.devices import autocast_dtype
from dune_fast.engine.teacher_crops import TeacherCrops
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.progress import Progress

_BATCH = 64  # images of a forward pass


def measure(cfg: RunConfig, images: int = 0) -> Statistics:
    """Mean and deviation of every teacher's token types, over the images that the run begins with.

    Args:
        cfg: of the run that will read them: its data decide which images, crops and colours the teachers see.
        images: so many; 0 for as many as there are to train on, which of one dataset is each of them once.

    Raises:
        ConfigError: fewer than two images are asked for.
        DataError: the images cannot be read.
    """
    if images < 0 or images == 1:
        raise ConfigError(f"--images {images}: give 2 at least, or 0 for as many as there are")
    datasets = index_datasets(cfg.data)
    images = images or sum(len(dataset.train) for dataset in datasets)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = autocast_dtype(cfg.train.precision, device)
    teachers = TeacherEnsemble(cfg.teachers, cfg.student.patch_size, dtype, device)
    sums = {name: {token: FeatureMoments() for token in t.token_types} for name, t in cfg.teachers.items()}
    crops, left = TeacherCrops(cfg), images
    loader = TrainLoader(
        cfg.data, cfg.image_size, min(_BATCH, images), 0, 1, cfg.train.seed, device, datasets, crops=crops.crops,
        patch=cfg.student.patch_size,
    )  # fmt: skip
    with loader, Progress("feature statistics", images, "images") as progress, torch.no_grad():
        for batch in loader.batches(0):
            for name, tokens in teachers(batch.images, views=crops.pictures(batch)).items():
                for token, x in tokens.items():
                    sums[name][token].add(x[:left])
            progress.advance(min(left, len(batch)))
            left -= len(batch)
            if left <= 0:
                break
    return {name: {token: own.finish() for token, own in tokens.items()} for name, tokens in sums.items()}
