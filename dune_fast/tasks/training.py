"""The training of a head as a run's task: a frozen encoder, examples read ahead by threads, the head on the engine."""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from dune_fast.distill.step import PerImage, StepOutput
from dune_fast.engine.config import ConfigError, RunConfig
from dune_fast.engine.deepspeed_engine import Engine
from dune_fast.engine.guards import Names
from dune_fast.engine.memory import ADAM_BYTES, SPARE, Fit
from dune_fast.engine.run_folder import refuse_other_images
from dune_fast.engine.same_ranks import refuse_differences
from dune_fast.engine.task import Place, Work
from dune_fast.evaluate.model import tensors_sha256
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.files import FILE, load_head, save_head
from dune_fast.heads.head import Head, check_encoder
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.load import load_encoder
from dune_fast.tasks import TASKS, memory
from dune_fast.tasks.head_task import Batch, FrozenEncoder, HeadTask, Missing

logger = logging.getLogger(__name__)

RAW = "head_raw.safetensors"
"""The weights themselves, where `head.safetensors` has their average."""
_LOOK_SECONDS = 0.2  # after which a run that waits for examples is asked whether it still wants them


def head_task(cfg: RunConfig) -> HeadTask:
    """The task of `cfg.head.kind`. ConfigError for options that make no sense."""
    module, _, name = TASKS[cfg.head.kind].partition(":")
    return getattr(import_module(module), name)(cfg)


def missing_sentence(missing: Sequence[Missing]) -> str:
    """What is missing, and where to ask."""
    return "; ".join(f"{what}: not found at {where}. {ask}" for what, where, ask in missing)


@dataclass(frozen=True)
class Part:
    """What one backward pass takes."""

    positions: Tensor
    """int64 [B], global: step * global_batch + slot."""
    batch: Batch


@dataclass(frozen=True)
class HeadBatch:
    """One rank's examples of one step."""

    positions: Tensor
    """int64 [B], in the order of the parts."""
    dataset: Tensor
    """int64 [B], zeros."""
    group: Tensor
    """int64 [B], zeros."""
    parts: list[Part]


