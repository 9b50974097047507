"""What a run trains: the one interface between `Trainer` and a distillation or a task head.

The run has ranks, folder, device, precision, DeepSpeed's engine, schedule of the optimizer, checkpoints, guard, log and
the loop. A task has the data, the network, and the way from a batch to a loss. The run calls it in this order:

    check                      before the folder is touched
    checkpoint_bytes, fit      while the folder is opened: what the run will take
    build -> module            data and network; the run puts DeepSpeed around the module and hands that to `use`
    resume                     what a checkpoint has of the task, in a run that goes on
    describe, record, work     once, on rank 0
    batches                    of this rank, from any step on
    begin, split, forward      a step: what comes before it, the parts of its batch, each part's loss
    stepped, readings          after a step; when the log is written
    state, about               what a checkpoint keeps of the task
    export                     at the end
    close                      in any case
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dune_fast.distill.step import StepOutput
from dune_fast.engine.config import RunConfig
from dune_fast.engine.deepspeed_engine import Engine
from dune_fast.engine.guards import Names
from dune_fast.engine.memory import Fit


class Work(NamedTuple):
    """What the training of an image costs, for rates."""

    flops: int | None
    """Of one image in a training step, the mean over the run; None if not known."""
    stages: tuple[tuple[int, float], ...] = ()
    """See `metrics.Workload.stages`."""


class Place(Protocol):
    """What a task sees of the run that it belongs to; the `Trainer` has it."""

    cfg: RunConfig
    run_dir: Path
    rank: int
    world_size: int
    hosts: list[str]
    """Of every rank."""
    device: torch.device
    dtype: torch.dtype | None
    """Of products under autocast; None for float32."""
    fit: Fit | None
    """An estimate of what a step takes of the smallest device's memory; None where there is none."""
    evaluate: Any
    """`trainer.Evaluation`, or None."""
    engine: Engine
    """After `build`."""
    step: int
    """Finished steps, after `build`."""


class Task(Protocol):
    """See the head of this file. All ranks call everything, unless it says otherwise."""

    names: Names
    """What the guard's numbers stand for, without `parameters`; after `build`."""
    waited_s: float
    """Seconds that the run has waited for batches."""

    def check(self) -> None:
        """ValueError if something that the task needs is missing."""

    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint; rank 0 calls it."""

    def fit(self, ranks: int, available: int, low_precision: bool, parts: int | None = None) -> Fit | None:
        """See `memory.fit`; None if the task estimates nothing for a given number of parts."""

    def build(self, run: Place, resume_step: int | None) -> nn.Module:
        """Opens data and network.

        Args:
            run: what is known of it before its engine.
            resume_step: of the checkpoint whose weights will follow; None at the start.

        Returns:
            What is trained: its trainable parameters, frozen ones and buffers go into checkpoints.
        """

    def use(self, module: Engine) -> None:
        """Takes the module back, wrapped; `forward` calls it from now on."""

    def resume(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any], allowed: bool) -> None:
        """Takes back `state` and `about`.

        Args:
            tensors: all small tensors of the checkpoint.
            about: the run's small state; from an older version, some of it may be missing.
            allowed: whether a run may go on with other data (`train.allow_config_change`).

        Raises:
            ConfigError: the data or what is frozen have changed.
        """

    def describe(self) -> None:
        """Says in a few lines what is trained, on what, where; rank 0 calls it."""

    def record(self) -> dict[str, Any]:
        """What `run.json` keeps of this start; rank 0 calls it."""

    def work(self) -> Work:
        """What a step costs; rank 0 calls it."""

    def batches(self, step: int, wanted: Callable[[float], bool]) -> Iterator[Any]:
        """This rank's batches from a step on, each a pure function of configuration, data and step.

        `wanted` is asked several times a second while the run waits, with the seconds that it has waited; False, or
        what it raises, ends the batches.
        """

    def begin(self, step: int, batch: Any) -> None:
        """Before a step, counted from 0."""

    def split(self, batch: Any) -> Sequence[Any]:
        """`train.accumulation` parts of a batch, one backward pass each."""

    def forward(self, part: Any, step: int) -> StepOutput:
        """Loss of a part. Nothing may be read by the host."""

    def live(self) -> Sequence[Tensor]:
        """What `forward` changes beside gradients: a step that is skipped gives it back its values from before."""

    def stepped(self, metrics: Mapping[str, Tensor]) -> None:
        """After a step, with this rank's metrics."""

    def readings(self, step: int) -> dict[str, float]:
        """What is logged beside the metrics after so many finished steps; it may wait for the device."""

    def state(self) -> dict[str, Tensor]:
        """Whole small tensors for a checkpoint, the same on every rank."""

    def about(self) -> dict[str, Any]:
        """JSON for a checkpoint."""

    def export(self, module: nn.Module, raw: bool) -> None:
        """Writes the trained weights into the run's folder; rank 0 calls it.

        Args:
            module: as `build` returned it, with whole weights.
            raw: whether these are the weights themselves in a run that exports their average, too.
        """

    def finish(self) -> None:
        """After the export."""

    def close(self) -> None:
        """Ends threads; what was closed may be closed again."""
