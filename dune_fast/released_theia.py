"""Theia's containers: encoder and translators under their published names, in both directions.

    backbone.model.<Hugging Face's names of a ViT>      translator.translator_heads.<teacher>.{pad.1,adapter.N}.*

Of the translators lconv is known, which all released models have; a head called `<teacher>_cls` is of cls tokens. The
statistics that the teachers' features were standardized with are not in there: they are NaN until somebody gives them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.kernels.nn.vit import plain
from dune_fast.projectors.base import TeacherFeatures
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import Student, StudentConfig
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError, below, container_state, read_container
from dune_fast.teachers.hf_vit import CONTAINER, NAMES, PARTS, TheiaTeacher
from dune_fast.teachers.weights import build_loaded

TRANSLATOR, HEADS, CLS = "translator.", "translator.translator_heads.", "_cls"

PUBLISHED = {
    "clip": "openai/clip-vit-large-patch14",
    "dinov2": "facebook/dinov2-large",
    "vit": "google/vit-huge-patch14-224-in21k",
    "sam": "facebook/sam-vit-huge",
    "depth_anything": "LiheYoung/depth-anything-large-hf",
}
"""Teacher of `experiment=theia` -> its name in the containers; others keep their own."""
OURS = {name: ours for ours, name in PUBLISHED.items()}


def load_theia(path: Path) -> tuple[Student, TeacherStatistics]:
    """Student and statistics (NaN) of a container, float32, frozen, in evaluation mode.

    Raises:
        TeacherWeightsError: damaged, unsafe, incomplete, or with another translator than lconv.
    """
    content = read_container(path)
    state = container_state(content, path)
    architecture, encoder = TheiaTeacher.read_content(content, path, TeacherConfig())
    if beside := sorted(key for key in state if key.startswith(TRANSLATOR) and not key.startswith(HEADS)):
        raise TeacherWeightsError(f"{path} has {beside[0]}, which is of another translator than lconv")
    heads: dict[str, dict[str, Tensor]] = {}
    for key, value in below(state, HEADS).items():
        name, _, rest = key.partition(".")
        heads.setdefault(name, {})[rest] = value
    if not heads:
        raise TeacherWeightsError(f"{path} has no translators ({HEADS}*); dune_fast.load_encoder reads its encoder")
    teachers: dict[str, TeacherFeatures] = {}
    weights = {f"encoder.{key}": value for key, value in encoder.items()}
    factors = set()
    for name, tensors in sorted(heads.items(), key=lambda item: not item[0].endswith(CLS)):  # cls before patch
        where = f"{path}, translator of {name}"
        of_cls = _tensor(tensors, "adapter.0.weight", where).ndim == 2
        base = name.removesuffix(CLS) if of_cls else name
        ours = OURS.get(base, base)
        known = teachers.get(ours, TeacherFeatures(0, ()))
        if of_cls:
            channels, grid, token = len(tensors["adapter.0.weight"]), known.grid, "cls"
            renamed = {key.replace("adapter.0.", "cls."): value for key, value in tensors.items()}
        else:
            (channels, grid, hidden), token = _sizes(tensors, where), "patch"
            factors.add(hidden / architecture.embed_dim)
            renamed = {f"patch.{key}": value for key, value in tensors.items()}
        teachers[ours] = TeacherFeatures(channels, (*known.token_types, token), "", grid)
        weights |= {f"projectors.{ours}.{key}": value for key, value in renamed.items()}
    if len(factors) > 1:
        raise TeacherWeightsError(f"{path} has translators of several hidden sizes, {sorted(factors)} of the encoder's")
    cfg = StudentConfig(**asdict(plain(architecture)), family="theia", normed=True)
    projector = ProjectorConfig("theia", hidden_factor=factors.pop() if factors else 1.0)
    try:
        with torch.device("meta"):
            Student(cfg, projector, teachers)
    except ValueError as error:  # grids that no translator leads between
        raise TeacherWeightsError(f"{path}: {error}") from error
    student = build_loaded(lambda: Student(cfg, projector, teachers), weights, path)
    assert isinstance(student, Student)
    statistics = TeacherStatistics(teachers, "stored").eval().requires_grad_(False)
    return student, statistics


def _tensor(tensors: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    if name not in tensors:
        raise TeacherWeightsError(f"{where} lacks {name}")
    return tensors[name]


def _sizes(tensors: Mapping[str, Tensor], where: str) -> tuple[int, int, int]:
    """(the teacher's channels, side of its grid, hidden channels) of an lconv head."""
    layers = sorted(int(name[1]) for key in tensors if (name := re.fullmatch(r"adapter\.(\d+)\.weight", key)))
    last = _tensor(tensors, f"adapter.{layers[-1]}.weight", where)
    norms = [x for layer in layers if (x := tensors[f"adapter.{layer}.weight"]).ndim == 3]
    if last.ndim != 2 or len(norms) < 2:
        raise TeacherWeightsError(f"{where} is no lconv: LayerNorms of maps around convolutions, then a linear layer")
    return last.shape[0], norms[-1].shape[-1], norms[-1].shape[0]


def published_state(student: Student) -> dict[str, Tensor]:
    """All tensors of a student of Theia's by their published names, on the CPU."""
    state: dict[str, Tensor] = {}
    for key, value in student.encoder.state_dict().items():
        if ".attn.qkv." in key:
            for part, rows in zip(PARTS, value.chunk(3), strict=True):
                state[_hugging_face(key.replace("qkv.", part))] = rows
        else:
            state[_hugging_face(key)] = value
    state = {CONTAINER + key: value for key, value in state.items()}
    for name, projector in student.projectors.items():
        head = HEADS + PUBLISHED.get(name, name).replace(".", "_")
        for key, value in projector.state_dict().items():
            if key.startswith("cls."):
                state[f"{head}{CLS}.adapter.0.{key.removeprefix('cls.')}"] = value
            else:
                state[head + key.removeprefix("patch")] = value
    return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}


def _hugging_face(key: str) -> str:
    """Our name of an encoder's tensor as transformers has it: `NAMES` the other way round."""
    for theirs, ours in NAMES:
        if ours.startswith("."):
            key = key.replace(ours, theirs)
        elif key.startswith(ours):
            key = theirs + key.removeprefix(ours)
    return key
