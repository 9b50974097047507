"""A head's run from the configuration to `head.safetensors`, its evaluation on the way, and what a head needs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dune_fast.dali_pipelines.datasets import Dataset
from dune_fast.engine.config import RunConfig
from dune_fast.engine.run_state import FINISHED, write_state
from dune_fast.engine.trainer import Trainer
from dune_fast.evaluate.live_report import LiveReport
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.files import load_head
from dune_fast.heads.head import check_encoder
from dune_fast.tasks.head_task import Missing
from dune_fast.tasks.training import HeadTraining

logger = logging.getLogger(__name__)


class _StoppedError(Exception):
    """The run has been asked to stop: what has been evaluated so far is of no use."""


@dataclass(frozen=True)
class RunRanks(Ranks):
    """The ranks of a run that goes on: it may be asked to stop, and its watchdog wants to hear from them."""

    trainer: Any = None

    def share(self, title: str, count: int) -> Iterator[int]:
        """See `Ranks.share`. Ranks go through the same number of rounds, in which they agree on whether to stop."""
        rounds = math.ceil(count / self.size)
        for i in range(rounds):
            self.trainer.watchdog.at(f"evaluation after step {self.trainer.step}, {title}, {i + 1} of {rounds}")
            if self.trainer.stop.now():
                raise _StoppedError
            if (index := i * self.size + self.rank) < count:
                yield index
        self.trainer.watchdog.at(f"evaluation after step {self.trainer.step}, sums of {title}")


class HeadEvaluation:
    """What `Trainer` calls every `evaluation.every` steps of a head's run."""

    def check(self, datasets: Sequence[Dataset]) -> None:
        """The task has looked at its data already."""

    def __call__(self, trainer: Trainer) -> dict[str, float] | None:
        """`val/<metric>`: the task's own; None if a signal broke it off. All ranks call it."""
        training = trainer.task
        with trainer.engine.evaluated_weights() as module:
            head = type(training.module)(**training.module.options())
            head.load_state_dict(module.state_dict())
        head.to(trainer.device).eval().requires_grad_(False)
        ranks = RunRanks(trainer.rank, trainer.world_size, trainer.device, trainer)
        try:
            found = training.task.evaluate(head, training.encoder, ranks)
        except _StoppedError:
            return None
        return {f"val/{name}": value for name, value in found.items()}


def train_head(cfg: RunConfig, rank: int) -> int:
    """Trains a head, or goes on with it; returns the exit status."""
    trainer = Trainer(cfg, HeadEvaluation(), HeadTraining(cfg))
    trainer.run()
    if rank == 0:
        LiveReport(trainer.run_dir).write(finished=not trainer.stopped)
    if rank == 0 and not trainer.stopped:
        write_state(Path(cfg.output_dir), FINISHED, cfg.steps, cfg.steps)
        logger.info("done: %s holds the head; in Python dune_fast.load_head(%r)", cfg.output_dir, cfg.output_dir)
    return 0


def needs(cfg: RunConfig) -> list[Missing]:
    """What the training of a head needs and does not find: its data, the encoder, the weights that it starts from."""
    training, found = HeadTraining(cfg), []
    place = f"head.encoder={cfg.head.encoder}"
    try:
        network = training.network
    except ValueError as error:
        found.append(Missing(f"the encoder ({error})", place, "Any encoder that `dune-fast distill` has trained does"))
        network = None
    if cfg.head.weights:
        place = f"head.weights={cfg.head.weights}"
        try:
            head = load_head(cfg.head.weights)
            if network is not None and head.kind == cfg.head.kind and not head.projector:
                check_encoder(head, network)
        except ValueError as error:
            found.append(Missing(f"the head to start from ({error})", place, "Leave it out for drawn weights"))
    return found + training.task.missing()


def doubts(cfg: RunConfig) -> list[str]:
    """What is wrong or doubtful where nothing is missing: the head is built without content, some examples are read."""
    training = HeadTraining(cfg)
    try:
        training.checkpoint_bytes()
    except ValueError as error:
        return [str(error), *training.task.problems()]
    return training.task.problems()
