"""MASt3R's decoder and heads on a frozen encoder, as a task of a run: pairs of posed images with depth.

A step's pairs are taken in both orders. Data, loss and their defaults are those of MASt3R's training (Leroy et al.,
ECCV 2024); DUNE's own is not published. Every part's confidences and matches are means over the part, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.engine.config import ConfigError, RunConfig
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.head import Head
from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.heads.mast3r.loss import Mast3rLoss, Mast3rLossConfig
from dune_fast.heads.mast3r.pair_check import WHERE, check_pairs
from dune_fast.heads.mast3r.pair_folders import PairFolder, open_pairs
from dune_fast.heads.mast3r.pairs import Example, PairDataConfig, PairSource, collate
from dune_fast.heads.mast3r.training import KeptTokens, both_orders_outputs, coloured, truth
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.tasks.head_task import Batch, FrozenEncoder, Loss, Missing, section
from dune_fast.tasks.mast3r_validation import measure


@dataclass
class Mast3rOptions:
    """`head.options`; see `heads.mast3r.head.Mast3rHead`."""

    dec_dim: int = 768
    """Channels of the decoder."""
    dec_depth: int = 12
    """Its blocks of each view, at least 4."""
    dec_heads: int = 12
    """Its attention heads."""
    mlp_ratio: float = 4.0
    """Width of its MLPs over dec_dim."""
    desc_dim: int = 24
    """Channels of a descriptor."""
    layer_dims: list[int] = field(default_factory=lambda: [96, 192, 384, 768])
    """Channels of the DPT's four branches."""
    feature_dim: int = 256
    """Channels of the DPT."""
    last_dim: int = 128
    """Channels of its last convolutions."""
    two_confs: bool = True
    """Whether descriptors have a confidence of their own."""
    own_norm: bool = True
    """Whether a norm of the head's own replaces the encoder's final one, as in DUNE's version."""


class Mast3rTask:
    """A `head_task.HeadTask`.

    Args:
        cfg: the run's.
    """

    kind = "mast3r"

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.data = section(PairDataConfig, cfg.head.data, "head.data")
        self.criterion = Mast3rLoss(section(Mast3rLossConfig, cfg.head.loss, "head.loss"))
        self.options = section(Mast3rOptions, cfg.head.options, "head.options")
        n, block = self.data.n_corres, self.criterion.cfg.matching.blocksize
        if n > block and n % block:
            raise ConfigError(f"head.data.n_corres={n} is above head.loss.matching.blocksize={block}: give a multiple")
        self.kept = KeptTokens()
        self.source: PairSource | None = None
        self.validation: list[PairFolder] = []

    def missing(self) -> list[Missing]:
        found = []
        if not self.data.datasets:
            found.append(Missing("pairs of posed images with depth", "head.data.datasets is empty", WHERE))
        for part in ("datasets", "validation"):
            for name, data in getattr(self.data, part).items():
                try:
                    open_pairs(name, data)
                except DataError as error:
                    found.append(Missing(f"pairs ({error})", f"head.data.{part}.{name}.root={data.root}", WHERE))
        if self.data.validation and find_spec("cv2") is None:
            found.append(Missing("OpenCV, for the poses of the validation", "head.data.validation",
                                 "pip install 'dune-fast[heads]'"))  # fmt: skip
        return found

    def problems(self) -> list[str]:
        parts = ((self.data.datasets, True), (self.data.validation, False))
        return [
            text for part, trained_on in parts for name, data in part.items()
            for text in check_pairs(name, data, trained_on=trained_on)
        ]  # fmt: skip

    def open(self, ranks: Ranks) -> dict[str, int]:
        folders = [open_pairs(name, data) for name, data in self.data.datasets.items()]
        weights = [data.weight for data in self.data.datasets.values()]
        self.source = PairSource(folders, weights, self.data, self.cfg.train.seed, self.cfg.train.global_batch)
        self.validation = [open_pairs(name, data) for name, data in self.data.validation.items()]
        return {folder.name: len(folder) for folder in folders}

    def build_head(self, encoder: VisionTransformer) -> Head:
        patch = encoder.cfg.patch_size
        if wrong := [size for size in self.data.sizes if size[0] % patch or size[1] % patch]:
            raise ConfigError(f"head.data.sizes has {wrong}: give multiples of the encoder's patches, {patch} px")
        return Mast3rHead(encoder.cfg.embed_dim, patch, **asdict(self.options))

    def example(self, step: int, slot: int) -> Example:
        assert self.source is not None
        return self.source.example(step, slot)

    def collate(self, examples: Sequence[Example]) -> Batch:
        return collate(examples)

    def loss(self, head: Callable[..., Any], encoder: FrozenEncoder, batch: Batch, step: int) -> Loss:
        images = [coloured(batch[view]) for view in ("view1", "view2")]
        encode = partial(self.kept, encoder) if self.data.keep_tokens else lambda pixels, _: encoder(pixels)
        outputs = both_orders_outputs(head, encode, *images, batch["groups"], batch["views"])
        with torch.autocast(images[0].device.type, enabled=False):
            return Loss(*self.criterion(*truth(batch), *outputs))

    def evaluate(self, head: Head, encoder: FrozenEncoder, ranks: Ranks) -> dict[str, float]:
        found: dict[str, float] = {}
        for folder in self.validation:
            metrics = measure(head, encoder, folder, self.data, ranks)
            alone = len(self.validation) == 1
            found |= {name if alone else f"{folder.name}_{name}": value for name, value in metrics.items()}
        return found
