"""The training run: builds everything from the configuration, steps, logs, saves, stops when it must."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dali_pipelines.loader import Batch, TrainLoader
from dune_fast.distill.objective import ownership
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.distill.step import DistillationStep
from dune_fast.engine import checkpoints
from dune_fast.engine.config import RunConfig, dump_config
from dune_fast.engine.deepspeed_engine import Engine, init_distributed, sum_over_ranks
from dune_fast.engine.metrics import MetricsLog
from dune_fast.engine.schedules import ema_momenta, learning_rates, scaled_learning_rate
from dune_fast.engine.warm_start import initial_student
from dune_fast.nn.student import build_student
from teachers.ensemble import TeacherEnsemble

logger = logging.getLogger(__name__)


class DivergedError(ValueError):
    """The loss exploded or is not a number; the last good checkpoint is kept."""


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What `train.precision` means on a device: torch.bfloat16, or None for float32."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" or _cpu_multiplies_bf16() else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has matrix units for bf16 (AMX); on others bf16 is emulated and slower than float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16", False))


class Trainer:
    """One rank of a run. `Trainer(cfg).run()` trains from the newest checkpoint, or from the start, to the end."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.device = init_distributed()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if cfg.train.global_batch % self.world_size:
            raise ValueError(
                f"train.global_batch={cfg.train.global_batch} is not a multiple of the {self.world_size} processes; "
                f"choose for example {math.ceil(cfg.train.global_batch / self.world_size) * self.world_size}"
            )
        self.run_dir = Path(cfg.output_dir)
        self._prepare_folder()
        dtype = autocast_dtype(cfg.train.precision, self.device)
        self.loader = TrainLoader(
            cfg.data, cfg.image_size, cfg.train.global_batch, self.rank, self.world_size, cfg.train.seed, self.device
        )
        own = ownership(
            {name: teacher.groups for name, teacher in cfg.teachers.items()},
            self.loader.groups,
            cfg.objective,
            self.device,
        )
        self.teachers = TeacherEnsemble(cfg.teachers, cfg.student.patch_size, dtype).to(self.device)
        if self._steps_to_resume():  # the checkpoint's weights follow: the source of a warm start may be gone
            student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
        else:
            student = initial_student(cfg)
        student.autocast_dtype = dtype
        micro_batch = cfg.train.global_batch // self.world_size
        self.engine = Engine(student, cfg.optimizer, micro_batch, cfg.deepspeed.zero_stage, cfg.deepspeed.options)
        self.statistics = TeacherStatistics(
            cfg.teacher_features, cfg.standardization.convention, cfg.standardization.eps
        ).to(self.device)
        self.distill = DistillationStep(
            self.engine, self.teachers, self.statistics, own, cfg.objective, cfg.train.seed,
            sum_over_ranks if self.world_size > 1 else None,
        )  # fmt: skip
        peak = scaled_learning_rate(cfg.optimizer.lr_per_256, cfg.train.global_batch)
        self.lr = learning_rates(cfg.steps, peak, cfg.optimizer.min_lr, cfg.optimizer.warmup_fraction)
        self.momenta = ema_momenta(cfg.steps, cfg.standardization.ema_start, cfg.standardization.ema_end)
        # raised by any step between two reads of the host, so that no checkpoint is written after a bad loss
        self.worst_loss = torch.zeros((), device=self.device)
        self.step = self._resume()

    def _prepare_folder(self) -> None:
        train = self.cfg.train
        if self.rank == 0:
            if self.run_dir.exists() and not self.run_dir.is_dir():
                raise ValueError(f"output_dir={self.run_dir} is a file; choose a folder")
            holds_run = (self.run_dir / "metrics.jsonl").exists() or bool(checkpoints.complete_steps(self.run_dir))
            if holds_run and train.overwrite:
                logger.info("starting anew in %s: what the earlier run left there is deleted", self.run_dir)
                checkpoints.clear(self.run_dir)
            elif holds_run and not train.resume:
                raise ValueError(
                    f"{self.run_dir} holds a run: go on with train.resume=true, start anew with train.overwrite=true, "
                    "or choose another name=..."
                )
            self.run_dir.mkdir(parents=True, exist_ok=True)
            dump_config(self.cfg, self.run_dir / "config.yaml")
        dist.barrier()

    def _steps_to_resume(self) -> list[int]:
        """Steps with a complete checkpoint that the run may go on from."""
        return [] if self.cfg.train.overwrite else checkpoints.complete_steps(self.run_dir)

    def _resume(self) -> int:
        """Loads the newest complete checkpoint; returns the steps that it has behind it."""
        steps = self._steps_to_resume()
        if not steps:
            return 0
        state = self.engine.load(self.run_dir / "checkpoints", checkpoints.tag(steps[-1]))
        self.statistics.load_state_dict(state["statistics"])
        if self.rank == 0:
            logger.info("going on from step %d of %d", state["step"], self.cfg.steps)
        return state["step"]

    def run(self) -> TeacherStatistics:
        """Trains to the end and exports; returns the teachers' statistics.

        Raises:
            DivergedError: the loss exploded.
            DataError: too many broken images.
        """
        log = None
        if self.rank == 0:
            self._describe()
            log = MetricsLog(self.run_dir, self.step, self.cfg.steps, self.cfg.train.global_batch)
        try:
            self._loop(log)
        finally:
            if log is not None:
                log.close()
            self.loader.close()
        if self.rank == 0:
            checkpoints.export(self.run_dir, self.cfg, self.engine.module, self.statistics)
            if any(self.loader.broken.values()):
                logger.warning("broken images that were skipped, by dataset: %s", self.loader.broken)
        dist.barrier()
        return self.statistics

    def _loop(self, log: MetricsLog | None) -> None:
        train, total = self.cfg.train, self.cfg.steps
        if self.step >= total:
            return
        waited = 0.0
        batches = self.loader.batches(self.step)
        while self.step < total:
            batch = next(batches)
            waited += self.loader.wait_seconds
            metrics = self.train_step(batch)
            if self.step % train.log_every == 0 or self.step in (1, total):
                values = self._read(metrics)
                if log is not None:
                    log.write(self.step, values, waited)
                waited = 0.0
            elif log is not None:
                log.advance(self.step)
            if self.step % train.checkpoint_every == 0 or self.step == total:
                self._read(metrics)
                self._save()

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One step on this rank's part of the batch; metrics stay on the device."""
        i = self.step
        loss, metrics = self.distill(batch.images, batch.group, batch.positions, i, float(self.momenta[i]))
        self.engine.backward(loss)
        norms = self.engine.step(float(self.lr[i]))
        # maximum() hands a NaN on; 0 * norm makes one of a gradient that is not finite, which has spoilt the weights
        self.worst_loss = torch.maximum(self.worst_loss, metrics["loss"] + 0.0 * norms.max())
        self.step += 1
        return metrics | {"gradient_norm/max": norms.max(), "gradient_norm/mean": norms.mean()}

    def _read(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Metrics averaged over ranks, as numbers; the step's only wait for the device.

        Raises:
            DivergedError: a loss since the last read was not finite or above `train.max_loss`.
        """
        packed = torch.stack([value.float() for value in metrics.values()])
        worst = self.worst_loss.float().nan_to_num(nan=math.inf)
        if self.world_size > 1:
            dist.all_reduce(packed)
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        values = dict(zip(metrics, (packed / self.world_size).tolist(), strict=True))
        worst_loss = worst.item()
        self.worst_loss.zero_()
        if not worst_loss <= self.cfg.train.max_loss:
            raise DivergedError(self._divergence(worst_loss))
        return values | {"lr": float(self.lr[self.step - 1]), "ema_momentum": float(self.momenta[self.step - 1])}

    def _divergence(self, loss: float) -> str:
        steps = checkpoints.complete_steps(self.run_dir)
        kept = (
            f"the last good checkpoint is {checkpoints.tag(steps[-1])} in {self.run_dir / 'checkpoints'}"
            if steps
            else "there is no checkpoint yet"
        )
        shown = f"rose to {loss:.3g}" if math.isfinite(loss) else "is not a finite number"
        return (
            f"the loss {shown} at or before step {self.step} (train.max_loss={self.cfg.train.max_loss:g}): the run is "
            f"stopped, {kept}. Lower optimizer.lr_per_256, or look at loss/* in {self.run_dir / 'metrics.jsonl'} "
            "for the teacher that breaks"
        )

    def _save(self) -> None:
        state = {"step": self.step, "statistics": self.statistics.state_dict()}
        self.engine.save(self.run_dir / "checkpoints", checkpoints.tag(self.step), state)
        dist.barrier()
        if self.rank == 0:
            checkpoints.mark_complete(self.run_dir, self.step)
            checkpoints.prune(self.run_dir, self.cfg.train.keep_checkpoints)

    def _describe(self) -> None:
        cfg = self.cfg
        student = sum(p.numel() for p in self.engine.module.encoder.parameters())
        projectors = sum(p.numel() for p in self.engine.module.projectors.parameters())
        logger.info(
            "%s: %d teachers (%s) into a student of %.1f M (+ %.1f M projectors); %d images in training",
            cfg.name, len(cfg.teachers), ", ".join(cfg.teachers), student / 1e6, projectors / 1e6,
            self.loader.num_images,
        )  # fmt: skip
        logger.info(
            "%d steps of %d images at %d px on %d x %s, ZeRO %d, %s; results in %s",
            cfg.steps, cfg.train.global_batch, cfg.image_size, self.world_size, self.device.type,
            cfg.deepspeed.zero_stage, "bf16" if self.engine.module.autocast_dtype else "fp32", self.run_dir,
        )  # fmt: skip
