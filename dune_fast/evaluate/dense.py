"""Segmentation and depth from start to metrics: data, head, training (`evaluate.probe`), evaluation.

Segmentation is evaluated by sliding windows over the image with the short side of the recipe; depth on the whole image,
averaged with the flipped one. With `cached` both are trained and evaluated on the squares of `evaluate.extract`, whose
tokens are computed once: quick, and not the publications' protocol.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.listing import PathList
from dune_fast.evaluate.crops import DepthCrop, depth_crop, normalized, scaled, segmentation_crop, square_target
from dune_fast.evaluate.extract import extract, image_identity
from dune_fast.evaluate.metrics import EIGEN_CROP, ConfusionMatrix, DepthMetrics
from dune_fast.evaluate.model import FrozenModel, fingerprint
from dune_fast.evaluate.pairs import CLASSES, Pairs
from dune_fast.evaluate.probe import Recipe, train
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.linear.depth import MIN_DEPTH, DepthHead
from dune_fast.heads.linear.layers import Layer, LinearHead, resize
from dune_fast.heads.linear.segmentation import IGNORED, SegmentationHead

logger = logging.getLogger(__name__)

_CLASS_CHUNK = 32  # logits of so many classes at full size at a time
_WINDOWS = 8  # at a time


@dataclass(frozen=True)
class DenseTask:
    """What is evaluated, and how."""

    task: str
    train: Pairs
    val: Pairs
    recipe: Recipe
    layers: int = 1
    classes: int = 0
    """Segmentation: 0 for as many as have names, the layout's, or those that the training labels have."""
    max_depth: float = 10.0
    """Metres; deeper pixels do not count in the metric."""
    crop: DepthCrop = DepthCrop()
    eigen: bool = False
    """Depth: whether the Eigen crop of NYUd's images counts alone."""
    cached: int = 0
    """Side of the squares whose tokens are computed once; 0: by the recipe."""
    threads: int = 4
    names: tuple[str, ...] = ()
    """Segmentation: of the classes, where the dataset says them; the head keeps them."""


def run_dense(job: DenseTask, model: FrozenModel, cache: Path, ranks: Ranks) -> tuple[dict[str, float], LinearHead]:
    """Trains a head, or goes on with it, and evaluates it.

    Args:
        job: what to do.
        model: reads normalised tokens for segmentation, those without the final norm for depth.
        cache: folder for states and features.
        ranks: all of them call this.

    Returns:
        The metrics, the same on every rank; and the head.

    Raises:
        DataError: images or targets that cannot be read, labels that no class has.
        ValueError: a batch that ranks cannot share.
    """
    job = with_classes(job, ranks)
    if job.task == "depth" and job.max_depth <= MIN_DEPTH:
        raise ValueError(f"--max-depth is {job.max_depth}: give metres, above {MIN_DEPTH}")
    head = build_head(job, model).to(ranks.device)
    sources = [
        *image_identity([PathList(file for file, _ in job.train.files)]),
        *image_identity([PathList(target for _, target in job.train.files)]),
    ]
    values = {
        "format": 1, "weights": model.weights_sha256, "reading": model.reading, "recipe": job.recipe,
        "classes": job.classes, "max_depth": job.max_depth, "crop": job.crop, "cached": job.cached, "task": job.task,
        "layout": job.train.layout, "depth_scale": job.train.depth_scale, "images": sources,
    }  # fmt: skip
    state = cache / "probes" / f"{fingerprint(values)[:24]}.pt"
    if job.cached:
        squares = _Squares(job, model, job.train, cache, ranks)
        train(head, job.task, job.recipe, len(job.train), None, None, ranks, state, squares)
    else:
        train(
            head, job.task, job.recipe, len(job.train), lambda *a: training_crop(job, *a), model.padded, ranks, state,
            threads=job.threads,
        )  # fmt: skip
    return measure(job, model, head.eval(), cache, ranks), head


