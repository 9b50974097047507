"""What is computed on a run's first images, before the first step trains on them.

PHI-S estimates its rotations and scales; the convention "fixed" takes a cache's statistics, "stored" those of files;
the start in closed form is weights out of a teacher, projectors that fit.
Rank 0 computes the start, on images that do not depend on the number of ranks.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from dune_fast.cache.store import Store
from dune_fast.dali_pipelines.loader import Batch, TrainLoader
from dune_fast.distill.narrowing import NarrowingError, check_pair, narrow
from dune_fast.distill.normalizers import STORED
from dune_fast.distill.projector_fit import fit_projectors
from dune_fast.distill.standardization import AnyNormalizer, Features, TeacherStatistics
from dune_fast.distill.step import DistillationStep, routed
from dune_fast.distill.stored_statistics import Statistics, read_statistics
from dune_fast.engine.accumulation import all_ranks
from dune_fast.engine.checkpoints import write_tensors
from dune_fast.engine.config import ConfigError, RunConfig
from dune_fast.engine.stages import Turn
from dune_fast.engine.teacher_crops import TeacherCrops
from dune_fast.engine.warm_start import initial_student
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.student import Student, build_student
from dune_fast.teachers.architecture import architecture_metadata
from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.registry import build_teacher
from dune_fast.teachers.vit import ViTTeacher

logger = logging.getLogger(__name__)

START_FILE = "start.safetensors"
"""In the run's folder: what "before the training" means afterwards."""
_CHUNK = 64  # images of a forward pass


class Opened(Protocol):
    """What is read here of a distillation that is about to start."""

    cfg: RunConfig
    run_dir: Path
    rank: int
    world_size: int
    device: torch.device
    loader: TrainLoader
    cache: Store | None
    teachers: TeacherEnsemble
    statistics: TeacherStatistics
    distill: DistillationStep
    crops: TeacherCrops
    turns: Sequence[Turn]


def look_ahead(run: Opened, student: Student) -> None:
    """Statistics and start, as far as the configuration asks for them. All ranks call it; see `compute_start`."""
    if run.statistics.of_convention("phi_s"):
        estimate_statistics(run)
    if run.statistics.of_convention("fixed"):
        assert run.cache is not None  # the configuration was checked
        run.statistics.fix(run.cache.moments(), "fixed")
    if stored := run.statistics.of_convention(*STORED):
        run.statistics.fix(_stored(run.cfg, stored), *STORED)
    if run.cfg.start.wanted:
        compute_start(run, student)


def _stored(cfg: RunConfig, wanted: list[tuple[str, str, AnyNormalizer]]) -> Statistics:
    """What the files of a run's configuration have of these teachers and token types."""
    teachers: dict[str, tuple[int, list[str]]] = {}
    for name, token, normalizer in wanted:
        teachers.setdefault(name, (len(normalizer.mean), []))[1].append(token)
    return read_statistics(cfg.standardization.file, cfg.standardization.files, teachers)


def estimate_statistics(run: Opened) -> None:
    """PHI-S: looks at the teachers' features of the run's first batches, from the cache if there is one."""
    count = run.cfg.standardization.phi_s_batches
    if run.rank == 0:
        logger.info("PHI-S: estimating the covariances of the teachers' features from %d batches", count)
    batches = run.loader.batches(0)

    def features(batch: Batch) -> Features:
        """Of the images that each teacher is trained on."""
        active = stage.teachers if (stage := run.turns[batch.part].stage) else ()
        routes = run.distill.routes(
            batch.images, batch.step, batch.group_on_host, batch.positions_on_host, active
        )  # fmt: skip
        if batch.features is None:
            return run.teachers(batch.images, routes, None, run.crops.pictures(batch))
        return batch.features if routes is None else routed(batch.features, routes)

    run.statistics.estimate(map(features, itertools.islice(batches, count * len(run.turns))), run.distill.all_reduce)
    batches.close()
    for buffer in run.statistics.buffers():  # eigenvectors of equal eigenvalues are a library's choice
        dist.broadcast(buffer, 0)


