"""Multi-HMR's head as a task of a run: images with people, the published losses, the metrics of its paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.engine.config import ConfigError, RunConfig
from dune_fast.evaluate.hmr import compare_head
from dune_fast.evaluate.probe import sample
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.head import HeadError
from dune_fast.heads.multihmr.body_file import BodyModelError, find_body_file, how_to_get
from dune_fast.heads.multihmr.folder import ASK, Example, PeopleFolder, collate, is_flipped
from dune_fast.heads.multihmr.head import MultiHmrHead, place_bodies
from dune_fast.heads.multihmr.loss import LossWeights, losses
from dune_fast.heads.multihmr.smplx import load_body_model
from dune_fast.heads.multihmr.targets import make_targets
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.tasks.head_task import Batch, FrozenEncoder, Loss, Missing, section, unreadable


@dataclass
class PeopleData:
    """`head.data` of multihmr."""

    root: str = ""
    """Folder with train/ and val/ of images and their people, see `heads.multihmr.folder`."""
    body_model: str = ""
    """SMPLX_NEUTRAL.npz, or a folder that holds it."""
    flip: bool = True
    """Whether every second image is mirrored."""


@dataclass
class MultiHmrOptions:
    """`head.options` of multihmr: arguments of `MultiHmrHead`."""

    image_size: int = 336
    num_betas: int = 10
    depth: int = 2
    heads: int = 8
    head_dim: int = 32
    dim: int = 1024
    hidden: int = 1024
    camera: bool = True
    bands: int = 16
    max_resolution: int = 64
    nearness: bool = True
    center: str = "head"


@dataclass
class MultiHmrLoss:
    """`head.loss` of multihmr."""

    weights: LossWeights = field(default_factory=LossWeights)
    start_2d: int = 100_000
    """Steps before joints and vertices in pixels count: ten epochs of 10,000 as published."""


class MultiHmrTask:
    """A `head_task.HeadTask`.

    Args:
        cfg: the run's.
    """

    kind = "multihmr"

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.data = section(PeopleData, cfg.head.data, "head.data")
        self.options = section(MultiHmrOptions, cfg.head.options, "head.options")
        self.criterion = section(MultiHmrLoss, cfg.head.loss, "head.loss")

    def missing(self) -> list[Missing]:
        found = []
        for split in ("train", "val"):
            try:
                self._folder(split)
            except DataError as error:
                what = f"images with people ({str(error).removesuffix(ASK).rstrip(' .')})"
                found.append(Missing(what, f"head.data.root={self.data.root or '(empty)'}", ASK))
                break
        try:
            find_body_file(Path(self.data.body_model or "(empty)"))
        except BodyModelError as error:
            place = f"head.data.body_model={self.data.body_model or '(empty)'}"
            what = f"the body model ({str(error).partition(how_to_get())[0].rstrip(' :')})"
            found.append(Missing(what, place, how_to_get()))
        return found

    def problems(self) -> list[str]:
        folders = [self._folder(split) for split in ("train", "val")]
        found = [text for folder in folders for text in unreadable(len(folder), folder.read)]
        try:
            load_body_model(Path(self.data.body_model))
        except BodyModelError as error:
            found.append(str(error))
        return found

    def _folder(self, split: str) -> PeopleFolder:
        return PeopleFolder(Path(self.data.root or "(empty)"), split, self.options.image_size)

    def open(self, ranks: Ranks) -> dict[str, int]:
        self.train, self.val = self._folder("train"), self._folder("val")
        self.model = load_body_model(Path(self.data.body_model)).to(ranks.device)
        return {Path(self.data.root).name: len(self.train)}

    def build_head(self, encoder: VisionTransformer) -> MultiHmrHead:
        try:
            self.head = MultiHmrHead(encoder.cfg.embed_dim, patch_size=encoder.cfg.patch_size, **vars(self.options))
        except HeadError as error:
            raise ConfigError(f"head.options: {error}") from error
        return self.head

    def example(self, step: int, slot: int) -> Example:
        position = step * self.cfg.train.global_batch + slot
        index, _ = sample(len(self.train), position, self.cfg.train.seed)
        return self.train.read(index, self.data.flip and is_flipped(self.cfg.train.seed, position))

    def collate(self, examples: Sequence[Example]) -> Batch:
        return collate(examples)

    def loss(self, head: Callable[..., Any], encoder: FrozenEncoder, batch: Batch, step: int) -> Loss:
        intrinsics = batch["intrinsics"]
        targets = make_targets(
            batch["people"], batch["index"], batch["slot"], batch["slots"], intrinsics, self.model, self.head
        )
        people = head(encoder(batch["image"]), intrinsics, cells=targets.cells)
        placed = place_bodies(people, self.model, self.head.center)
        with_2d = step >= self.criterion.start_2d
        found = losses(people, placed, targets, self.head.image_size, with_2d, self.criterion.weights)
        loss = found.pop("total")
        return Loss(loss, {f"loss/{name}": value.detach() for name, value in found.items()})

    def evaluate(self, head: MultiHmrHead, encoder: FrozenEncoder, ranks: Ranks) -> dict[str, float]:
        return compare_head(self.val.files, encoder.network, head, self.model, ranks)
