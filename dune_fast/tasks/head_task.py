"""What a kind of head gives to be trained. The run gives all the rest: ranks, checkpoints, schedule, guards, log.

    examples (host threads) -> collate -> device -> loss(head, encoder, batch) -> backward -> update

A class of this protocol is made of the run's configuration, and its constructor is cheap: it reads `cfg.head` and
raises ConfigError for options that make no sense; it reads no data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.engine.config_sections import ConfigError
from dune_fast.engine.overrides import first_line
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.head import Head
from dune_fast.heads.tokens import BlockTokens, EncoderTokens, encode
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.teachers.config import IMAGENET_MEAN, IMAGENET_STD

T = TypeVar("T")

Batch = dict[str, Any]
"""Name -> tensors, or whatever else a task collates; the run moves tensors to the device, in lists and dictionaries
too."""


class Missing(NamedTuple):
    """Something that a task needs and that is not there."""

    what: str
    """e.g. "ADE20K, training images"."""
    where: str
    """Field of the configuration and the place where it was looked for, e.g. "head.data.root=/data/ade20k/images"."""
    ask: str
    """Where a user gets it, and under which terms: a sentence."""


class Loss(NamedTuple):
    """Of one part of a rank's batch."""

    loss: Tensor
    """A scalar with gradient: a mean over the part. Parts of all ranks count the same, as under data parallelism."""
    metrics: dict[str, Tensor]
    """Detached scalars on the device by name, without "loss": they are averaged over parts and ranks, and logged."""
    each: Tensor | None = None
    """The loss of every example, detached [B], where the task knows it: a step that is not finite then names them."""


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder whose weights stay what they are; its products run in the run's precision."""

    network: VisionTransformer
    """In evaluation mode, on the device, without gradients."""
    dtype: torch.dtype | None = None
    """Of the products under autocast; None for float32."""

    def __call__(self, images: Tensor, blocks: Collection[int] = ()) -> EncoderTokens:
        """Tokens without gradient, in float32.

        Args:
            images: [B, 3, H, W], normalised with ImageNet's mean and standard deviation, whatever the encoder's are.
            blocks: see `heads.tokens.encode`.
        """
        network = self.network
        if (own := (*network.mean, *network.std)) != (*IMAGENET_MEAN, *IMAGENET_STD):
            shift, scale, mean, std = images.new_tensor([*IMAGENET_MEAN, *IMAGENET_STD, *own]).view(4, 3, 1, 1)
            images = (images * scale + shift - mean) / std
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            found = encode(network, images, blocks)
        kept = {i: BlockTokens(*_float(part)) for i, part in found.blocks.items()}
        return EncoderTokens(*_float(found.last), found.grid, kept)


def _float(part: BlockTokens) -> list[Tensor | None]:
    return [None if x is None else x.float() for x in part]


class HeadTask(Protocol):
    """One kind of head's training.

    `cfg.head` is an `engine.config_sections.HeadConfig`; `section` reads its free parts into a dataclass of the task's
    own, e.g. `section(PairData, cfg.head.data, "head.data")`. Schedule and optimizer are `cfg.optimizer`.
    """

    kind: str
    """A key of `TASKS`."""

    def missing(self) -> list[Missing]:
        """What of the data (files, folders, packages) is not there; looked for, not read. A run starts if it is empty;
        `dune-fast heads check` prints it."""

    def problems(self) -> list[str]:
        """What is wrong or doubtful about data that are there, a sentence each: some examples are read.

        `dune-fast heads check` prints it; a run does not ask.
        """

    def open(self, ranks: Ranks) -> dict[str, int]:
        """Opens the data; data set -> number of training examples. All ranks call it. A run that goes on must find the
        same."""

    def build_head(self, encoder: VisionTransformer) -> Head:
        """The head on this encoder, by `cfg.head.options`, drawn from torch's generator, which the run has seeded.

        `open` has been called, but for a count of parameters. Parameters that no loss reaches are frozen here.
        """

    def example(self, step: int, slot: int) -> Any:
        """A training example, on the host: a pure function of (`cfg.train.seed`, step, slot) and the data.

        Called from several threads, ahead of the step.

        Args:
            step: of the run, from 0.
            slot: place in the global batch, 0 to `cfg.train.global_batch` - 1; which rank takes it does not matter.

        Raises:
            DataError: a file that cannot be read; the run saves and stops.
        """

    def collate(self, examples: Sequence[Any]) -> Batch:
        """One part of a rank's batch of its examples, on the host; `stack` serves most tasks."""

    def loss(self, head: Callable[..., Any], encoder: FrozenEncoder, batch: Batch, step: int) -> Loss:
        """Loss of a part.

        Args:
            head: takes what the head's `forward` takes; it may be the head or DeepSpeed around it.
            encoder: tokens of images.
            batch: of `collate`, on the device.
            step: of the run.
        """

    def evaluate(self, head: Head, encoder: FrozenEncoder, ranks: Ranks) -> dict[str, float]:
        """The task's own metrics on its validation examples, the same on every rank; empty if there are none.

        All ranks call it every `evaluation.every` steps and after the last one. They share the examples out by
        `for index in ranks.share("evaluating", count)`, which also ends it if the run is to stop, and add up by
        `ranks.add(sums)`. The head is a copy, in evaluation mode.
        """


def section(kind: type[T], values: Mapping[str, Any], name: str) -> T:
    """A free part of `cfg.head` as a dataclass of the task's own.

    Args:
        kind: the dataclass; types are checked and defaults filled in as for the whole configuration.
        values: e.g. `cfg.head.data`.
        name: for messages, e.g. "head.data".

    Raises:
        ConfigError: a field that there is not, or a value of another type.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), dict(values)))
    except (OmegaConfBaseException, ValueError) as error:
        fields = ", ".join(f.name for f in dataclasses.fields(kind))
        raise ConfigError(f"{name}: {first_line(error)}; its fields are {fields}") from None


def unreadable(count: int, read: Callable[[int], Any], most: int = 20) -> list[str]:
    """The sentences of those of `most` examples, evenly spread over `count`, that `read` raises a DataError for."""
    found = []
    for index in sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)} if count else ()):
        try:
            read(index)
        except DataError as error:
            found.append(str(error))
    return found


def stack(examples: Sequence[Mapping[str, Any]]) -> Batch:
    """Examples of the same names: tensors and numbers are stacked, [B, ...]; everything else becomes a list."""
    names = examples[0].keys()
    rows = {name: [example[name] for example in examples] for name in names}
    return {
        name: torch.stack(row) if isinstance(row[0], Tensor)
        else torch.tensor(row) if isinstance(row[0], bool | int | float) else row
        for name, row in rows.items()
    }  # fmt: skip
