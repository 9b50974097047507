"""What a run keeps: resumable checkpoints while it trains, the student's weights when it has ended."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.engine.config import RunConfig, dump_config, load_config
from dune_fast.nn.student import Student, build_student
from teachers.weights import TeacherWeightsError

logger = logging.getLogger(__name__)

_COMPLETE = "complete"  # written after everything else of a checkpoint: what a kill cut short has none


def _folder(run: Path) -> Path:
    return run / "checkpoints"


def tag(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"step_{step:07d}"


def mark_complete(run: Path, step: int) -> None:
    """Says that every rank has written its part."""
    (_folder(run) / tag(step) / _COMPLETE).touch()


def complete_steps(run: Path) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    found = _folder(run).glob(f"step_*/{_COMPLETE}")
    return sorted(int(path.parent.name.removeprefix("step_")) for path in found)


def prune(run: Path, keep: int) -> None:
    """Deletes all but the newest `keep` complete checkpoints, and what was cut short before the newest."""
    steps = complete_steps(run)
    kept = {tag(step) for step in steps[-keep:]}
    newest = tag(steps[-1]) if steps else ""
    for path in _folder(run).glob("step_*"):
        if path.name not in kept and path.name < newest:
            shutil.rmtree(path, ignore_errors=True)


def clear(run: Path) -> None:
    """Deletes what an earlier run left in the folder: checkpoints, metrics, results; other files stay."""
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in (
        "metrics.jsonl",
        "config.yaml",
        "encoder.safetensors",
        "student.safetensors",
        "held_out.json",
        "pca.png",
        "loss.png",
    ):
        (run / name).unlink(missing_ok=True)


def _cpu(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}


def export(run: Path, cfg: RunConfig, student: Student, statistics: TeacherStatistics) -> None:
    """Writes `encoder.safetensors`, `student.safetensors` (with projectors and statistics) and `config.yaml`."""
    dump_config(cfg, run / "config.yaml")
    everything = _cpu(student) | _cpu(statistics, "teacher_norms.")
    for name, tensors in (("encoder", _cpu(student.encoder)), ("student", everything)):
        partial = run / f".{name}.safetensors.part"
        save_file(tensors, partial)
        partial.replace(run / f"{name}.safetensors")


def load_run(run: Path) -> tuple[RunConfig, Student, TeacherStatistics]:
    """Configuration, trained student and teachers' statistics of a finished run, in evaluation mode.

    Raises:
        ConfigError: `run` is not a run's folder.
        TeacherWeightsError: the run has not ended, or its weights are damaged.
    """
    cfg = load_config(run / "config.yaml")
    path = run / "student.safetensors"
    if not path.exists():
        raise TeacherWeightsError(f"{path} does not exist: the run has not ended; go on with it first")
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
    statistics = TeacherStatistics(cfg.teacher_features, cfg.standardization.convention, cfg.standardization.eps)
    try:
        state = load_file(path)
        norms = {k.removeprefix("teacher_norms."): state.pop(k) for k in list(state) if k.startswith("teacher_norms.")}
        student.load_state_dict(state)
        statistics.load_state_dict(norms)
    except Exception as error:
        raise TeacherWeightsError(
            f"{path} is damaged or of another configuration: {str(error).splitlines()[0]}"
        ) from error
    return cfg, student.eval(), statistics
