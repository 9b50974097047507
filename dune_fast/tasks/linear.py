"""Linear segmentation and depth by DINOv2's recipes, as tasks of a run; crops, losses and metrics are those of
`dune-fast evaluate --task segmentation | depth`.

Segmentation is the same for any number of ranks: its BatchNorm takes the moments of all of them. The depth loss is one
of a part's pixels, as in the publication, whose part is the two images of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.engine.config import ConfigError, RunConfig
from dune_fast.engine.deepspeed_engine import sum_over_ranks
from dune_fast.evaluate.crops import DepthCrop
from dune_fast.evaluate.dense import DenseTask, build_head, measure, read_pair, training_crop, with_classes
from dune_fast.evaluate.model import FrozenModel, frozen_encoder
from dune_fast.evaluate.pairs import LAYOUTS, Pairs, class_names, open_pairs
from dune_fast.evaluate.probe import RECIPES, recipe, sample
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.head import Head
from dune_fast.heads.linear.depth import WARM_UP_STEPS, depth_loss
from dune_fast.heads.linear.layers import LinearHead
from dune_fast.heads.linear.segmentation import segmentation_loss
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.tasks.head_task import Batch, FrozenEncoder, Loss, Missing, section, stack, unreadable
from dune_fast.teachers.files import cache_dir

_ASK = {
    "ade20k": "ADE20K's scene parsing benchmark, ADEChallengeData2016.zip, is on https://sceneparsing.csail.mit.edu; "
    "non-commercial research",
    "nyud": "NYU Depth v2 is on https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html; nyu_train.txt and nyu_test.txt "
    "list an image and its depth a line, as BTS's files do",
    "cityscapes": "Cityscapes is on https://www.cityscapes-dataset.com, after registration",
    "scannet": "ScanNet is on http://www.scan-net.org, after its terms of use are signed",
}
"""Layout -> where a user gets the images."""
_SHALLOW = 0.3  # metres; depths that end before it are of another unit, such as 8 bits read as millimetres
_PLAIN = "Any images of your own do: images/train, images/val and labels/ or depth/ beside them (layout: plain)"


def _check_layout(layout: str) -> None:
    if layout not in ("", *LAYOUTS):
        raise ValueError(f"layout={layout!r}; choose one of {', '.join(LAYOUTS)}, or nothing")


@dataclass
class SegmentationData:
    """`head.data` of linear_seg."""

    root: str = ""
    """Folder of the images and their labels."""
    layout: str = ""
    """"ade20k", "cityscapes", "nyud", "scannet", "plain"; empty for what the folder looks like."""
    size: int = RECIPES["segmentation"].size
    """Side of crops and windows, and short side of the images, in pixels."""
    stride: int = RECIPES["segmentation"].stride
    """Between windows, in pixels."""
    classes: int = 0
    """0 for as many as have names, the layout's, or those that the training labels have."""

    def __post_init__(self) -> None:
        _check_layout(self.layout)
        if self.size < 1 or self.stride < 1 or self.classes < 0:
            raise ValueError(f"size={self.size}, stride={self.stride}, classes={self.classes}: give pixels above 0")


@dataclass
class DepthData:
    """`head.data` of linear_depth."""

    root: str = ""
    """Folder of the images and their depths."""
    layout: str = ""
    """"nyud", "scannet", "plain"; empty for what the folder looks like."""
    depth_scale: float = 1000.0
    """Units of a depth PNG in a metre."""
    height: int = DepthCrop.height
    """Of the crops, in pixels."""
    width: int = DepthCrop.width
    """Of the crops, in pixels."""

    def __post_init__(self) -> None:
        _check_layout(self.layout)
        if self.height < 1 or self.width < 1 or not 0 < self.depth_scale < float("inf"):
            raise ValueError(f"height={self.height}, width={self.width}, depth_scale={self.depth_scale}: all above 0")


@dataclass
class LinearOptions:
    """`head.options` of both."""

    layers: int = 1
    """Blocks that are read: 1, the last, or 4."""
    max_depth: float = 10.0
    """Depth: the last bin, in metres."""


