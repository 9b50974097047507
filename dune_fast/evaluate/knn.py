"""k-nearest-neighbour classification of frozen features, the quickest look at what they are worth.

    score[c] = sum over the k nearest neighbours i of class c of exp(cos(x, x_i) / T),   T = 0.07

The class with the highest score wins (Wu et al., "Unsupervised feature learning via non-parametric instance
discrimination", CVPR 2018; k and T as in DINO and DINOv2). Which images take part is a function of the seed alone.
"""

from __future__ import annotations

import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dune_fast.dali_pipelines.datasets import Dataset, Images
from dune_fast.dali_pipelines.errors import BrokenImage
from dune_fast.dali_pipelines.listing import SPLITS
from dune_fast.dali_pipelines.order import Permutation
from dune_fast.dali_pipelines.storage import Reader

logger = logging.getLogger(__name__)

TEMPERATURE = 0.07
_SPLITS = {word for words in SPLITS.values() for word in words}
_READERS = 16  # threads: labels in shards of an object store are small reads with long ways
_CHUNK = 1024
"""Queries at a time: the similarities to a whole bank need not lie in memory at once."""


class LabelError(ValueError):
    """A dataset does not say what classes its images are of."""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Images with classes: some to search among, some to classify."""

    datasets: tuple[Dataset, ...]
    """The bank and, where the dataset has validation images, the queries: as the validation images of two datasets,
    for one `ValLoader` to go through. Without: the bank alone, and each image is classified by the others."""
    labels: Tensor
    """int64 [bank + queries], indices into `classes`."""
    classes: tuple[str, ...]

    @property
    def bank(self) -> int:
        """Images to search among."""
        return len(self.datasets[0].val)


def choose(images: Images, count: int, seed: int, stream: int) -> list[int]:
    """At most `count` indices of images, in order; a function of the seed, the stream and how many there are."""
    chosen = Permutation(len(images), seed, stream)(np.arange(min(count, len(images))))
    return sorted(chosen.tolist())


def labelled(
    dataset: Dataset,
    count: int,
    seed: int,
    patience: float = 30.0,
    cure: str = "or take evaluation.knn_dataset back",
    root: str = "",
) -> Labelled:
    """Images of a dataset and their classes, the folders just below its root; says which classes it has found.

    Args:
        dataset: with root/CLASS/.../image, also below its `val_root`; or shards made of such folders.
        count: at most so many to search among, and so many to classify.
        seed: of the choice.
        patience: seconds for which a failing read of a shard is tried again.
        cure: what else to do where there are no classes, for messages.
        root: what names the folder, for messages; by default the dataset's field.

    Raises:
        LabelError: images outside of any sub-folder, or of one class alone.
        StorageError: a shard cannot be read.
    """
    root = root or f"data.datasets.{dataset.name}.root"
    splits = [images for images in (dataset.train, dataset.val) if len(images)]
    chosen = [images.select(choose(images, count, seed, i)) for i, images in enumerate(splits)]
    names, reader = [], Reader(patience)
    for images in chosen:
        for i, path in enumerate(_source_paths(images, reader)):
            name, _, rest = path.removeprefix("./").partition("/")
            if not rest or name in (".", "..", ""):
                raise LabelError(
                    f"dataset {dataset.name!r} cannot be used for k-NN: {images[i]} is in no class's folder; lay the "
                    f"images out as root/CLASS/image, the validation images too, {cure}"
                )
            names.append(name)
    classes = tuple(sorted(set(names)))
    if len(classes) < 2:
        raise LabelError(
            f"dataset {dataset.name!r} cannot be used for k-NN: all images are of one class, {classes[0]!r}; set "
            f"{root} to the folder whose sub-folders are the classes"
        )
    some = ", ".join(classes if len(classes) < 7 else [*classes[:3], "...", *classes[-2:]])
    counts = " and ".join(f"{len(images):,} images" for images in chosen)
    logger.info("k-NN on %s: %d classes in %s (%s)", dataset.name, len(classes), counts, some)
    if splits_named := [name for name in classes if name.lower() in _SPLITS]:
        logger.warning(
            "k-NN on %s: %s among the classes, the folders just below the root, looks like a split; set "
            "%s to the folder whose sub-folders are the classes, and val_root to that of the images to classify",
            dataset.name, " and ".join(splits_named), root,
        )  # fmt: skip
    index = {name: i for i, name in enumerate(classes)}
    parts = tuple(
        dataclasses.replace(dataset, name=f"{dataset.name}, {use}", val=images)
        for use, images in zip(("neighbours", "classified"), chosen, strict=False)
    )
    return Labelled(parts, torch.tensor([index[name] for name in names]), classes)


def _source_paths(images: Images, reader: Reader) -> list[str]:
    """Below the root of the folder that the images come from. Of shards, each is a read of its own."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="read-labels") as pool:
        try:
            return list(pool.map(lambda i: images.source_path(i, reader), range(len(images))))
        except BrokenImage as error:
            raise LabelError(f"the class of an image cannot be read: {error}") from error


@torch.no_grad()
def knn_predict(
    queries: Tensor, bank: Tensor, labels: Tensor, num_classes: int, k: int = 20, leave_one_out: bool = False
) -> Tensor:
    """Classes by the vote of the nearest neighbours, the one with the smaller index where scores are equal.

    Args:
        queries, bank: features [Q, D] and [N, D] of any length; they are L2-normalised here.
        labels: int64 [N], of the bank.
        num_classes: labels are below it.
        k: neighbours that vote, all there are if there are fewer.
        leave_one_out: the queries are the bank, and no image votes for itself.

    Returns:
        int64 [Q].
    """
    queries, bank = F.normalize(queries.float(), dim=-1), F.normalize(bank.float(), dim=-1)
    k = min(k, len(bank) - int(leave_one_out))
    predictions = []
    for start in range(0, len(queries), _CHUNK):
        similarity = queries[start : start + _CHUNK] @ bank.T
        if leave_one_out:
            rows = torch.arange(len(similarity), device=similarity.device)
            similarity[rows, rows + start] = -torch.inf
        nearest, indices = similarity.topk(k, dim=-1)
        scores = nearest.new_zeros(len(similarity), num_classes, dtype=torch.float64)
        scores.scatter_add_(1, labels[indices], ((nearest.double() - 1) / TEMPERATURE).exp())  # - 1: no overflow
        predictions.append(scores.argmax(-1))
    return torch.cat(predictions)
