"""The training run: opens its folder, steps, logs, saves, stops when it must.

What it trains is a `Task`: the distillation, or a head on a frozen encoder. `_open`, `_build_step` and `_build_loop`
build, once; `run`, `_loop` and `train_step` go round.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dune_fast.dali_pipelines.datasets import Dataset
from dune_fast.engine import checkpoints
from dune_fast.engine.accumulation import merge, micro_batch_size
from dune_fast.engine.config import RunConfig, as_dict
from dune_fast.engine.config_identity import config_hash, freeze
from dune_fast.engine.deepspeed_engine import Engine, init_distributed, useful_zero_stage
from dune_fast.engine.determinism import deterministic_algorithms, explained
from dune_fast.engine.devices import agreed_precision, autocast_dtype
from dune_fast.engine.distillation import Distillation
from dune_fast.engine.guards import DivergedError, Guard, undo_if
from dune_fast.engine.interruption import Stop
from dune_fast.engine.memory import smallest_memory
from dune_fast.engine.metrics import MetricsLog
from dune_fast.engine.opening import open_log
from dune_fast.engine.provenance import world
from dune_fast.engine.run_folder import how_to_go_on, open_run
from dune_fast.engine.run_state import RUNNING, STOPPED, fail, write_state
from dune_fast.engine.same_ranks import meet, refuse_own_folders
from dune_fast.engine.schedules import average_decay, cycled_beta
from dune_fast.engine.stages import by_stage, passes
from dune_fast.engine.task import Task
from dune_fast.engine.trackers import check_packages
from dune_fast.engine.watchdog import Watchdog
from dune_fast.teachers.run_files import Manifest

logger = logging.getLogger(__name__)

__all__ = ["DivergedError", "Trainer"]


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


class Evaluation(Protocol):
    """What looks at the student every `evaluation.every` steps, on all ranks."""

    def check(self, datasets: Sequence[Dataset]) -> None:
        """Raises ValueError before the first step if there is nothing to evaluate on."""

    def __call__(self, trainer: Trainer) -> dict[str, float] | None:
        """Name -> value; None if the run is to stop. It changes nothing of the trainer and calls its watchdog."""


class Trainer:
    """One rank of a run. `Trainer(cfg).run()` trains from the newest checkpoint, or from the start, to the end.

    Args:
        cfg: the run's; frozen from here on.
        evaluate: called every `evaluation.every` steps; without one nothing is.
        task: what is trained; the distillation that `cfg` describes by default.
    """

    def __init__(self, cfg: RunConfig, evaluate: Evaluation | None = None, task: Task | None = None) -> None:
        self.cfg, self.task = cfg, Distillation(cfg) if task is None else task
        self.evaluate = evaluate if cfg.evaluation.every else None
        self._algorithms = ExitStack()  # until `run` has ended
        if cfg.train.deterministic:
            self._algorithms.enter_context(deterministic_algorithms())
        try:
            self._build()
        except BaseException:
            self._algorithms.close()
            raise

    def _build(self) -> None:
        resume_step = self._open()
        self._build_step(resume_step)
        self._build_loop(resume_step)

    def _open(self) -> int | None:
        """Joins the other ranks, opens the run's folder; returns the step of the checkpoint to go on from, or None."""
        cfg = self.cfg
        self.device = init_distributed(cfg.train.timeout_minutes, cfg.train.rendezvous_minutes)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.hosts = meet(cfg)
        micro_batch_size(cfg, self.world_size)  # a batch that cannot be shared out leaves the folder alone
        check_packages(cfg.logging)
        self.task.check()
        self.run_dir = Path(cfg.output_dir)
        precision, memory = agreed_precision(cfg.train.precision, self.device), smallest_memory(self.device)
        resume_step = open_run(
            cfg, precision, lambda: self.task.fit(self.world_size, memory, cfg.train.precision == "bf16").parts,
            self.task.checkpoint_bytes,
        )  # fmt: skip
        if self.rank == 0:
            write_state(self.run_dir, RUNNING, resume_step or 0, cfg.steps)
        refuse_own_folders(self.run_dir, self.hosts)
        freeze(cfg)
        self.dtype = autocast_dtype(cfg.train.precision, self.device)
        self.fit = self.task.fit(self.world_size, memory, self.dtype is not None, cfg.train.accumulation)
        """An estimate of what a step takes of the smallest device's memory; None if the task makes none."""
        return resume_step

    def _build_step(self, resume_step: int | None) -> None:
        """Data and network, which are the task's, and DeepSpeed around what is trained."""
        cfg = self.cfg
        module = self.task.build(self, resume_step)
        self.engine = Engine(
            module, cfg.optimizer, micro_batch_size(cfg, self.world_size),
            useful_zero_stage(cfg.deepspeed.zero_stage, self.world_size), cfg.deepspeed.options,
            cfg.train.accumulation * passes(cfg), cfg.deepspeed.gradient_dtype,
        )  # fmt: skip
        self.task.use(self.engine)

    def _build_loop(self, resume_step: int | None) -> None:
        """What goes round the step: schedules, checkpoints, guards; loads the checkpoint."""
        cfg, train = self.cfg, self.cfg.train
        self.lr = by_stage(cfg, "learning_rate", lambda n: cfg.optimizer.rates(n, train.global_batch))
        self.betas = cycled_beta(cfg.steps, *cfg.optimizer.cycle_beta) if cfg.optimizer.cycle_beta else None
        timeout = 60.0 * train.timeout_minutes
        self.stop = Stop(self.world_size, timeout, train.notice_seconds)
        self.saver = checkpoints.Saver(
            self.run_dir, self.rank, self.world_size, train.keep_checkpoints, train.keep_every, timeout, self.stop.saved
        )
        if train.ema:
            self.engine.state.start_average()
        run = self._resume(resume_step) if resume_step is not None else {}
        self.step = resume_step or 0
        names = dataclasses.replace(self.task.names, parameters=list(self.engine.shapes))
        about = {"config": json.dumps(as_dict(cfg))}
        self.guard = Guard(names, train.max_loss, self.device, run.get("skipped_in_a_row", 0), about)
        self.watchdog = Watchdog(
            self.rank, self.hosts, timeout, how_to_go_on(cfg), self.stop, functools.partial(fail, self.run_dir)
        )
        self.stopped, self.evaluation_due = False, run.get("evaluation_due", False)
        """Whether `run` has ended early, after a signal; whether a signal has broken off this step's evaluation."""

    def _resume(self, step: int) -> dict[str, Any]:
        """Loads a checkpoint; returns the run's small state."""
        manifest, tensors = checkpoints.load(self.run_dir, step, self.engine.state, self.engine.shapes)
        self.engine.load_untrained(_below(tensors, "student/"))
        self.task.resume(tensors, manifest.run, self.cfg.train.allow_config_change)
        if self.rank == 0:
            saved_by = manifest.world_size, manifest.zero_stage
            logger.info("going on from step %d of %d, saved by %d x ZeRO %d", step, self.cfg.steps, *saved_by)
            if self.cfg.train.ema and not manifest.averaged:
                logger.info("train.ema: the checkpoint has no average of the weights, it begins here")
        return manifest.run

    def run(self) -> None:
        """Trains to the end and exports, or to a signal and saves.

        Raises:
            DivergedError: the loss exploded.
            NotDeterministicError: see `train.deterministic`.
            DataError, OtherRankError: too many broken images, or storage that does not answer, on this rank or on
                another one; the steps before are saved.
            LostRankError: another rank has ended, or cannot be reached.
        """
        where = world(self.device)
        log = None
        try:
            with self.stop, self.watchdog, explained():
                if self.rank == 0:
                    self.task.describe()
                    log = open_log(self, where)
                self._loop(log)
                self.watchdog.at("waiting for the last checkpoint")
                self.saver.finish(self.device)
        finally:
            if log is not None:
                log.close()
            self.task.close()
            self.saver.wait(timeout=60.0)
            self._algorithms.close()
        self.stop.raise_fault()
        if self.stopped:
            if self.rank == 0:
                write_state(self.run_dir, STOPPED, self.step, self.cfg.steps, self.stop.why)
            logger.info("stopped after step %d of %d; %s", self.step, self.cfg.steps, how_to_go_on(self.cfg))
            return
        for raw in (True, False) if self.cfg.train.ema else (False,):
            with self.engine.whole_weights() if raw else self.engine.evaluated_weights() as module:
                if self.rank == 0:
                    self.task.export(module, raw)
        self.task.finish()
        dist.barrier()

    def _loop(self, log: MetricsLog | None) -> None:
        train, total, first = self.cfg.train, self.cfg.steps, self.step
        self.stopped = self.evaluation_due and self._evaluate(log)
        if self.step >= total or self.stopped:
            return
        waited = self.task.waited_s
        batches = self.task.batches(self.step, self.stop.waits)
        while self.step < total and not self.stopped:
            self.watchdog.at("waiting for images")
            batch = self.stop.take(batches, self.watchdog.at)
            if batch is None:
                self.stopped = True
                break
            self.task.begin(self.step, batch)
            metrics = self.train_step(batch)
            if self.step % train.log_every == 0 or self.step in (1, total):
                values = self._read(metrics) | self.task.readings(self.step)
                if log is not None:
                    log.write(self.step, values, self.task.waited_s - waited)
                waited = self.task.waited_s
            elif log is not None:
                log.advance(self.step)
            self.stopped = self._evaluate(log)
            if self.step % train.checkpoint_every == 0 or self.step == total:
                self._read(metrics)
                self._save()
        if self.stopped and self.step not in (first, self.saver.last_step):
            self._read(metrics)
            self._save()

    def _evaluate(self, log: MetricsLog | None) -> bool:
        """Evaluates and records if this step is due; returns whether a signal broke it off.

        The time of an evaluation is not counted as the training's.
        """
        if self.evaluate is None or (self.step % self.cfg.evaluation.every and self.step < self.cfg.steps):
            return False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # queued training steps are not evaluation
        began = time.perf_counter()
        values = self.evaluate(self)
        if values is None:
            logger.info("the evaluation after step %d was broken off: the run goes on with it", self.step)
        elif log is not None:
            log.write_evaluation(self.step, values, time.perf_counter() - began)
        self.evaluation_due = values is None
        return self.evaluation_due

    def train_step(self, batch: Any) -> dict[str, Tensor]:
        """One step on this rank's part of the global batch; metrics stay on the device."""
        i, outputs = self.step, []
        live = list(self.task.live())
        before = [buffer.clone() for buffer in live]
        for part in self.task.split(batch):
            self.watchdog.at(f"step {i + 1}, forward")
            outputs.append(self.task.forward(part, i))
            self.watchdog.at(f"step {i + 1}, backward")
            self.engine.backward(outputs[-1].loss)
        metrics, images = merge(outputs, self.cfg.train.accumulation)
        self.watchdog.at(f"step {i + 1}, update")
        beta = None if self.betas is None else float(self.betas[i])
        frozen = i < self.cfg.optimizer.frozen_trunk_steps
        norms = self.engine.step(float(self.lr[i]), metrics["loss"], self.guard.halted, beta, frozen)
        self.engine.state.average(average_decay(self.cfg.train.ema, i), self.engine.skipped)
        undo_if(self.engine.skipped, live, before)
        self.guard.add(i, metrics["loss"], self.engine.skipped, norms, images, batch)
        self.task.stepped(metrics)
        self.step += 1
        return metrics | {
            "gradient_norm/max": norms.max(),
            "gradient_norm/mean": norms.mean(),
            "gradient_norm/global": norms.square().sum().sqrt(),
        }

    def _read(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Metrics averaged over ranks, as numbers; the step's only wait for the device.

        Raises:
            DivergedError: see `Guard.read`.
        """
        packed = torch.stack([value.float() for value in metrics.values()])
        if self.world_size > 1:
            dist.all_reduce(packed)
        values = dict(zip(metrics, (packed / self.world_size).tolist(), strict=True))
        values |= self.guard.read(self.run_dir, self.world_size, self.saver.newest)
        return values | {"lr": float(self.lr[self.step - 1])}

    def _save(self) -> None:
        """Begins a checkpoint; a thread writes it to disk."""
        engine, skipped = self.engine, int(self.guard.in_a_row.item())
        about = {"skipped_in_a_row": skipped, "evaluation_due": self.evaluation_due, **self.task.about()}
        manifest = Manifest(
            step=self.step, updates=int(engine.state.updates().item()), world_size=self.world_size,
            zero_stage=engine.zero_stage, config_hash=config_hash(self.cfg), config=as_dict(self.cfg),
            shapes=engine.shapes, run={**about, "averaged": engine.state.averages},
        )  # fmt: skip
        small = {f"student/{name}": x for name, x in engine.untrained().items()} | self.task.state()
        self.saver.save(manifest, engine.state, small)
