"""Principal components of teachers' patch tokens, from a sample of the views that a cache will hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dune_fast.cache.basis import FILE, keep_basis, read_basis
from dune_fast.cache.formats import Basis
from dune_fast.dali_pipelines.datasets import Dataset
from dune_fast.dali_pipelines.loader import ViewLoader
from dune_fast.distill.phi_s import SecondMoments
from dune_fast.engine.config import ConfigError, RunConfig
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.progress import Progress

SAMPLE = 512
"""Views that the components are estimated from, evenly spread over all; fewer where there are fewer."""
_BATCH = 64  # views of a forward pass


def cache_basis(
    cfg: RunConfig, folder: Path, datasets: list[Dataset], views: int, teachers: TeacherEnsemble, device: torch.device
) -> tuple[dict[str, Basis], str]:
    """The basis of a cache's folder on the device, made first if it is not there, and its SHA-256.

    Args:
        views: of the whole cache.

    Raises:
        ConfigError: the sample is too small for so many components.
        ValueError: the file is damaged.
    """
    if not (folder / FILE).exists():
        keep_basis(folder, _estimate(cfg, datasets, views, teachers, device))
    bases, digest = read_basis(folder)
    return {name: basis.to(device) for name, basis in bases.items()}, digest


def _estimate(
    cfg: RunConfig, datasets: list[Dataset], views: int, teachers: TeacherEnsemble, device: torch.device
) -> dict[str, Basis]:
    wanted = cfg.cache.components
    larger = {name: t for name, t in cfg.teachers.items() if "patch" in t.token_types and t.num_features > wanted}
    sums = {name: SecondMoments(teacher.num_features, device) for name, teacher in larger.items()}
    sample = np.linspace(0, views - 1, min(views, SAMPLE)).astype(np.int64)
    batches = [sample[start : start + _BATCH] for start in range(0, len(sample), _BATCH)]
    loader = ViewLoader(cfg.data, cfg.image_size, cfg.train.seed, batches, device, datasets)
    with loader, Progress("principal components", len(sample), "views") as progress:
        for batch in loader.batches():
            features = teachers(batch.images)
            for name, own in sums.items():
                own.add(features[name]["patch"])
            progress.advance(len(batch))
    found = {}
    for name, own in sums.items():
        if own.sums[0] <= wanted:
            raise ConfigError(
                f"cache.components={wanted}, but the {len(sample)} views that components are estimated from have "
                f"{int(own.sums[0])} patches: choose fewer"
            )
        mean, covariance = own.mean_and_covariance()
        vectors = torch.linalg.eigh(covariance).eigenvectors  # of ascending eigenvalues
        found[f"{name}/patch"] = Basis(mean.float(), vectors[:, -wanted:].float())
    return found