class HeadTraining:
    """An `engine.task.Task`: a head, whose encoder stays what it is and outside of the checkpoints.

    Args:
        cfg: the run's.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg, self.task = cfg, head_task(cfg)
        self.waited_s = 0.0
        self._at_close = ExitStack()

    @functools.cached_property
    def network(self) -> VisionTransformer:
        """The encoder, float32, frozen."""
        return load_encoder(self.cfg.head.encoder).eval().requires_grad_(False)

    def check(self) -> None:
        if missing := self.task.missing():
            raise ConfigError(f"the data of head.kind={self.cfg.head.kind} are incomplete: {missing_sentence(missing)}")

    def checkpoint_bytes(self) -> int:
        with torch.device("meta"):
            head = self.task.build_head(self.network)
        values = 4 + ADAM_BYTES + (4 if self.cfg.train.ema else 0)
        return values * sum(p.numel() for p in head.parameters() if p.requires_grad)

    def fit(self, ranks: int, available: int, low_precision: bool, parts: int | None = None) -> Fit | None:
        """The fewest parts that fit, by examples of the data; None for a given number of parts: it is taken as it is.

        One rank calls it.
        """
        if parts is not None:
            return None
        found = memory.fit(
            self.cfg, head_task(self.cfg), self.network, ranks, available, low_precision, torch.cuda.is_available()
        )
        logger.info("train.accumulation=0: %d examples a step and device, %s", found.images, found)
        if not found.fits:
            logger.warning(
                "by this estimate less than %.0f %% of the memory is left: take more devices, deepspeed.zero_stage=2, "
                "smaller images or a smaller head", 100 * SPARE,
            )  # fmt: skip
        return found

    def build(self, run: Place, resume_step: int | None) -> nn.Module:
        self.run = run
        self.counts = self.task.open(Ranks(run.rank, run.world_size, run.device))
        self.encoder_sha256 = tensors_sha256(self.network)
        found = {f"examples of {name}": count for name, count in self.counts.items()}
        found["SHA-256 of head.encoder's weights"] = self.encoder_sha256
        refuse_differences(found, run.hosts, "Show all machines the same data and the same encoder")
        self.encoder = FrozenEncoder(self.network.to(run.device), run.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.cfg.train.seed)
            head = self.task.build_head(self.network)
        check_encoder(head, self.network)
        self.started_from = ""
        if resume_step is None and self.cfg.head.weights:
            self.started_from = start_from(head, self.cfg.head.weights)
        self.names = Names([self.cfg.head.kind], [", ".join(self.counts)], row="head")
        if run.device.type == "cuda" and self.cfg.head.tf32:
            self._at_close.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("high")
        self.module = head.to(run.device).train()
        return self.module

    def use(self, module: Engine) -> None:
        self.engine = module

    def resume(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any], allowed: bool) -> None:
        refuse_other_images(about["images"], self.counts, allowed)
        if (saved := about["encoder_sha256"]) != self.encoder_sha256:
            raise ConfigError(
                f"head.encoder={self.cfg.head.encoder} has other weights (SHA-256 {self.encoder_sha256[:12]}) than the "
                f"encoder that this head has been trained on ({saved[:12]}): give that one, or start a new run with "
                "another name=..."
            )

    def describe(self) -> None:
        cfg, run = self.cfg, self.run
        trained = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        frozen, counts = sum(p.numel() for p in self.network.parameters()), self.counts.items()
        logger.info(
            "%s: a %s head of %.1f M parameters on the frozen encoder %s of %.1f M; %s", cfg.name, cfg.head.kind,
            trained / 1e6, cfg.head.encoder, frozen / 1e6, ", ".join(f"{n} examples of {name}" for name, n in counts),
        )  # fmt: skip
        logger.info(
            "%d steps of %d examples on %d x %s, ZeRO %d, %s encoder; results in %s", cfg.steps, cfg.train.global_batch,
            run.world_size, run.device.type, run.engine.zero_stage, "bf16" if run.dtype else "fp32", run.run_dir,
        )  # fmt: skip
        if self.started_from:
            logger.info("%s", self.started_from)

    def record(self) -> dict[str, Any]:
        return {"encoder": {"from": self.cfg.head.encoder, "sha256": self.encoder_sha256}}

    def work(self) -> Work:
        """Operations are not counted."""
        return Work(None)

    def batches(self, step: int, wanted: Callable[[float], bool]) -> Iterator[HeadBatch]:
        cfg, run = self.cfg, self.run
        share = cfg.train.global_batch // run.world_size
        first, count = run.rank * share, cfg.train.accumulation
        # part p has every `count`-th example from the p-th on, as in `engine.accumulation.split`
        slots = [first + at for part in range(count) for at in range(part, share, count)]
        pool = ThreadPoolExecutor(cfg.head.threads, thread_name_prefix="examples")
        self._at_close.callback(pool.shutdown, wait=False, cancel_futures=True)
        waiting: deque[list[Future]] = deque()
        for ahead in range(step, cfg.steps + cfg.head.ahead):
            if ahead < cfg.steps:
                waiting.append([pool.submit(self.task.example, ahead, slot) for slot in slots])
            if ahead - step < cfg.head.ahead or not waiting:
                continue
            examples = self._taken(waiting.popleft(), wanted)
            if examples is None:
                return
            yield self._batch(ahead - cfg.head.ahead, slots, examples)

    def _taken(self, futures: list[Future], wanted: Callable[[float], bool]) -> list[Any] | None:
        """Their results; None if the run does not want them any more."""
        began, examples = time.monotonic(), []
        try:
            for future in futures:
                while True:
                    try:
                        examples.append(future.result(timeout=_LOOK_SECONDS))
                        break
                    except NotYet:
                        if future.done():
                            raise  # the example's own
                        if not wanted(time.monotonic() - began):
                            return None
        finally:
            self.waited_s += time.monotonic() - began
        return examples

    def _batch(self, step: int, slots: list[int], examples: list[Any]) -> HeadBatch:
        device, size = self.run.device, len(slots) // self.cfg.train.accumulation
        positions = (torch.tensor(slots) + step * self.cfg.train.global_batch).to(device)
        parts = [
            Part(at, moved(self.task.collate(examples[i * size : (i + 1) * size]), device))
            for i, at in enumerate(positions.split(size))
        ]
        return HeadBatch(positions, torch.zeros_like(positions), torch.zeros_like(positions), parts)

    def begin(self, step: int, batch: HeadBatch) -> None:
        """Nothing."""

    def split(self, batch: HeadBatch) -> Sequence[Part]:
        return batch.parts

    def forward(self, part: Part, step: int) -> StepOutput:
        loss, metrics, each = self.task.loss(self.engine, self.encoder, part.batch, step)
        losses = loss.detach().expand(len(part.positions)) if each is None else each.detach()
        losses = losses.float()[None]  # [1, B]
        return StepOutput(loss, {"loss": loss.detach(), **metrics}, PerImage(losses, losses.isfinite()))

    def live(self) -> Sequence[Tensor]:
        return list(self.module.buffers())

    def stepped(self, metrics: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def readings(self, step: int) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Tensor]:
        return {}

    def about(self) -> dict[str, Any]:
        return {"images": self.counts, "encoder_sha256": self.encoder_sha256}

    def export(self, module: nn.Module, raw: bool) -> None:
        assert isinstance(module, Head)
        save_head(module, self.run.run_dir / (RAW if raw else FILE))

    def finish(self) -> None:
        """Nothing."""

    def close(self) -> None:
        self._at_close.close()


def moved(value: Any, device: torch.device) -> Any:
    """The same with its tensors on a device: in dictionaries, lists and tuples too."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: moved(each, device) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(each, device) for each in value))
    return type(value)(moved(each, device) for each in value) if isinstance(value, list | tuple) else value


def fitting(head: Head, weights: str) -> dict[str, Tensor]:
    """The tensors of a head's file that fit by name and shape, for `start_from`; the head may be on the meta device.

    ConfigError if none does, or if it is a head of another kind.
    """
    other = load_head(weights)
    if other.kind != head.kind:
        raise ConfigError(f"head.weights={weights} is a {other.kind} head, not a {head.kind} head")
    if (read := other.blocks(12)) and (wanted := head.blocks(12)) and read != wanted:
        raise ConfigError(
            f"head.weights={weights} reads the blocks {[i + 1 for i in read]} of an encoder of 12 blocks, this head "
            f"{[i + 1 for i in wanted]}: give one that reads the same, or leave it out"
        )
    own, theirs = head.state_dict(), other.state_dict()
    found = {name: x for name, x in theirs.items() if name in own and own[name].shape == x.shape}
    if not found:
        raise ConfigError(f"head.weights={weights}: no tensor has the shape of this head's: take the same head.options")
    return found


def start_from(head: Head, weights: str) -> str:
    """Takes from a head's file the tensors that fit, see `fitting`; returns a sentence that says which."""
    found, own = fitting(head, weights), head.state_dict()
    head.load_state_dict(found, strict=False)
    drawn = [name for name in own if name not in found]
    shown = f"; {len(drawn)} are drawn, such as {', '.join(drawn[:3])}" if drawn else ""
    return f"started from {weights}: {len(found)} of {len(own)} tensors{shown}"
