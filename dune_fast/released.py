"""DUNE's published checkpoints: encoder, projectors and teachers' statistics out of their container."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any

from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.nn.projectors import ProjectorConfig
from dune_fast.nn.student import Student
from teachers.architecture import infer_vit
from teachers.containers import TeacherWeightsError, below, check_storage, is_state, read_container, strip_wrappers
from teachers.dune import flat_blocks
from teachers.weights import build_loaded


def load_released(path: Path) -> tuple[Student, TeacherStatistics]:
    """Student and teachers' statistics of a published DUNE checkpoint, float32, frozen, in evaluation mode.

    Raises:
        TeacherWeightsError: damaged, unsafe, incomplete, or another kind of checkpoint.
    """
    content = read_container(path)
    if not is_state(content.get("model")):
        raise TeacherWeightsError(f"{path} has no weights under 'model': it is not a DUNE checkpoint")
    check_storage(content["model"], path)
    args = content.get("args")
    options = vars(args) if isinstance(args, argparse.Namespace) else {}
    if _published_flags(options.get("dune_args"), path).get("last_enc_norm", False):
        raise TeacherWeightsError(f"{path} feeds normalised tokens to its projectors, which no published result does")
    state = flat_blocks(strip_wrappers(content["model"]))
    statistics_state = below(state, "teacher_norms.")
    teachers: dict[str, tuple[int, list[str]]] = {}
    for key, value in sorted(statistics_state.items()):  # <teacher>.normalizers.<token>.mean: cls before patch
        match key.split("."):
            case [name, _, token, "mean"]:
                teachers.setdefault(name, (value.numel(), []))[1].append(token)
    names = options.get("teachers") or list(teachers)
    if missing := [name for name in names if name not in teachers] or (not teachers and ["every teacher"]):
        raise TeacherWeightsError(f"{path} has no statistics (teacher_norms.*) of {', '.join(missing)}")
    if lacking := [name for name in names if f"projectors.{name}.linear.weight" not in state]:
        raise TeacherWeightsError(
            f"{path} has no transformer projectors (projectors.*.linear) for {', '.join(lacking)}; "
            "dune_fast.load_encoder reads its encoder alone"
        )
    encoder = infer_vit(below(state, "encoder."), path)
    projector = ProjectorConfig(num_heads=(options.get("proj_args") or {}).get("num_heads"))
    widths = {name: teachers[name] for name in names}
    weights = {key: value for key, value in state.items() if not key.startswith("teacher_norms.")}
    flat = {key: value.reshape(-1) for key, value in statistics_state.items()}
    any_name = ("",)  # releases carry more than the model; what is missing is an error, what is too much is not
    student = build_loaded(lambda: Student(encoder, projector, widths), weights, path, unused=any_name)
    statistics = build_loaded(lambda: TeacherStatistics(widths), flat, path, unused=any_name)
    assert isinstance(student, Student) and isinstance(statistics, TeacherStatistics)
    return student, statistics


def _published_flags(text: Any, path: Path) -> dict[str, Any]:
    """The dictionary that older releases keep as a string; parsed, never evaluated."""
    if text is None:
        return {}
    try:
        flags = ast.literal_eval(text) if isinstance(text, str) else dict(text)
    except (ValueError, SyntaxError) as error:
        raise TeacherWeightsError(f"{path}: its argument 'dune_args' is not a plain dictionary") from error
    return flags if isinstance(flags, dict) else {}