def measure(job: DenseTask, model: FrozenModel, head: LinearHead, cache: Path, ranks: Ranks) -> dict[str, float]:
    """The metrics of a head, in evaluation mode, on the validation images; arguments as of `run_dense`."""
    metrics = ConfusionMatrix(job.classes, ranks.device) if job.task == "segmentation" else DepthMetrics(ranks.device)
    for prediction, target in _predictions(job, model, head, cache, ranks):
        if isinstance(metrics, ConfusionMatrix):
            metrics.add(prediction, target)
        else:
            window = EIGEN_CROP if job.eigen and target.shape == (480, 640) else ...
            metrics.add(prediction[window], target[window], job.max_depth)
    ranks.add(metrics.counts if isinstance(metrics, ConfusionMatrix) else metrics.sums)
    return metrics.result()


def with_classes(job: DenseTask, ranks: Ranks) -> DenseTask:
    """The same with the number of classes: the layout's, or counted. ValueError for segmentation with less than 2."""
    classes = job.classes or len(job.names) or CLASSES.get(job.train.layout, 0)
    if job.task != "segmentation":
        return replace(job, classes=classes)
    classes = classes or count_classes(job.train, ranks)
    if classes < 2:
        raise ValueError(f"there are labels of {classes} class: 2 are needed; give their number, or look at the data")
    return replace(job, classes=classes)


def build_head(job: DenseTask, model: FrozenModel) -> LinearHead:
    """A head with initial weights that are a function of the recipe's seed."""
    how = {"patch_size": model.patch_size, "layers": job.layers, "projector": model.reading.get("projector", "")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.recipe.seed)
        if job.task == "depth":
            return DepthHead(
                model.channels, with_cls=model.has_cls, max_depth=job.max_depth, cls_width=model.cls_channels, **how
            )
        windows = {"window": job.recipe.size, "stride": job.recipe.stride}
        if job.cached:
            windows = {"window": job.cached, "stride": job.cached}
        return SegmentationHead(model.channels, job.classes, names=job.names, **windows, **how)


def count_classes(pairs: Pairs, ranks: Ranks) -> int:
    """One more than the largest label of all images."""
    largest = -1
    with ranks.progress("counting classes", len(pairs)) as progress:
        for index in range(len(pairs)):
            labels = pairs.read(index)[1]
            known = labels[labels != IGNORED]
            largest = max(largest, int(known.max()) if known.numel() else -1)
            progress.advance(1)
    return largest + 1


def read_pair(job: DenseTask, pairs: Pairs, index: int) -> tuple[Tensor, Tensor]:
    """See `Pairs.read`; DataError for a label that no class has, which a GPU would only say as a device assertion."""
    image, target = pairs.read(index)
    if job.task == "segmentation":
        wrong = target[(target != IGNORED) & ((target < 0) | (target >= job.classes))]
        if wrong.numel():
            raise DataError(
                f"{pairs.files[index][1]} has the label {int(wrong.max())}; there are {job.classes} classes from 0 "
                f"(layout {pairs.layout}), and {IGNORED} for none: correct the number of classes or the layout"
            )
    return image, target


