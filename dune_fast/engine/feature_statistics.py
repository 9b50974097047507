"""Statistics of teachers' features over a data set, measured before any training (`dune-fast cache statistics`)."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from dune_fast.dali_pipelines.datasets import index_datasets
from dune_fast.dali_pipelines.loader import ViewLoader
from dune_fast.distill.stored_statistics import FeatureMoments, Statistics
from dune_fast.engine.config import ConfigError, RunConfig
from dune_fast.engine.devices import autocast_dtype
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.progress import Progress

_BATCH = 64  # views of a forward pass


def measure(cfg: RunConfig, images: int = 0) -> Statistics:
    """Mean and deviation of every teacher's token types, over one view of each training image.

    Args:
        cfg: of the run that will read them: its data decide which images, crops and colours the teachers see.
        images: so many of the training images, evenly spread; 0 for all.

    Raises:
        ConfigError: fewer than two images are asked for.
        DataError: the images cannot be read.
    """
    if images < 0 or images == 1:
        raise ConfigError(f"--images {images}: give 2 at least, or 0 for all")
    data = dataclasses.replace(cfg.data, views=cfg.data.views or 1)
    datasets = index_datasets(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = autocast_dtype(cfg.train.precision, device)
    teachers = TeacherEnsemble(cfg.teachers, cfg.student.patch_size, dtype, device)
    total = sum(len(dataset.train) for dataset in datasets)
    chosen = np.linspace(0, total - 1, min(images or total, total)).astype(np.int64) * data.views  # their first views
    batches = [chosen[start : start + _BATCH] for start in range(0, len(chosen), _BATCH)]
    sums = {name: {token: FeatureMoments() for token in t.token_types} for name, t in cfg.teachers.items()}
    loader = ViewLoader(data, cfg.image_size, cfg.train.seed, batches, device, datasets)
    with loader, Progress("feature statistics", len(chosen), "images") as progress, torch.no_grad():
        for batch in loader.batches():
            for name, tokens in teachers(batch.images).items():
                for token, x in tokens.items():
                    sums[name][token].add(x)
            progress.advance(len(batch))
    return {name: {token: own.finish() for token, own in tokens.items()} for name, tokens in sums.items()}
