"""Multi-HMR's head as a task of a run: people in images, as SMPL-X bodies.

The published training is of the whole model; that of the head alone on DUNE's frozen encoder is not public in all of
its parts. Here are its data flow, losses and weights, on images with people files (`heads.multihmr.folder`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.engine.config import ConfigError, RunConfig
from dune_fast.evaluate.hmr import NMS, THRESHOLD, compare_head
from dune_fast.evaluate.probe import sample
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.head import Head
from dune_fast.heads.multihmr.body_file import BodyModelError, find_body_file, how_to_get
from dune_fast.heads.multihmr.folder import ASK, Example, PeopleFolder, collate, is_flipped
from dune_fast.heads.multihmr.head import CENTERS, MultiHmrHead, place_bodies
from dune_fast.heads.multihmr.loss import LossWeights, losses
from dune_fast.heads.multihmr.smplx import BodyModel, load_body_model
from dune_fast.heads.multihmr.targets import make_targets
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.tasks.head_task import Batch, FrozenEncoder, Loss, Missing, section


@dataclass
class PeopleData:
    """`head.data` of multihmr."""

    root: str = ""
    """Folder of images with people files: train/ and, to be evaluated on, val/."""
    body_model: str = ""
    """SMPLX_NEUTRAL.npz, or its folder."""
    size: int = 448
    """S, the side of the square images in pixels; a multiple of the encoder's patch."""
    flip: bool = True
    """Whether every second image, by chance, is mirrored, with its people."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size}: give pixels above 0")


@dataclass
class HeadOptions:
    """`head.options` of multihmr; the published ones."""

    num_betas: int = 10
    """Shape coefficients, 10 or 11."""
    depth: int = 2
    """Layers of the transformer over people."""
    heads: int = 8
    head_dim: int = 32
    dim: int = 1024
    """Channels of a person's token."""
    hidden: int = 1024
    """Channels inside the layers' MLPs."""
    camera: bool = True
    """Whether patches get Fourier features of their rays."""
    nearness: bool = True
    """Whether the depth is predicted as its logarithm."""
    center: str = "head"
    """Primary keypoint: "head", "pelvis" or "nose"."""

    def __post_init__(self) -> None:
        if self.center not in CENTERS:
            raise ValueError(f"center={self.center!r}: choose one of {', '.join(CENTERS)}")
        if self.num_betas not in (10, 11) or min(self.depth, self.heads, self.head_dim, self.dim, self.hidden) < 1:
            raise ValueError("num_betas is 10 or 11, and depth, heads, head_dim, dim and hidden are above 0")


@dataclass
class PeopleLoss(LossWeights):
    """`head.loss` of multihmr: weights of the terms, and when those in the image begin."""

    start_2d: int = 100_000
    """Step from which on `j2d` and `v2d` count: the published tenth epoch of 10,000 steps."""


class MultiHmrTask:
    """A `head_task.HeadTask`.

    Args:
        cfg: the run's.
    """

    kind = "multihmr"

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.data = section(PeopleData, cfg.head.data, "head.data")
        self.options = section(HeadOptions, cfg.head.options, "head.options")
        self.weights = section(PeopleLoss, cfg.head.loss, "head.loss")
        self.train: PeopleFolder | None = None
        self.model: BodyModel | None = None
        self.shape: MultiHmrHead | None = None  # whose sizes targets are made for; its weights are not used

    def missing(self) -> list[Missing]:
        found = []
        try:
            self._folder("train")
        except DataError as error:
            place = f"head.data.root={self.data.root or '(empty)'}"
            found.append(Missing(f"images with people ({str(error).removesuffix(ASK).rstrip('. ')})", place, ASK))
        try:
            find_body_file(self._body_path())
        except BodyModelError:
            where = f"head.data.body_model={self.data.body_model or '(empty)'}"
            found.append(Missing("the body model SMPL-X", where, f"To get it, {how_to_get()}"))
        return found

    def _body_path(self) -> Path:
        if not self.data.body_model:
            raise BodyModelError(f"head.data.body_model is empty: {how_to_get()}")
        return Path(self.data.body_model).expanduser()

    def _folder(self, split: str) -> PeopleFolder:
        if not self.data.root:
            raise DataError("no folder is given")
        return PeopleFolder(Path(self.data.root).expanduser(), split, self.data.size)

    def open(self, ranks: Ranks) -> dict[str, int]:
        self.train = self._folder("train")
        self.model = load_body_model(self._body_path()).to(ranks.device)
        return {Path(self.data.root).name or "people": len(self.train)}

    def build_head(self, encoder: VisionTransformer) -> Head:
        """A new head; ConfigError if the images' size is no multiple of the encoder's patch."""
        try:
            self.shape = MultiHmrHead(
                encoder.cfg.embed_dim, self.data.size, encoder.cfg.patch_size, **asdict(self.options)
            )
        except ValueError as error:
            raise ConfigError(f"head.data.size={self.data.size}, head.options: {error}") from error
        return self.shape

    def example(self, step: int, slot: int) -> Example:
        position = step * self.cfg.train.global_batch + slot
        index, _ = sample(len(self.train), position, self.cfg.train.seed)
        return self.train.read(index, self.data.flip and is_flipped(self.cfg.train.seed, position))

    def collate(self, examples: Sequence[Example]) -> Batch:
        return collate(examples)

    def loss(self, head: Callable, encoder: FrozenEncoder, batch: Batch, step: int) -> Loss:
        with torch.no_grad():
            targets = make_targets(
                batch["people"], batch["index"], batch["slot"], batch["slots"], batch["intrinsics"], self.model,
                self.shape,
            )  # fmt: skip
        people = head(encoder(batch["image"]), batch["intrinsics"], targets.cells)
        placed = place_bodies(people, self.model, self.shape.center)
        found = losses(people, placed, targets, self.data.size, step >= self.weights.start_2d, self.weights)
        return Loss(found.pop("total"), {f"loss/{name}": term.detach() for name, term in found.items()})

    def evaluate(self, head: MultiHmrHead, encoder: FrozenEncoder, ranks: Ranks) -> dict[str, float]:
        """Metrics of `val/`, in float32; empty if there is no such folder."""
        try:
            folder = self._folder("val")
        except DataError:
            return {}
        found = compare_head(folder.files, encoder.network, head, self.model, ranks, THRESHOLD, NMS)
        return {name: value for name, value in found.items() if name != "images"}
