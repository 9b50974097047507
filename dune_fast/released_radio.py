"""RADIO's containers as a whole: the backbone, and the heads for its teachers ("adaptors") as a student's projectors.

A teacher NAME of the container becomes two: `NAME`, patches of its feature head, and `NAME_summary`, what its summary
head makes of its own summary token. Both are in the teacher's own scale, so the statistics change nothing. What the
arguments in the container say of the heads is held against the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.kernels.nn.radio import RADIOConfig, RADIOViT
from dune_fast.projectors.base import TeacherFeatures
from dune_fast.projectors.config import HEAD_VERSIONS, HeadShape, ProjectorConfig
from dune_fast.projectors.heads import ATTENTION_HEADS
from dune_fast.student import Student, StudentConfig
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError, below, container_state
from dune_fast.teachers.dune import container_options
from dune_fast.teachers.encoder_names import beside_encoder
from dune_fast.teachers.radio import RADIOTeacher, model_arguments, plain_weights
from dune_fast.teachers.weights import build_loaded


class Release(NamedTuple):
    """A file that RADIO's authors have published."""

    file: str
    size: int
    """Preferred side of images in pixels."""


PUBLISHED_RADIO = {
    "radio_v2.5-b": Release("radio-v2.5-b_half.pth.tar", 768),
    "radio_v2.5-l": Release("radio-v2.5-l_half.pth.tar", 768),
    "radio_v2.5-h": Release("radio_v2.5-h.pth.tar", 768),
    "radio_v2.5-h-norm": Release("radio_v2.5-h-norm.pth.tar", 768),
    "radio_v2.5-g": Release("radio_v2.5-g.pth.tar", 896),
    "radio_v2.1": Release("radio_v2.1_bf16.pth.tar", 432),
    "radio_v2": Release("radio_v2.pth.tar", 432),
    "radio_v1": Release("radio_v1.pth.tar", 378),
    "c-radio_v3-b": Release("c-radio_v3-b_half.pth.tar", 512),
    "c-radio_v3-l": Release("c-radio-v3_l_half.pth.tar", 512),
    "c-radio_v3-h": Release("c-radio_v3-h_half.pth.tar", 512),
    "c-radio_v3-g": Release("c-radio_v3-g_half.pth.tar", 512),
    "c-radio_v4-so400m": Release("c-radio_v4-so400m_half.pth.tar", 512),
    "c-radio_v4-h": Release("c-radio_v4-h_half.pth.tar", 512),
}
"""Published name -> release."""
_SIZE = 512
"""Of images for a container that says none."""
SUMMARY = "_summary"
"""Ends the name of what reads a teacher's summary token."""
_MOST_UPSAMPLING = 64


class Adaptor(NamedTuple):
    """One teacher of a container."""

    name: str
    slot: int
    """Its summary token among the backbone's."""
    heads: dict[str, tuple[HeadShape, int, dict[str, Tensor]]]
    """"cls" and "patch", those that there are -> shape, output channels, tensors by our names."""


def adaptors(content: Mapping[str, Any], path: Path) -> list[Adaptor]:
    """The heads of a container, of teachers with one name the first's.

    TeacherWeightsError where its arguments and its tensors contradict each other.
    """
    args, state = container_options(content), container_state(content, path)
    teachers = args["teachers"]
    names = list(dict.fromkeys(teacher["name"] for teacher in teachers))
    shared = not args.get("cls_token_per_teacher", True)
    found = []
    for i, teacher in enumerate(teachers):
        name = teacher["name"]
        if any(adaptor.name == name for adaptor in found):
            continue
        slot = 0 if shared else teacher.get("token_slot", names.index(name))
        if type(slot) is not int or not 0 <= slot < (1 if shared else len(names)):
            raise TeacherWeightsError(f"{path}: {name} reads the summary token {slot!r} of {len(names)}")
        heads = {}
        for token, group in (("cls", "_heads"), ("patch", "_feature_projections")):
            tensors = next(filter(None, (below(state, f"{group}.{key}.") for key in (i, name))), None)
            if tensors is not None:
                heads[token] = _head(tensors, _version(args, teacher, token, path), teacher, token, path)
        found.append(Adaptor(name, slot, heads))
    if not any(adaptor.heads for adaptor in found):
        raise TeacherWeightsError(f"{path} has a backbone without heads: load it with load_encoder")
    return found


def _version(args: Mapping[str, Any], teacher: Mapping[str, Any], token: str, path: Path) -> str:
    """The version of one head; see the containers' rules."""
    # newer files say of a teacher's summary head what older ones said without `summary_`
    asked = [(teacher, "summary_mlp_version"), (teacher, "mlp_version"), (args, "mlp_version")]
    if token == "patch":
        asked = [(teacher, "spatial_mlp_version"), (args, "spatial_mlp_version"), (args, "mlp_version")]
    version = next((found for where, key in asked if (found := where.get(key))), "v1")
    if version not in HEAD_VERSIONS:
        known = ", ".join(HEAD_VERSIONS)
        raise TeacherWeightsError(f"{path}: {teacher['name']} has a head of version {version!r}; known are {known}")
    return version


