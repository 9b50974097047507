"""k-NN and linear classification of frozen features: `--task knn` and `--task linear`.

Both read cls and the mean patch token, L2-normalised. k-NN is `evaluate.knn`; the linear classifier is multinomial
logistic regression of scikit-learn, whose regularisation is chosen on a held-out fifth of the training images.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dune_fast.dali_pipelines.addresses import is_url
from dune_fast.dali_pipelines.datasets import DatasetConfig, index_dataset
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.listing import imagefolder_splits
from dune_fast.dali_pipelines.order import Permutation
from dune_fast.evaluate.extract import FeatureSet, extract
from dune_fast.evaluate.knn import Labelled, knn_predict, labelled
from dune_fast.evaluate.model import FrozenModel
from dune_fast.evaluate.ranks import Ranks

logger = logging.getLogger(__name__)

NEIGHBOURS = (10, 20)
COSTS = tuple(10.0**power for power in range(-1, 6))
"""scikit-learn's C: the inverse of the regularisation, for features of length 1."""
_MAX_ITERATIONS = 1000
_LARGE = 5e13  # products of a fit, about: some hours on a few cores


def classes_of(data: str, seed: int) -> Labelled:
    """Images in class folders: ROOT/CLASS/image, or ROOT/train/CLASS/image with ROOT/val/CLASS/image.

    Args:
        data: folder, list, shards of such, or asset:NAME; see `DatasetConfig.root`.
        seed: which images of two splits come first; all take part.

    Raises:
        DataError: no images there.
        LabelError: they have no classes.
    """
    root, val = data, ""
    if not data.startswith(("asset:", "imagefolder:")) and (is_url(data) or Path(data).expanduser().is_dir()):
        folder = data if is_url(data) else str(Path(data).expanduser())
        with contextlib.suppress(DataError):  # one folder whose sub-folders are the classes
            root, val = imagefolder_splits("data", folder)
    dataset = index_dataset("data", DatasetConfig(root=root, val_root=val))
    return labelled(dataset, sys.maxsize, seed, cure="or give another --data", root="--data")


def features_of(model: FrozenModel, data: Labelled, size: int, cache: Path, batch: int, ranks: Ranks) -> FeatureSet:
    """cls (where there is one) and mean patch of all images, from the cache where they are there."""
    tokens = ["cls", "mean"] if model.has_cls else ["mean"]
    images = [dataset.val for dataset in data.datasets]
    title = f"features of {model.name}"
    return extract(model, images, size, tokens, cache=cache, batch=batch, ranks=ranks, title=title)


def knn_task(features: FeatureSet, data: Labelled, device: torch.device) -> dict[str, float]:
    """Accuracy of each token and k; leave-one-out where there is no validation split."""
    found = {}
    for token, bank, queries, bank_labels, labels in _split(features, data, device):
        alone = len(data.datasets) == 1
        for k in NEIGHBOURS:
            predicted = knn_predict(queries, bank, bank_labels, len(data.classes), k, alone)
            found[f"{token}/k={k}"] = (predicted == labels).double().mean().item()
    return found


def linear_task(features: FeatureSet, data: Labelled, seed: int) -> dict[str, float]:
    """Accuracy of each token, and the C that was chosen; without a validation split, on a fifth that is kept out."""
    fit = logistic_regression()
    found: dict[str, float] = {}
    for token, bank, queries, bank_labels, labels in _split(features, data, torch.device("cpu")):
        if len(data.datasets) == 1:
            test = fifth(bank_labels, seed)
            bank, queries, bank_labels, labels = bank[~test], bank[test], bank_labels[~test], bank_labels[test]
        if len(bank) * bank.shape[1] * len(data.classes) * _MAX_ITERATIONS > _LARGE:
            logger.warning("%d images of %d classes: the fits may take hours", len(bank), len(data.classes))
        held = fifth(bank_labels, seed + 1)
        x, y = F.normalize(bank, dim=-1).numpy(), bank_labels.numpy()
        scores = [(fit(x[~held], y[~held], cost).score(x[held], y[held]), -cost) for cost in COSTS]
        cost = -max(scores)[1]  # the strongest regularisation among the best
        accuracy = fit(x, y, cost).score(F.normalize(queries, dim=-1).numpy(), labels.numpy())
        found |= {f"{token}/accuracy": float(accuracy), f"{token}/C": cost}
        logger.info("linear, %s: C %g chosen among %d, accuracy %.4f", token, cost, len(COSTS), accuracy)
    return found


def logistic_regression() -> Callable[[np.ndarray, np.ndarray, float], Any]:
    """(x, y, C) -> a fitted classifier; ValueError if scikit-learn is not installed."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ValueError(
            "--task linear needs scikit-learn: pip install -c constraints.txt -e '.[evaluate]' (or scikit-learn)"
        ) from error

    def fit(x: np.ndarray, y: np.ndarray, cost: float) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model = LogisticRegression(C=cost, max_iter=_MAX_ITERATIONS, tol=1e-4).fit(x, y)
        if any(issubclass(w.category, ConvergenceWarning) for w in caught):
            logger.warning("logistic regression with C=%g has not converged in %d iterations", cost, _MAX_ITERATIONS)
        return model

    return fit


def fifth(labels: Tensor, seed: int) -> np.ndarray:
    """bool [N]: a fifth of each class's images, rounded, never all of a class; a function of the seed."""
    chosen = np.zeros(len(labels), bool)
    for c in labels.unique().tolist():
        members = np.flatnonzero(labels.numpy() == c)
        count = min(round(len(members) / 5), len(members) - 1)
        chosen[members[Permutation(len(members), seed, c)(np.arange(count))]] = True
    if not chosen.any():  # classes of one or two images
        raise ValueError("no class has three images or more: too few to hold a fifth out for the regularisation")
    return chosen


def _split(
    features: FeatureSet, data: Labelled, device: torch.device
) -> Sequence[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """(token, bank, queries, their labels) without broken images; the queries are the bank where there is one split."""
    rows = []
    for token in features.shapes:
        x, seen = features.whole(token)
        at = torch.arange(len(seen))
        bank = seen & (at < data.bank)
        queries = bank if len(data.datasets) == 1 else seen & (at >= data.bank)
        if bank.sum() < 2 or not queries.any():
            raise ValueError("too few images could be read: at least two to search among and one to classify")
        x, labels = x.float().to(device), data.labels.to(device)
        bank, queries = bank.to(device), queries.to(device)
        rows.append((token, x[bank], x[queries], labels[bank], labels[queries]))
    return rows


def chance(data: Labelled) -> float:
    """Share of the most frequent class among the images to classify: what knowing nothing gives."""
    labels = data.labels if len(data.datasets) == 1 else data.labels[data.bank :]
    return labels.bincount().max().item() / len(labels) if len(labels) else math.nan