def compute_start(run: Opened, student: Student) -> None:
    """Overwrites the student's weights as `cfg.start` says, on every rank, and writes `START_FILE`. All ranks call it.

    Args:
        run: with loader, teachers, statistics and the walk of a batch.
        student: with its drawn weights; moved to the run's device.

    Raises:
        ConfigError: the student cannot be made from `cfg.start.teacher`.
    """
    cfg, began = run.cfg, time.perf_counter()
    if cfg.start.teacher:
        _check(run)
    student.to(run.device)
    if run.rank == 0:
        logger.info("computing the start on the run's first %d images", cfg.start.images)
    images, groups = _first_images(run)
    if run.rank == 0:
        if cfg.start.teacher:
            _narrow(run, student, images)
        if cfg.start.fit_projectors:
            explained = fit_projectors(student, _batches(run, images, groups), run.statistics)
            shares = ", ".join(f"{name} {share:.2f}" for name, share in explained.items())
            logger.info("projectors fitted; explained share of the teachers' features: %s", shares)
    state = student.state_dict()
    if run.world_size > 1:
        for x in state.values():
            dist.broadcast(x, 0)
    if run.rank == 0:
        kept = {name: x.detach().cpu().contiguous() for name, x in state.items()}
        write_tensors(run.run_dir / START_FILE, kept, architecture_metadata(student.encoder.cfg))
        logger.info("the start took %.0f s", time.perf_counter() - began)


def started_student(cfg: RunConfig, run: Path) -> Student:
    """The student as a run in this folder has started.

    Raises:
        TeacherWeightsError: its `START_FILE` is missing or damaged.
        WarmStartError: see `initial_student`.
    """
    if not cfg.start.wanted:
        return initial_student(cfg)[0]
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
    # the folder of a checkpoint lies two below its run's
    path = next((p for p in (run / START_FILE, run.parent.parent / START_FILE) if p.is_file()), run / START_FILE)
    try:
        student.load_state_dict(load_file(path))
    except Exception as error:
        raise TeacherWeightsError(
            f"{path}, what the run has started from, is missing or damaged: {str(error).splitlines()[0]}"
        ) from error
    return student


def _check(run: Opened) -> None:
    """On every rank, so that none waits for one that has refused."""
    name = run.cfg.start.teacher
    teacher = run.teachers.teachers[name]
    if not isinstance(teacher, ViTTeacher):
        raise ConfigError(f"start.teacher={name!r} is of family {teacher.config.family}, not a ViT of ours")
    if teacher.network is not VisionTransformer:
        raise ConfigError(f"start.teacher={name!r} is of family {teacher.config.family}, no network of a student")
    try:
        check_pair(run.cfg.student, teacher.trunk.vit.cfg)
    except NarrowingError as error:
        raise ConfigError(f"the student cannot start from start.teacher={name!r}: {error}") from None


def _narrow(run: Opened, student: Student, images: Tensor) -> None:
    """The encoder out of the teacher's file, read anew: the ensemble's may be of another precision, or cut."""
    name = run.cfg.start.teacher
    vit = build_teacher(name, run.cfg.teachers[name]).trunk.vit.to(run.device).float()
    blocks = min(run.cfg.start.blocks, len(vit.blocks), len(student.encoder.blocks))
    lost = narrow(student.encoder, vit, images.to(run.device), blocks)
    logger.info("%d blocks out of teacher %s; %.0f %% of the last one's tokens are lost", blocks, name, 100 * lost[-1])


def _first_images(run: Opened) -> tuple[Tensor, Tensor]:
    """The run's first images [n, 3, S, S] and their groups [n], in the order of the run, on the CPU."""
    found: list[tuple[Tensor, Tensor]] = []
    batches = run.loader.batches(0)
    while sum(len(groups) for _, groups in found) < run.cfg.start.images:
        batch = next(batches)
        mine = batch.images.float(), batch.group, batch.positions
        images, groups, positions = (all_ranks(x, run.world_size) for x in mine)
        order = positions.argsort()
        found.append((images[order].cpu(), groups[order].cpu()))
    batches.close()
    images, groups = (torch.cat(parts)[: run.cfg.start.images] for parts in zip(*found, strict=True))
    return images, groups


def _batches(
    run: Opened, images: Tensor, groups: Tensor
) -> Iterator[tuple[Tensor, dict[str, dict[str, Tensor]], dict[str, Tensor]]]:
    """What `fit_projectors` takes, chunk by chunk."""
    own = run.distill.own.to(run.device)
    for part, of in zip(images.split(_CHUNK), groups.split(_CHUNK), strict=True):
        chunk, group = part.to(run.device), of.to(run.device)
        counts = {name: own[i, group].nonzero().flatten() for i, name in enumerate(run.cfg.teachers)}
        yield chunk, run.teachers(chunk), counts
