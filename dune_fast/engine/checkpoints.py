"""What a run keeps: resumable checkpoints while it trains, the student's weights when it has ended."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.engine.config import RunConfig, config_of, dump_config, load_config
from dune_fast.engine.container import CheckpointError, Manifest, Reader, write_tensors
from dune_fast.engine.zero_state import ShardedState
from dune_fast.student import Student, build_student
from dune_fast.teachers.architecture import architecture_metadata
from dune_fast.teachers.run_files import checkpoint_state, complete_steps, folder, newest_good, tag, weights_in
from dune_fast.teachers.weights import TeacherWeightsError

__all__ = [
    "LATEST", "PART", "clear", "clear_partial", "complete_steps", "export", "folder", "load", "load_run",
    "load_statistics", "newest_good", "prune", "tag",
]  # fmt: skip

LATEST = "latest"
"""File beside the checkpoints that names the newest; for people and scripts, the run itself looks at the folders."""
STUDENT = "student.safetensors"
"""The weights of a finished run, projectors and statistics too."""
PART = ".part"
"""Suffix of a checkpoint's folder until every rank has written its part: what a kill cut short keeps it."""


def prune(run: Path, newest: int, keep: int, keep_every: int = 0) -> None:
    """Deletes all complete checkpoints but the last `keep` and those of every `keep_every`-th step (0: of none).

    Those after the `newest`, the one that was just written, go too: they are broken, or the run would have gone on from
    them. So does what a kill or a full disk cut short before the newest.
    """
    steps = complete_steps(run)
    good = [step for step in steps if step <= newest]
    kept = set(good[-keep:]) | {step for step in good if keep_every and step % keep_every == 0}
    for step in steps:
        if step not in kept:
            shutil.rmtree(folder(run) / tag(step), ignore_errors=True)
    clear_partial(run, before=newest)


def clear_partial(run: Path, before: int | None = None) -> None:
    """Deletes what was cut short, of steps below `before`; no other process may be writing there."""
    for path in folder(run).glob(f"step_*{PART}"):
        if before is None or path.name < tag(before):
            shutil.rmtree(path, ignore_errors=True)


def load(
    run: Path, step: int, state: ShardedState, shapes: dict[str, list[int]]
) -> tuple[Manifest, dict[str, Tensor]]:
    """Loads this rank's shards from a checkpoint of any number of ranks and any ZeRO stage; all ranks call it.

    Returns:
        The manifest, and the small tensors beside the shards.

    Raises:
        CheckpointError: it is damaged, or of other parameters.
    """
    where = folder(run) / tag(step)
    manifest = Manifest.read(where)
    if others := sorted(n for n in shapes.keys() | manifest.shapes.keys() if shapes.get(n) != manifest.shapes.get(n)):
        shown = "; ".join(f"{n}: {manifest.shapes.get(n)} -> {shapes.get(n)}" for n in others[:4])
        raise CheckpointError(
            f"{where} is of another student: {len(others)} parameters have other shapes ({shown}); go on with that "
            "student, or start from its weights by student_weights=... in a new folder"
        )
    reader = Reader(where, manifest)
    for shard in state.shards:
        for kind, live in state.tensors(shard).items():
            live.copy_(reader.read(kind, shard.parameter, shard.start, shard.numel))
    state.set_updates(manifest.updates)
    state.publish()
    return manifest, reader.state()


def load_statistics(statistics: TeacherStatistics, tensors: dict[str, Tensor]) -> None:
    """Loads the teachers' statistics; CheckpointError if they are of another convention."""
    try:
        statistics.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            "the checkpoint's statistics of the teachers are of another standardization.convention: take that change "
            "back, or start a new run with another name=..."
        ) from error


def clear(run: Path) -> None:
    """Deletes what an earlier run left in the folder: checkpoints, metrics, results; other files stay."""
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in (
        "metrics.jsonl",
        "log.txt",
        "run.json",
        "config.yaml",
        "encoder.safetensors",
        "student.safetensors",
        "drift.json",
        "held_out.json",
        "pca.png",
        "loss.png",
    ):
        (run / name).unlink(missing_ok=True)
    for pattern in ("quarantine.rank*.jsonl", "nonfinite_step_*.safetensors"):
        for path in run.glob(pattern):
            path.unlink(missing_ok=True)


def _cpu(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}


def export(run: Path, cfg: RunConfig, student: Student, statistics: TeacherStatistics) -> None:
    """Writes `encoder.safetensors`, `student.safetensors` (with projectors and statistics) and `config.yaml`."""
    dump_config(cfg, run / "config.yaml")
    everything = _cpu(student) | _cpu(statistics, "teacher_norms.")
    for name, tensors in (("encoder", _cpu(student.encoder)), ("student", everything)):
        partial = run / f".{name}.safetensors.part"
        try:
            write_tensors(partial, tensors, architecture_metadata(cfg.student))
            partial.replace(run / f"{name}.safetensors")
        finally:
            partial.unlink(missing_ok=True)


def load_run(run: Path) -> tuple[RunConfig, Student, TeacherStatistics]:
    """Configuration, student and teachers' statistics of a run, in evaluation mode.

    Args:
        run: the folder of a run, finished or not (its newest checkpoint then, which is said), or of a checkpoint.

    Raises:
        ConfigError: `run` is not a run's folder.
        CheckpointError: the checkpoint is damaged.
        TeacherWeightsError: the run has not saved anything yet, or its weights are damaged.
    """
    path = weights_in(run, STUDENT)
    if path is None:
        load_config(run / "config.yaml")  # says so where this is no run at all
        raise TeacherWeightsError(f"{run}: the run has not ended, and there is no checkpoint of it yet")
    if path.is_dir():
        manifest, state = checkpoint_state(path)
        cfg = config_of(manifest.config, path)
    else:
        cfg = load_config(path.parent / "config.yaml")
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
    statistics = TeacherStatistics(cfg.teacher_features, cfg.standardization.convention, cfg.standardization.eps)
    try:
        state = state if path.is_dir() else load_file(path)
        norms = {k.removeprefix("teacher_norms."): state.pop(k) for k in list(state) if k.startswith("teacher_norms.")}
        student.load_state_dict(state)
        statistics.load_state_dict(norms)
    except Exception as error:
        raise TeacherWeightsError(
            f"{path} is damaged or of another configuration: {str(error).splitlines()[0]}"
        ) from error
    return cfg, student.eval(), statistics
