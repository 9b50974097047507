"""The distillation as a run's task: teachers, student, statistics, and the walk of a batch through them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dune_fast.cache.teachers import LateTeachers
from dune_fast.dali_pipelines.loader import Batch, TrainLoader
from dune_fast.distill.objective import ownership, term_states
from dune_fast.distill.overlap import SideStream
from dune_fast.distill.standardization import AllReduce, TeacherStatistics
from dune_fast.distill.step import DistillationStep, StepOutput
from dune_fast.engine import checkpoints
from dune_fast.engine.accumulation import Batches, part_momentum, split, weighted, within_partition
from dune_fast.engine.cache_fingerprint import open_cache
from dune_fast.engine.config import RunConfig
from dune_fast.engine.conflicts import TeacherConflicts
from dune_fast.engine.deepspeed_engine import Engine, sum_over_ranks
from dune_fast.engine.drift import check_teachers
from dune_fast.engine.flops import mean_flops, stage_flops
from dune_fast.engine.guards import Names
from dune_fast.engine.memory import Fit, checkpoint_bytes, fit
from dune_fast.engine.opening import describe, stage_costs
from dune_fast.engine.run_folder import count_images, refuse_other_images
from dune_fast.engine.same_ranks import refuse_other_data
from dune_fast.engine.schedules import ema_momenta
from dune_fast.engine.stages import by_stage, loaded_teachers, stage_at, stages, teacher_sizes, turns
from dune_fast.engine.start import look_ahead
from dune_fast.engine.task import Place, Work
from dune_fast.engine.teacher_crops import TeacherCrops
from dune_fast.engine.warm_start import initial_student
from dune_fast.student import build_student
from dune_fast.teachers.ensemble import TeacherEnsemble

logger = logging.getLogger(__name__)


class Distillation:
    """A `task.Task`: a student from many teachers.

    Args:
        cfg: the run's.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg

    def check(self) -> None:
        """`build` says what is missing of teachers and images, where it reads them."""

    def checkpoint_bytes(self) -> int:
        return checkpoint_bytes(self.cfg)

    def fit(self, ranks: int, available: int, low_precision: bool, parts: int | None = None) -> Fit:
        return fit(self.cfg, ranks, available, low_precision, parts)

    def build(self, run: Place, resume_step: int | None) -> nn.Module:
        """Data, teachers, student and the walk of a batch through them."""
        cfg, self.run, self.device = self.cfg, run, run.device
        self.rank, self.world_size, self.run_dir = run.rank, run.world_size, run.run_dir
        self.stages, self.crops = stages(cfg), TeacherCrops(cfg)
        self.turns = turns(cfg, run.rank, run.world_size)
        self.loader = TrainLoader(
            cfg.data, cfg.image_size, cfg.train.global_batch, run.rank, run.world_size, cfg.train.seed, run.device,
            folder=run.run_dir, sizes=lambda step: stage_at(self.stages, step).size(step, cfg.train.seed),
            parts=[turn.part for turn in self.turns], crops=self.crops.crops, patch=cfg.student.patch_size,
            wanted=lambda step, part: self.crops.wanted(self.active(step, part) or cfg.teachers),
        )  # fmt: skip
        self.cache = open_cache(cfg, self.loader.datasets, run.device) if cfg.cache.folder else None
        self.loader.read_views = None if self.cache is None else self.cache.read
        refuse_other_data(self.loader.datasets, run.hosts)
        if run.evaluate is not None:
            run.evaluate.check(self.loader.datasets)
        groups = {name: teacher.groups for name, teacher in cfg.teachers.items()}
        own = ownership(groups, self.loader.groups, cfg.objective)
        loaded = loaded_teachers(cfg, self.turns)
        build = functools.partial(TeacherEnsemble, cfg.teachers, cfg.student.patch_size, run.dtype, run.device, loaded)
        self.teachers = LateTeachers(build) if cfg.cache.folder else build()
        self.warm_start = None
        if resume_step is not None:  # the checkpoint's weights follow: the source of a warm start may be gone
            student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
        else:
            student, self.warm_start = initial_student(cfg)
        student.compute_in(run.dtype, cfg.train.student_stream)
        student.encoder.activation_checkpointing = cfg.train.activation_checkpointing
        self.statistics = TeacherStatistics.of(cfg.teacher_features, cfg.standardization).to(run.device)
        self.statistics.leads = run.rank == 0
        self.states = term_states(cfg.objective, cfg.teacher_features, cfg.train.global_batch).to(run.device)
        self.all_reduce = sum_over_ranks if run.world_size > 1 else None
        side = SideStream(run.device) if cfg.train.overlap_teachers else None
        self.distill = DistillationStep(
            student, self.teachers, self.statistics, own, cfg.objective, cfg.train.seed, self.all_reduce, side,
            self.states, teacher_sizes(cfg), self._loss_reduce(),
        )
        if resume_step is None:
            look_ahead(self, student)
            if cfg.cache.folder:
                self.teachers.release()
        if cfg.train.compile:
            student.compile_blocks()
        ends = cfg.standardization.ema_start, cfg.standardization.ema_end
        self.momenta = by_stage(cfg, "statistics", lambda n: ema_momenta(n, *ends))
        self.conflicts = None
        if cfg.logging.conflicts and len(cfg.teachers) > 1:
            self.conflicts = TeacherConflicts(list(cfg.teachers), cfg.train.log_every, run.device, run.world_size)
        self.names = Names(list(cfg.teachers), self.loader.dataset_names)
        return student

    def _loss_reduce(self) -> AllReduce | None:
        """Where ranks have partitions of their own, a patch weighs among those of the same partition."""
        stage = self.turns[0].stage
        if stage is None or self.all_reduce is None or len(self.turns) > 1:
            return None
        return within_partition(stage.partition, len(self.cfg.partitions), self.all_reduce)

    def use(self, module: Engine) -> None:
        self.distill.student = module

    def resume(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any], allowed: bool) -> None:
        prefix = "statistics/"
        found = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        checkpoints.load_statistics(self.statistics, found)
        prefix = "terms/"
        found = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        checkpoints.load_statistics(self.states, found, "objective.cls")
        refuse_other_images(about.get("images", {}), count_images(self.loader.datasets), allowed)

    def describe(self) -> None:
        describe(self.run, self)

    def record(self) -> dict[str, Any]:
        return {} if self.warm_start is None else {"warm_start": self.warm_start.as_dict()}

    def work(self) -> Work:
        cached = bool(self.cfg.cache.folder)
        trunks = None if cached else {name: teacher.trunk for name, teacher in self.teachers.teachers.items()}
        parts = stage_flops(self.cfg, trunks)
        return Work(mean_flops(parts).training, stage_costs(parts))

    @property
    def waited_s(self) -> float:
        """Seconds that the run has waited for images."""
        return self.loader.waited_s

    def batches(self, step: int, wanted: Callable[[float], bool]) -> Iterator[Batch | Batches]:
        batches = self.loader.batches(step, wanted)
        if len(self.turns) == 1:
            return batches
        return map(Batches, map(list, zip(*[batches] * len(self.turns), strict=False)))

    def begin(self, step: int, batch: Batch | Batches) -> None:
        """Checks the teachers' precision at the first step; says where a stage begins."""
        images = self.cfg.train.drift_images
        if step == 0 and images and not self.cfg.cache.folder:
            first = batch.parts[0] if isinstance(batch, Batches) else batch
            every = [turns(self.cfg, rank, self.world_size) for rank in range(self.rank)]
            before = {name for own in every for name in loaded_teachers(self.cfg, own)}
            mine = [name for name in self.teachers.teachers if name not in before]
            check_teachers(self.teachers, first.images[:images], self.run_dir, mine)
        if (stage := stage_at(self.stages, step)).first == step > 0:
            self.statistics.restart()
            if "statistics" in self.cfg.stage_restarts:
                fresh = TeacherStatistics.of(self.cfg.teacher_features, self.cfg.standardization)
                self.statistics.load_state_dict(fresh.state_dict())
            if self.rank == 0:
                logger.info("step %d to %d at %s", stage.first + 1, stage.end, stage)

    def active(self, step: int, part: int) -> tuple[str, ...]:
        """The teachers that look at a batch; empty for all."""
        return (self.turns[part].stage or stage_at(self.stages, step)).teachers

    def split(self, batch: Batch | Batches) -> Sequence[Batch]:
        whole = batch.parts if isinstance(batch, Batches) else [batch]
        return [part for one in whole for part in split(one, self.cfg.train.accumulation)]

    def forward(self, part: Batch, step: int) -> StepOutput:
        turn, active = self.turns[part.part], self.active(step, part.part)
        momentum = part_momentum(float(self.momenta[step]), self.cfg.train.accumulation * len(self.turns))
        inputs = part.images, part.group, part.positions, step, momentum, part.group_on_host, part.features
        views, pictures = self.crops.views(part), self.crops.pictures(part)
        output = self.distill(*inputs, part.positions_on_host, part.patches, views, pictures, active)
        return weighted(output, turn) if self.cfg.partitions else output

    def live(self) -> Sequence[Tensor]:
        student = self.distill.student.module  # whose buffers are elsewhere, once the engine has it
        moving = [x for x in student.buffers() if x.is_floating_point()]
        return [*self.statistics.buffers(), *self.states.live(), *moving]

    def stepped(self, metrics: Mapping[str, Tensor]) -> None:
        if self.conflicts is not None:
            self.conflicts.add([metrics[f"loss/{name}"] for name in self.conflicts.teachers])

    def readings(self, step: int) -> dict[str, float]:
        conflicts = {} if self.conflicts is None else self.conflicts.read(self.all_reduce)
        return {"ema_momentum": float(self.momenta[step - 1])} | conflicts

    def state(self) -> dict[str, Tensor]:
        found = {f"statistics/{name}": x for name, x in self.statistics.state_dict().items()}
        return found | {f"terms/{name}": x for name, x in self.states.state_dict().items()}

    def about(self) -> dict[str, Any]:
        return {"images": count_images(self.loader.datasets)}

    def export(self, module: nn.Module, raw: bool) -> None:
        checkpoints.export(self.run_dir, self.cfg, module, self.statistics, raw)

    def finish(self) -> None:
        if self.rank == 0 and any(self.loader.broken.values()):
            logger.warning("broken images that were skipped, by dataset: %s", self.loader.broken)

    def close(self) -> None:
        self.loader.close()
