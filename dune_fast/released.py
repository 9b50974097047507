"""DUNE's published checkpoints: encoder, projectors and teachers' statistics out of their container.

What its trainer writes is read with every option of its encoder and projectors: those that change nothing but the
tensors' names (`qkv_bias`, `ln_affine`) by the tensors that are left out, a projector's `scale` by its last layer.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import Student
from dune_fast.teachers.architecture import infer_vit
from dune_fast.teachers.containers import (
    TeacherWeightsError,
    below,
    check_storage,
    is_state,
    read_container,
    strip_wrappers,
)
from dune_fast.teachers.dune import container_options, encoder_options, filled, projector_options
from dune_fast.teachers.encoder_names import beside_encoder, flat_blocks
from dune_fast.teachers.weights import build_loaded


def load_released(path: Path) -> tuple[Student, TeacherStatistics]:
    """Student and teachers' statistics of a published DUNE checkpoint, float32, frozen, in evaluation mode.

    Raises:
        TeacherWeightsError: damaged, unsafe, incomplete, another kind of checkpoint, or made with options that are not
            known here.
    """
    content = read_container(path)
    if not is_state(content.get("model")):
        raise TeacherWeightsError(f"{path} has no weights under 'model': it is not a DUNE checkpoint")
    check_storage(content["model"], path)
    options = container_options(content)
    if _published_flags(options.get("dune_args"), path).get("last_enc_norm", False):
        raise TeacherWeightsError(f"{path} feeds normalised tokens to its projectors, which no published result does")
    state = flat_blocks(strip_wrappers(content["model"], path))
    statistics_state = below(state, "teacher_norms.")
    teachers: dict[str, tuple[int, list[str]]] = {}
    for key, value in sorted(statistics_state.items()):  # <teacher>.normalizers.<token>.mean: cls before patch
        match key.split("."):
            case [name, _, token, "mean"]:
                teachers.setdefault(name, (value.numel(), []))[1].append(token)
    names = list(options.get("teachers") or teachers)
    missing = [name for name in names if name not in teachers]
    if missing or not teachers:
        lacking = ", ".join(missing) or "every teacher"
        raise TeacherWeightsError(f"{path} has no statistics (teacher_norms.*) of {lacking}")
    if lacking := [name for name in names if f"projectors.{name}.linear.weight" not in state]:
        raise TeacherWeightsError(
            f"{path} has no transformer projectors (projectors.*.linear) for {', '.join(lacking)}; "
            "dune_fast.load_encoder reads its encoder alone"
        )
    encoder_tensors = filled(below(state, "encoder."), encoder_options(content, path), ("norm",))
    encoder = infer_vit(encoder_tensors, path)
    projectors = {name: released_projector(state, name, content, path) for name in names}
    kinds = [infer_projector(tensors, content, f"{path}, projector of {name}") for name, tensors in projectors.items()]
    if any(kind != kinds[0] for kind in kinds):
        raise TeacherWeightsError(f"{path} has projectors of different sizes, which no published trainer makes")
    widths = {name: teachers[name] for name in names}
    weights = {f"encoder.{key}": value for key, value in encoder_tensors.items()}
    weights |= {f"projectors.{name}.{key}": x for name, tensors in projectors.items() for key, x in tensors.items()}
    flat = {key: value.reshape(-1) for key, value in statistics_state.items()}
    student = build_loaded(lambda: Student(encoder, kinds[0], widths), weights, path, _beside)
    statistics = build_loaded(lambda: TeacherStatistics(widths), flat, path, lambda name: True)
    assert isinstance(student, Student) and isinstance(statistics, TeacherStatistics)
    return student, statistics


def released_projector(
    state: Mapping[str, Tensor], name: str, content: Mapping[str, Any], path: Path | str
) -> dict[str, Tensor]:
    """One teacher's projector by our names, its options worked in; empty if there is none of that name.

    `state` is the whole checkpoint's, wrappers stripped; `content` is the container, for its options.
    """
    options = projector_options(content, path)
    tensors = filled(below(state, f"projectors.{name}."), options, ())
    if not tensors:
        return {}
    learned = tensors.pop("scale", None)  # scale=0 asks for a factor that is learned
    scale = options.get("scale", 1.0) if learned is None else float(learned.reshape(-1)[0])
    if learned is None and scale == 0:
        raise TeacherWeightsError(f"{path} lacks projectors.{name}.scale, which its proj_args say is learned")
    if scale != 1.0:
        for key in ("linear.weight", "linear.bias"):
            if key in tensors:
                tensors[key] = tensors[key].float() * scale
    return tensors


def infer_projector(state: Mapping[str, Tensor], content: Mapping[str, Any], path: Path | str) -> ProjectorConfig:
    """The transformer projector that tensors belong to; TeacherWeightsError where the options contradict them."""
    options = projector_options(content, path)
    blocks = {int(key.split(".")[1]) for key in state if key.startswith("blocks.") and key.split(".")[1].isdecimal()}
    count = max(blocks, default=-1) + 1
    if options.get("num_blocks", count) != count:
        raise TeacherWeightsError(f"{path} has {count} blocks, its proj_args say num_blocks={options['num_blocks']}")
    hidden = state.get("blocks.0.mlp.fc1.weight")
    return ProjectorConfig(
        num_blocks=count,
        num_heads=options.get("num_heads"),
        mlp_ratio=hidden.shape[0] / hidden.shape[1] if hidden is not None and hidden.ndim == 2 else 4.0,
        layer_scale=1e-4 if "blocks.0.ls1.gamma" in state or not count else None,
    )


def _beside(name: str) -> bool:
    """Whether a student does without a tensor of this name: what an encoder does without; nothing of a projector."""
    return name.startswith("encoder.") and beside_encoder(name.removeprefix("encoder."))


def _published_flags(text: Any, path: Path) -> dict[str, Any]:
    """The dictionary that older releases keep as a string; parsed, never evaluated."""
    if text is None:
        return {}
    try:
        flags = ast.literal_eval(text) if isinstance(text, str) else dict(text)
    except (ValueError, SyntaxError, TypeError) as error:
        raise TeacherWeightsError(f"{path}: its argument 'dune_args' is not a plain dictionary") from error
    return flags if isinstance(flags, dict) else {}