def training_crop(job: DenseTask, index: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Crop [3, h, w] and target [h, w] of a training image."""
    image, target = read_pair(job, job.train, index)
    if job.task == "segmentation":
        return segmentation_crop(image, target, job.recipe.size, random)
    return depth_crop(image, target, job.crop, random)


def _predictions(
    job: DenseTask, model: FrozenModel, head: LinearHead, cache: Path, ranks: Ranks
) -> Iterator[tuple[Tensor, Tensor]]:
    """(classes or depth, target) of each validation image of this rank, [H, W] each."""
    squares = _Squares(job, model, job.val, cache, ranks) if job.cached else None
    for index in ranks.share("evaluating", len(job.val)):
        with torch.no_grad():
            if squares is not None:
                layers, targets = squares([index])
                output, target = resize(head.from_layers(layers), targets.shape[-2:])[0], targets[0]
                prediction = output.argmax(0) if job.task == "segmentation" else output[0]
            else:
                image, target = read_pair(job, job.val, index)
                if job.task == "segmentation":
                    logits = window_logits(image, model, head, ranks.device)
                    prediction = resized_argmax(logits, target.shape)
                else:
                    prediction = flip_averaged_depth(image, model, head, ranks.device)
        yield prediction, target.to(ranks.device)


def windows(length: int, size: int, stride: int) -> list[int]:
    """Where windows begin along one side of an image: every `stride` px, the last one moved back into the image."""
    count = max(length - size + stride - 1, 0) // stride + 1
    return [max(min(i * stride + size, length) - size, 0) for i in range(count)]


def window_logits(image: Tensor, model: FrozenModel, head: SegmentationHead, device: torch.device) -> Tensor:
    """Logits [1, classes, h, w] of the image whose short side is scaled to a window: means where windows overlap.

    Args:
        image: uint8 [3, H, W].
    """
    x = normalized(scaled(image, head.window)[0]).to(device)
    height, width = x.shape[-2:]
    tops, lefts = (windows(length, head.window, head.stride) for length in (height, width))
    places = [(t, s) for t in tops for s in lefts]
    size = min(head.window, height), min(head.window, width)
    total, count = None, x.new_zeros(1, 1, height, width)
    for start in range(0, len(places), _WINDOWS):
        chosen = places[start : start + _WINDOWS]
        crops = torch.stack([x[:, t : t + size[0], s : s + size[1]] for t, s in chosen])
        logits = resize(head.from_layers(model.padded(crops)), size)
        total = x.new_zeros(1, logits.shape[1], height, width) if total is None else total
        for part, (t, s) in zip(logits, chosen, strict=True):
            total[0, :, t : t + size[0], s : s + size[1]] += part
            count[:, :, t : t + size[0], s : s + size[1]] += 1
    return total / count


def resized_argmax(logits: Tensor, size: Sequence[int]) -> Tensor:
    """The class with the largest logit after a bilinear resize, int64 [*size]; a few classes at a time."""
    best = found = None
    for start in range(0, logits.shape[1], _CLASS_CHUNK):
        value, index = resize(logits[:, start : start + _CLASS_CHUNK], tuple(size))[0].max(0)
        if best is None:
            best, found = value, index
        else:
            better = value > best
            best, found = torch.where(better, value, best), torch.where(better, index + start, found)
    return found


def flip_averaged_depth(image: Tensor, model: FrozenModel, head: DepthHead, device: torch.device) -> Tensor:
    """Depth [H, W] in metres of an image uint8 [3, H, W], the mean of its own and that of its mirror image."""
    x = normalized(image).to(device)[None]
    depths = []
    for each in (x, x.flip(-1)):
        depth = head.from_layers(model.padded(each)).clamp(MIN_DEPTH, head.max_depth)
        depths.append(resize(depth, image.shape[-2:])[0, 0])
    return (depths[0] + depths[1].flip(-1)) / 2


class _Squares:
    """Tokens and targets of squares, in memory: indices -> layers, targets [B, S, S]."""

    def __init__(self, job: DenseTask, model: FrozenModel, pairs: Pairs, cache: Path, ranks: Ranks) -> None:
        if job.layers > 1:
            raise ValueError("--cached keeps the tokens of one block: leave --layers out")
        with_cls = job.task == "depth" and model.has_cls
        images = [PathList(file for file, _ in pairs.files)]
        found = extract(
            model, images, job.cached, ["patch", "cls"] if with_cls else ["patch"], cache=cache / "features",
            dtype="fp16", batch=job.recipe.batch, ranks=ranks, title=f"features of {model.name}",
        )  # fmt: skip
        self.patch, self.seen = found.whole("patch")
        self.cls = found.whole("cls")[0] if with_cls else None
        if not self.seen.all():
            broken = pairs.files[int((~self.seen).nonzero()[0])][0]
            raise ValueError(f"{broken} cannot be decoded: take it out of the dataset")
        self.targets = torch.stack([square_target(read_pair(job, pairs, i)[1], job.cached) for i in range(len(pairs))])
        self.device = ranks.device

    def __call__(self, indices: list[int]) -> tuple[list[Layer], Tensor]:
        patch = self.patch[indices].to(self.device).float().permute(0, 3, 1, 2)
        cls = None if self.cls is None else self.cls[indices].to(self.device).float()
        return [(patch, cls)], self.targets[indices].to(self.device)