def _head(
    tensors: dict[str, Tensor], version: str, teacher: Mapping[str, Any], token: str, path: Path
) -> tuple[HeadShape, int, dict[str, Tensor]]:
    """Shape, output channels and plain tensors of one head."""
    where = f"{path}, {'summary' if token == 'cls' else 'feature'} head of {teacher['name']}"
    if version == "attn" and token == "cls":
        raise TeacherWeightsError(f"{where}: it has attention (version attn), but reads a single token")
    tensors = plain_weights(tensors, path)
    mlp = below(tensors, "mlp.") if version == "attn" else tensors
    factor = teacher.get("fd_upsample_factor") or 1 if token == "patch" and version != "v1" else 1
    if type(factor) is not int or not 1 <= factor <= _MOST_UPSAMPLING:
        raise TeacherWeightsError(f"{where}: fd_upsample_factor is {factor!r}; give 1 to {_MOST_UPSAMPLING}")
    try:
        hidden = mlp["fc1.weight"].shape[0]
        outputs = mlp["fc2.weight" if version == "v1" else "final.2.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise TeacherWeightsError(f"{where}: a head of version {version} has {error}, this one has not") from error
    if outputs % factor**2 or not hidden:
        raise TeacherWeightsError(
            f"{where}: {hidden} hidden and {outputs} output channels are impossible with {factor} x {factor} tokens "
            "for each patch"
        )
    if version == "attn" and tensors.get("blocks.0.norm1.weight", mlp["fc1.weight"][0]).shape[0] % ATTENTION_HEADS:
        raise TeacherWeightsError(f"{where}: its channels are no multiple of {ATTENTION_HEADS} attention heads")
    first, step = ("inner", 3) if version == "v1" else ("blocks", 1)
    places = {int(key.split(".")[1]) for key in mlp if key.startswith(f"{first}.") and key.split(".")[1].isdecimal()}
    count = 1 + max(places, default=-1) // step if version != "attn" else 0
    if count > len(mlp):
        raise TeacherWeightsError(f"{where}: it has a layer {first}.{max(places)}, but not those before it")
    shape = HeadShape(
        version, hidden, count, "pre_norm.0.weight" in mlp, "fc1.bias" in mlp, factor, upsample_rank=hidden
    )
    return shape, outputs // factor**2, tensors


def nominal(architecture: RADIOConfig, content: Mapping[str, Any], path: Path) -> RADIOConfig:
    """A container's backbone with the size of images that its release prefers, else that of its arguments."""
    preferred = next((release.size for release in PUBLISHED_RADIO.values() if release.file == path.name), 0)
    stated = model_arguments(content).get("img_size")
    size = preferred or (stated if type(stated) is int and stated > 0 else _SIZE)
    patch = architecture.patch_size
    size = min(max(1, round(size / patch)) * patch, architecture.image_size)
    return architecture.made_for(size) if architecture.cropped else architecture


def load_released_radio(content: Mapping[str, Any], path: Path) -> tuple[Student, TeacherStatistics]:
    """Backbone and heads of a RADIO container, float32, frozen, in evaluation mode; statistics that change nothing.

    Images are [B, 3, H, W], normalised as `student.encoder.transform` says.

    Raises:
        TeacherWeightsError: incomplete, or not as its arguments say.
    """
    architecture, encoder = RADIOTeacher.read_content(content, path, TeacherConfig())
    assert isinstance(architecture, RADIOConfig)
    architecture = nominal(architecture, content, path)
    features: dict[str, TeacherFeatures] = {}
    shapes: dict[str, dict[str, Any]] = {}
    weights = {f"encoder.{key}": value for key, value in encoder.items()}
    slots = {}
    for adaptor in adaptors(content, path):
        for token, (shape, channels, tensors) in adaptor.heads.items():
            name = adaptor.name.replace(".", "_") + (SUMMARY if token == "cls" else "")
            if name in features:
                raise TeacherWeightsError(f"{path} has two heads for {name}; give its teachers other names")
            features[name] = TeacherFeatures(channels, (token,), adaptor.name)
            shapes[name] = {f"{token}_head": vars(shape)}
            slots[name] = adaptor.slot
            weights |= {f"projectors.{name}.{token}.{key}": value for key, value in tensors.items()}
    fields = {key: value for key, value in vars(architecture).items() if key in StudentConfig.__dataclass_fields__}
    cfg = StudentConfig(**fields | {"family": "radio", "normed": architecture.final_norm})

    def build() -> Student:
        student = Student(cfg, ProjectorConfig(kind="heads", teachers=shapes), features)
        student.encoder = RADIOViT(architecture)
        student.projectors.read_slots(slots, architecture.num_cls)
        return student

    student = build_loaded(build, weights, path, _beside)
    assert isinstance(student, Student)
    student.encoder.mean, student.encoder.std = RADIOTeacher.statistics
    statistics = TeacherStatistics(features).eval().requires_grad_(False)
    return student, statistics


def _beside(name: str) -> bool:
    """Whether a tensor changes nothing: of parts that read the backbone's finished tokens."""
    return name.startswith("encoder.") and beside_encoder(name.removeprefix("encoder."))
