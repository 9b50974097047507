"""The training run: builds everything from the configuration, steps, logs, saves, stops when it must.

`_open`, `_build_step` and `_build_loop` build, once; `run`, `_loop` and `train_step` go round. More than 300 lines: all
parts of a run meet here.
"""

from __future__ import annotations

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

from dune_fast.cache.teachers import LateTeachers
from dune_fast.dali_pipelines.datasets import Dataset
from dune_fast.dali_pipelines.loader import Batch, TrainLoader
from dune_fast.distill.objective import ownership
from dune_fast.distill.overlap import SideStream
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.distill.step import DistillationStep
from dune_fast.engine import checkpoints
from dune_fast.engine.accumulation import merge, micro_batch_size, part_momentum, split
from dune_fast.engine.cache_fingerprint import open_cache
from dune_fast.engine.config import RunConfig, as_dict
from dune_fast.engine.config_identity import config_hash, freeze
from dune_fast.engine.conflicts import TeacherConflicts
from dune_fast.engine.deepspeed_engine import Engine, init_distributed, sum_over_ranks, useful_zero_stage
from dune_fast.engine.determinism import deterministic_algorithms, explained
from dune_fast.engine.devices import agreed_precision, autocast_dtype
from dune_fast.engine.drift import check_teachers
from dune_fast.engine.guards import DivergedError, Guard, Names, undo_if
from dune_fast.engine.interruption import Stop
from dune_fast.engine.memory import fit, smallest_memory
from dune_fast.engine.metrics import MetricsLog
from dune_fast.engine.opening import describe, open_log
from dune_fast.engine.provenance import world
from dune_fast.engine.run_folder import count_images, how_to_go_on, open_run, refuse_other_images
from dune_fast.engine.run_state import RUNNING, STOPPED, fail, write_state
from dune_fast.engine.same_ranks import meet, refuse_other_data, refuse_own_folders
from dune_fast.engine.schedules import average_decay, ema_momenta, learning_rates, scaled_learning_rate
from dune_fast.engine.stages import stage_at, stages
from dune_fast.engine.start import look_ahead
from dune_fast.engine.trackers import check_packages
from dune_fast.engine.warm_start import initial_student
from dune_fast.engine.watchdog import Watchdog
from dune_fast.student import build_student
from dune_fast.teachers.ensemble import TeacherEnsemble
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
    """

    def __init__(self, cfg: RunConfig, evaluate: Evaluation | None = None) -> None:
        self.cfg = cfg
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
        self.run_dir = Path(cfg.output_dir)
        precision, memory = agreed_precision(cfg.train.precision, self.device), smallest_memory(self.device)
        resume_step = open_run(
            cfg, precision, lambda: fit(cfg, self.world_size, memory, cfg.train.precision == "bf16").parts
        )
        if self.rank == 0:
            write_state(self.run_dir, RUNNING, resume_step or 0, cfg.steps)
        refuse_own_folders(self.run_dir, self.hosts)
        freeze(cfg)
        self.dtype = autocast_dtype(cfg.train.precision, self.device)
        self.fit = fit(cfg, self.world_size, memory, self.dtype is not None, cfg.train.accumulation)
        """An estimate of what a step takes of the smallest device's memory."""
        return resume_step

    def _build_step(self, resume_step: int | None) -> None:
        """Data, teachers, student and the walk of a batch through them."""
        cfg = self.cfg
        self.stages = stages(cfg)
        self.loader = TrainLoader(
            cfg.data, cfg.image_size, cfg.train.global_batch, self.rank, self.world_size, cfg.train.seed, self.device,
            folder=self.run_dir, sizes=lambda step: stage_at(self.stages, step).image_size,
        )  # fmt: skip
        self.cache = open_cache(cfg, self.loader.datasets, self.device) if cfg.cache.folder else None
        self.loader.read_views = None if self.cache is None else self.cache.read
        refuse_other_data(self.loader.datasets, self.hosts)
        if self.evaluate is not None:
            self.evaluate.check(self.loader.datasets)
        groups = {name: teacher.groups for name, teacher in cfg.teachers.items()}
        own = ownership(groups, self.loader.groups, cfg.objective, self.device)
        build = functools.partial(TeacherEnsemble, cfg.teachers, cfg.student.patch_size, self.dtype, self.device)
        self.teachers = LateTeachers(build) if cfg.cache.folder else build()
        self.warm_start = None
        if resume_step is not None:  # the checkpoint's weights follow: the source of a warm start may be gone
            student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
        else:
            student, self.warm_start = initial_student(cfg)
        student.compute_in(self.dtype, cfg.train.student_stream)
        student.encoder.activation_checkpointing = cfg.train.activation_checkpointing
        self.statistics = TeacherStatistics(
            cfg.teacher_features, cfg.standardization.convention, cfg.standardization.eps
        ).to(self.device)
        self.all_reduce = sum_over_ranks if self.world_size > 1 else None
        side = SideStream(self.device) if cfg.train.overlap_teachers else None
        self.distill = DistillationStep(
            student, self.teachers, self.statistics, own, cfg.objective, cfg.train.seed, self.all_reduce, side
        )
        if resume_step is None:
            look_ahead(self, student)
            if cfg.cache.folder:
                self.teachers.release()
        if cfg.train.compile:
            student.compile_blocks()
        self.engine = self.distill.student = Engine(
            student, cfg.optimizer, micro_batch_size(cfg, self.world_size),
            useful_zero_stage(cfg.deepspeed.zero_stage, self.world_size), cfg.deepspeed.options,
            cfg.train.accumulation, cfg.deepspeed.gradient_dtype,
        )  # fmt: skip

    def _build_loop(self, resume_step: int | None) -> None:
        """What goes round the step: schedules, checkpoints, guards; loads the checkpoint."""
        cfg, train = self.cfg, self.cfg.train
        peak = scaled_learning_rate(cfg.optimizer.lr_per_256, train.global_batch)
        self.lr = learning_rates(cfg.steps, peak, cfg.optimizer.min_lr, cfg.optimizer.warmup_fraction)
        self.momenta = ema_momenta(cfg.steps, cfg.standardization.ema_start, cfg.standardization.ema_end)
        self.conflicts = None
        if cfg.logging.conflicts and len(cfg.teachers) > 1:
            self.conflicts = TeacherConflicts(list(cfg.teachers), train.log_every, self.device, self.world_size)
        timeout = 60.0 * train.timeout_minutes
        self.stop = Stop(self.world_size, timeout, train.notice_seconds)
        self.saver = checkpoints.Saver(
            self.run_dir, self.rank, self.world_size, train.keep_checkpoints, train.keep_every, timeout, self.stop.saved
        )
        if train.ema:
            self.engine.state.start_average()
        run = self._resume(resume_step) if resume_step is not None else {}
        self.step = resume_step or 0
        names = Names(list(cfg.teachers), self.loader.dataset_names, list(self.engine.shapes))
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
        checkpoints.load_statistics(self.statistics, _below(tensors, "statistics/"))
        found, allowed = count_images(self.loader.datasets), self.cfg.train.allow_config_change
        refuse_other_images(manifest.run.get("images", {}), found, allowed)
        if self.rank == 0:
            saved_by = manifest.world_size, manifest.zero_stage
            logger.info("going on from step %d of %d, saved by %d x ZeRO %d", step, self.cfg.steps, *saved_by)
            if self.cfg.train.ema and not manifest.averaged:
                logger.info("train.ema: the checkpoint has no average of the weights, it begins here")
        return manifest.run

    def run(self) -> TeacherStatistics:
        """Trains to the end and exports, or to a signal and saves; returns the teachers' statistics.

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
                    describe(self)
                    log = open_log(self, where)
                self._loop(log)
                self.watchdog.at("waiting for the last checkpoint")
                self.saver.finish(self.device)
        finally:
            if log is not None:
                log.close()
            self.loader.close()
            self.saver.wait(timeout=60.0)
            self._algorithms.close()
        self.stop.raise_fault()
        if self.stopped:
            if self.rank == 0:
                write_state(self.run_dir, STOPPED, self.step, self.cfg.steps, self.stop.why)
            logger.info("stopped after step %d of %d; %s", self.step, self.cfg.steps, how_to_go_on(self.cfg))
            return self.statistics
        for raw in (True, False) if self.cfg.train.ema else (False,):
            with self.engine.whole_weights() if raw else self.engine.evaluated_weights() as student:
                if self.rank == 0:
                    checkpoints.export(self.run_dir, self.cfg, student, self.statistics, raw)
        if self.rank == 0 and any(self.loader.broken.values()):
            logger.warning("broken images that were skipped, by dataset: %s", self.loader.broken)
        dist.barrier()
        return self.statistics

    def _loop(self, log: MetricsLog | None) -> None:
        train, total, first = self.cfg.train, self.cfg.steps, self.step
        self.stopped = self.evaluation_due and self._evaluate(log)
        if self.step >= total or self.stopped:
            return
        waited = self.loader.waited_s
        batches = self.loader.batches(self.step, self.stop.waits)
        while self.step < total and not self.stopped:
            self.watchdog.at("waiting for images")
            batch = self.stop.take(batches, self.watchdog.at)
            if batch is None:
                self.stopped = True
                break
            if self.step == 0 and train.drift_images and not self.cfg.cache.folder:
                check_teachers(self.teachers, batch.images[: train.drift_images], self.run_dir)
            if self.rank == 0 and (stage := stage_at(self.stages, self.step)).first == self.step > 0:
                logger.info("step %d to %d at %d px", stage.first + 1, stage.end, stage.image_size)
            metrics = self.train_step(batch)
            if self.step % train.log_every == 0 or self.step in (1, total):
                values = self._read(metrics)
                if self.conflicts is not None:
                    values |= self.conflicts.read(self.all_reduce)
                if log is not None:
                    log.write(self.step, values, self.loader.waited_s - waited)
                waited = self.loader.waited_s
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

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One step on this rank's part of the global batch; metrics stay on the device."""
        i, outputs = self.step, []
        live = list(self.statistics.buffers())
        before = [buffer.clone() for buffer in live]
        parts = split(batch, self.cfg.train.accumulation)
        momentum = part_momentum(float(self.momenta[i]), len(parts))
        for part in parts:
            self.watchdog.at(f"step {i + 1}, forward")
            inputs = part.images, part.group, part.positions, i, momentum, part.group_on_host, part.features
            outputs.append(self.distill(*inputs, part.positions_on_host, part.patches))
            self.watchdog.at(f"step {i + 1}, backward")
            self.engine.backward(outputs[-1].loss)
        metrics, images = merge(outputs)
        self.watchdog.at(f"step {i + 1}, update")
        norms = self.engine.step(float(self.lr[i]), metrics["loss"], self.guard.halted)
        self.engine.state.average(average_decay(self.cfg.train.ema, i), self.engine.skipped)
        undo_if(self.engine.skipped, live, before)
        self.guard.add(i, metrics["loss"], self.engine.skipped, norms, images, batch)
        if self.conflicts is not None:
            self.conflicts.add([metrics[f"loss/{name}"] for name in self.conflicts.teachers])
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
        return values | {"lr": float(self.lr[self.step - 1]), "ema_momentum": float(self.momenta[self.step - 1])}

    def _save(self) -> None:
        """Begins a checkpoint; a thread writes it to disk."""
        engine, skipped = self.engine, int(self.guard.in_a_row.item())
        images, due = count_images(self.loader.datasets), self.evaluation_due
        manifest = Manifest(
            step=self.step, updates=int(engine.state.updates().item()), world_size=self.world_size,
            zero_stage=engine.zero_stage, config_hash=config_hash(self.cfg), config=as_dict(self.cfg),
            shapes=engine.shapes, run={
                "skipped_in_a_row": skipped, "evaluation_due": due, "images": images, "averaged": engine.state.averages,
            },
        )  # fmt: skip
        small = {f"student/{name}": x for name, x in engine.untrained().items()}
        small |= {f"statistics/{name}": x for name, x in self.statistics.state_dict().items()}
        self.saver.save(manifest, engine.state, small)