class _Linear:
    """What both tasks share, a `head_task.HeadTask` without a loss.

    Args:
        cfg: the run's.
    """

    kind: str
    _task: str
    _data: type

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.data = section(self._data, cfg.head.data, "head.data")
        self.options = section(LinearOptions, cfg.head.options, "head.options")
        if cfg.head.loss:
            raise ConfigError(f"head.loss has {', '.join(cfg.head.loss)}: the loss of {self.kind} has no options")
        self.job: DenseTask | None = None

    def missing(self) -> list[Missing]:
        place = f"head.data.root={self.data.root or '(empty)'}"
        ask = _ASK.get(self.data.layout, _PLAIN)
        try:
            self._pairs()
        except DataError as error:
            return [Missing(f"images with {self._task} ({error})", place, ask)]
        return []

    def problems(self) -> list[str]:
        try:
            self.open(Ranks())
        except ValueError as error:
            return [str(error)]
        return [text for pairs in (self.job.train, self.job.val) for text in self._problems(pairs)]

    def _problems(self, pairs: Pairs) -> list[str]:
        """Of one split."""
        return unreadable(len(pairs), lambda index: read_pair(self.job, pairs, index))

    def _pairs(self) -> tuple:
        if not self.data.root:
            raise DataError("no folder is given")
        scale = getattr(self.data, "depth_scale", 1000.0)
        return open_pairs(Path(self.data.root), self._task, self.data.layout, scale, "head.data.root")

    def open(self, ranks: Ranks) -> dict[str, int]:
        if self.job is None:  # classes may have to be counted
            self.job = with_classes(self._job(*self._pairs()), ranks)
        return {Path(self.data.root).name: len(self.job.train)}

    def _job(self, train: Any, val: Any) -> DenseTask:
        raise NotImplementedError

    def build_head(self, encoder: VisionTransformer) -> Head:
        """Weights are drawn by the run's seed, as `dune-fast evaluate` draws them."""
        if self.job is None:
            self.open(Ranks())
        head = build_head(self.job, self._model(encoder))
        if isinstance(getattr(head, "bn", None), nn.BatchNorm2d):
            head.bn = SharedBatchNorm(head.bn.num_features, eps=head.bn.eps, momentum=head.bn.momentum)
        self.blocks = head.blocks(len(encoder.blocks))
        return head

    def _model(self, encoder: VisionTransformer, dtype: torch.dtype | None = None) -> FrozenModel:
        how = {"norm": self._task == "segmentation", "layers": self.options.layers, "precision": str(dtype)}
        return frozen_encoder(self.cfg.head.encoder, encoder, dtype, how)

    def example(self, step: int, slot: int) -> dict[str, Tensor]:
        """{"image": normalised crop [3, h, w], "target": [h, w]}"""
        position = step * self.cfg.train.global_batch + slot
        image, target = training_crop(self.job, *sample(len(self.job.train), position, self.cfg.train.seed))
        return {"image": image, "target": target}

    def collate(self, examples: Sequence[dict[str, Tensor]]) -> Batch:
        return stack(examples)

    def _output(self, head: Callable[..., Tensor], encoder: FrozenEncoder, images: Tensor) -> Tensor:
        """The head's of images, with zeros around them up to a multiple of the patch."""
        patch, pads = encoder.network.cfg.patch_size, []
        for size in (images.shape[-1], images.shape[-2]):
            missing = -size % patch
            pads += [missing // 2, missing - missing // 2]
        return head(encoder(F.pad(images, pads), self.blocks))

    def evaluate(self, head: LinearHead, encoder: FrozenEncoder, ranks: Ranks) -> dict[str, float]:
        found = measure(self.job, self._model(encoder.network, encoder.dtype), head, cache_dir(), ranks)
        return {name: value for name, value in found.items() if "/" not in name}


class Segmentation(_Linear):
    """ADE20K's recipe on any images with labels."""

    kind, _task, _data = "linear_seg", "segmentation", SegmentationData

    def _job(self, train: Any, val: Any) -> DenseTask:
        how = recipe(self._task, size=self.data.size, stride=self.data.stride, seed=self.cfg.train.seed)
        names = class_names(Path(self.data.root))
        return DenseTask(self._task, train, val, how, self.options.layers, self.data.classes, names=names)

    def loss(self, head: Callable[..., Tensor], encoder: FrozenEncoder, batch: Batch, step: int) -> Loss:
        return Loss(segmentation_loss(self._output(head, encoder, batch["image"]), batch["target"]), {})


class Depth(_Linear):
    """NYUd's recipe on any images with depths."""

    kind, _task, _data = "linear_depth", "depth", DepthData

    def _job(self, train: Any, val: Any) -> DenseTask:
        nyud = train.layout == "nyud"
        crop = DepthCrop(self.data.height, self.data.width, nyud)
        how = recipe(self._task, seed=self.cfg.train.seed)
        return DenseTask(
            self._task, train, val, how, self.options.layers, max_depth=self.options.max_depth, crop=crop, eigen=nyud
        )

    def _problems(self, pairs: Pairs) -> list[str]:
        ends: list[tuple[float, float]] = []

        def read(index: int) -> None:
            depth = read_pair(self.job, pairs, index)[1]
            ends.extend((float(known.min()), float(known.max())) for known in [depth[depth > 0]] if len(known))

        found, place = unreadable(len(pairs), read), Path(pairs.files[0][1]).parent
        if not ends and not found:
            return [f"{place}: no pixel has a depth in the images that were read: 0 stands for an unknown one"]
        nearest, deepest = (min(low for low, _ in ends), max(high for _, high in ends)) if ends else (1.0, 1.0)
        if deepest < _SHALLOW or nearest > self.options.max_depth:
            found.append(
                f"{place}: depths from {nearest:.3g} to {deepest:.3g} m, and the head's end at "
                f"{self.options.max_depth:g} m: is head.data.depth_scale={pairs.depth_scale:g} units a metre right?"
            )
        return found

    def loss(self, head: Callable[..., Tensor], encoder: FrozenEncoder, batch: Batch, step: int) -> Loss:
        depth = self._output(head, encoder, batch["image"])
        return Loss(depth_loss(depth, batch["target"][:, None], step < WARM_UP_STEPS), {})


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm with the moments of all ranks' images, whose inputs need no gradient: they are a frozen network's."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert not x.requires_grad
        axes = 0, 2, 3
        total = torch.cat([x.sum(axes), x.new_tensor([x.numel() / x.shape[1]])])
        self.over_ranks(total)
        mean, count = total[:-1] / total[-1], total[-1]
        centred = x - mean[:, None, None]
        squares = centred.square().sum(axes)
        self.over_ranks(squares)
        variance = squares / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp_min(1), self.momentum)
            self.num_batches_tracked += 1
        scale = (variance + self.eps).rsqrt() * self.weight
        return centred * scale[:, None, None] + self.bias[:, None, None]

    @staticmethod
    def over_ranks(x: Tensor) -> None:
        """Sums in place; tensors without content, of an estimate of the memory, are this rank's alone."""
        if isinstance(x, FakeTensor):
            return
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            sum_over_ranks(x)
