"""Trained models by a path or a published name: `dune_fast.load_encoder`, `dune_fast.load_model`.

What a path may be: the folder of a run (its newest checkpoint if it has not ended) or of a checkpoint; a run's
`encoder.safetensors`, `student.safetensors` or, beside an average, `student_raw.safetensors`; an exported
`encoder.safetensors`; a published checkpoint, DUNE's (`.pth`), RADIO's or Theia's; a state dict of a ViT, by itself or
below any prefix, as `.pth` or `.safetensors`. A published name stands for `<name>.pth`, or RADIO's own file, in the
folder $DUNE_FAST_WEIGHTS,
`weights` by default. Nothing is downloaded and no file can run code.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.engine.checkpoints import RAW, STUDENT, load_run
from dune_fast.engine.config import load_config
from dune_fast.kernels.nn.encoders import ENCODERS, encoder_class, network
from dune_fast.kernels.nn.radio import RADIOConfig, RADIOViT
from dune_fast.kernels.nn.vit import VisionTransformer, plain
from dune_fast.projectors.base import Projection
from dune_fast.released import load_released
from dune_fast.released_radio import PUBLISHED_RADIO, load_released_radio, nominal
from dune_fast.released_theia import load_theia
from dune_fast.student import Student
from dune_fast.teachers.architecture import stored_architecture, stored_statistics
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError, container_state, read_container
from dune_fast.teachers.encoder_names import beside_encoder
from dune_fast.teachers.local_paths import local_path
from dune_fast.teachers.registry import recognize, vit_family
from dune_fast.teachers.weights import build_loaded, folder_weights

PUBLISHED = (
    "dune_vitbase14_336",
    "dune_vitbase14_448",
    "dune_vitbase14_448_paper",
    "dune_vitsmall14_336",
    "dune_vitsmall14_448",
)
"""Checkpoints that DUNE's authors have published, by the stems of their files: whole students."""

PUBLISHED_ENCODERS = {"unic": "unic_vitb16", "unic_l": "unic_vitl14"}
"""Checkpoints that UNIC's authors have published, by the stems of their files: the encoder is read, nothing else. They
are teachers too, by the names on the right."""

_ARCHIVES = (".pth", ".pt", ".pth.tar")


class ModelNotFoundError(ValueError):
    """There is no model of this path or name; the message says what there is and where a file is to be put."""


class DistilledModel(nn.Module):
    """A trained student: the encoder, a projector for every teacher, and the statistics of the teachers' features."""

    def __init__(self, student: Student, statistics: TeacherStatistics) -> None:
        super().__init__()
        self.student, self.statistics = student, statistics

    @property
    def encoder(self) -> VisionTransformer:
        """The encoder alone."""
        return self.student.encoder

    @property
    def teachers(self) -> list[str]:
        """Names of the teachers that it was distilled from."""
        return list(self.student.projectors)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The encoder's features of [B, 3, H, W], see `VisionTransformer.forward`."""
        return self.encoder(images)

    def get_intermediate_layers(self, images: Tensor, *args: Any, **kwargs: Any) -> tuple:
        """The encoder's, see `VisionTransformer.get_intermediate_layers`."""
        return self.encoder.get_intermediate_layers(images, *args, **kwargs)

    def projections(self, images: Tensor, standardized: bool = True) -> dict[str, Projection]:
        """What the student takes each teacher's features to be: teacher -> token type -> [B, C] or [B, N, C].

        Args:
            images: [B, 3, H, W].
            standardized: as the losses compare them; False gives the teachers' own scale and basis.
        """
        projected = self.student(images)
        return projected if standardized else self.statistics.restored(projected)


def load_encoder(
    path_or_name: str | os.PathLike,
    device: torch.device | str = "cpu",
    *,
    num_heads: int | None = None,
    interpolate_offset: float | None = None,
    interpolate_antialias: bool | None = None,
) -> VisionTransformer:
    """A trained encoder, float32, frozen, in evaluation mode.

    Args:
        path_or_name: see the top of this file. A file that is neither a run's nor an export of ours is of the family
            that `dune-fast teachers verify` says: it resizes positions as that family's release does.
        num_heads: attention heads, where a file does not say them and they are not channels / 64.
        interpolate_offset, interpolate_antialias: how positions are resized for other sizes, see `ViTConfig`; None for
            the file's or its family's own way.

    Returns:
        `model(images)` gives `x_norm_clstoken` [B, D], `x_norm_regtokens` [B, R, D], `x_norm_patchtokens` [B, N, D] and
        `x_prenorm` [B, 1 + R + N, D] of images [B, 3, H, W] that `model.transform` makes; `model` has what users of
        DINOv2 read, such as `get_intermediate_layers`.

    Raises:
        ModelNotFoundError: there is no such file, run or name.
        TeacherWeightsError: the file is damaged, unsafe, another model's, or has tensors inside the encoder that have
            no place in it.
        ConfigError: `config.yaml` is wrong.
    """
    path = locate(path_or_name)
    if path.is_dir():
        if (path / "config.yaml").is_file():
            load_config(path / "config.yaml").head.refuse(path)
        path = _in_folder(path, "encoder.safetensors", "model.safetensors")
    content = read_container(path)
    asked = TeacherConfig(
        num_heads=num_heads, interpolate_offset=interpolate_offset, interpolate_antialias=interpolate_antialias
    )
    name = recognize(container_state(content, path), path) or "dune"
    family = vit_family(name)
    if name == "dbotft":
        raise TeacherWeightsError(
            f"{path} is dBOT fine-tuned, whose class token is a norm of the patches' mean: an encoder of this kind has "
            "none; use it as a teacher, family: dbotft"
        )
    if family.network not in {encoder_class(known) for known in ENCODERS}:
        raise TeacherWeightsError(
            f"{path} is of the family {name}, whose network is another than a student's encoder; use it as a teacher, "
            f"family: {name}"
        )
    config = path.parent / "config.yaml"
    if path.suffix == ".safetensors" and stored_architecture(path) is None and config.is_file():
        state = family.convert(container_state(content, path), path)
        architecture = plain(load_config(config).student)  # as runs of the first version left them
    else:
        architecture, state = family.read_content(content, path, asked)
    stored = stored_statistics(path)
    if isinstance(architecture, RADIOConfig) and stored is None:
        architecture = nominal(architecture, content, path)
    built = build_loaded(lambda: network(architecture)(architecture), state, path, beside_encoder)
    assert isinstance(built, VisionTransformer)
    built.mean, built.std = stored or family.statistics
    return (built.plain() if isinstance(built, RADIOViT) else built).to(device)


def _in_folder(path: Path, *names: str) -> Path:
    """The file or checkpoint that a folder stands for; ModelNotFoundError if there is none."""
    try:
        return folder_weights(path, *names)
    except TeacherWeightsError as error:
        raise ModelNotFoundError(str(error)) from error


def load_model(path_or_name: str | os.PathLike, device: torch.device | str = "cpu") -> DistilledModel:
    """A trained student with its projectors and the teachers' statistics, float32, frozen, in evaluation mode.

    What `path_or_name` may be, see the top of this file; a file with the encoder alone is refused. Raises as
    `load_encoder`.
    """
    path, file = locate(path_or_name), STUDENT
    if path.name in (STUDENT, RAW):
        path, file = path.parent, path.name
    if path.is_dir():
        _in_folder(path, file)  # says what is missing
        _, student, statistics = load_run(path, file)
    else:
        student, statistics = _released(path)
    if isinstance(student.encoder, RADIOViT):
        student.encoder.plain()
    return DistilledModel(student, statistics).eval().requires_grad_(False).to(device)


def _released(path: Path) -> tuple[Student, TeacherStatistics]:
    """The whole model of a published container: RADIO's, Theia's, else DUNE's."""
    content = read_container(path)
    try:
        name = recognize(container_state(content, path), path)
    except TeacherWeightsError:
        name = None  # the other reader says what is wrong
    if name == "theia":
        return load_theia(path)
    if path.suffix == ".safetensors":
        raise ModelNotFoundError(
            f"{path} holds an encoder without projectors: load it with load_encoder, or give the folder of its run"
        )
    return load_released_radio(content, path) if name == "radio" else load_released(path)


def locate(path_or_name: str | os.PathLike) -> Path:
    """The file or the run's folder that a path or a published name stands for.

    ModelNotFoundError if there is none, AddressError for an address of an object store.
    """
    path = local_path(path_or_name, "the model")
    if path.is_dir() or (path.is_file() and path.name.endswith((".safetensors", *_ARCHIVES))):
        return path
    if path.is_file():
        raise ModelNotFoundError(f"{path} is neither a .safetensors nor a .pth file, nor the folder of a run")
    name = str(path_or_name)
    folder = local_path(os.environ.get("DUNE_FAST_WEIGHTS") or "weights", "the variable DUNE_FAST_WEIGHTS")
    published = (*PUBLISHED, *PUBLISHED_ENCODERS, *PUBLISHED_RADIO)
    if name in PUBLISHED_RADIO:
        if (file := folder / PUBLISHED_RADIO[name].file).is_file():
            return file
        raise ModelNotFoundError(
            f"the weights of {name} are not here: get {PUBLISHED_RADIO[name].file} from its publishers "
            f"(huggingface.co/nvidia) and put it at {file} (set DUNE_FAST_WEIGHTS for another folder), or give the "
            "file's path"
        )
    if name in published:
        for file in (folder / f"{name}{suffix}" for suffix in _ARCHIVES):
            if file.is_file():
                return file
        raise ModelNotFoundError(
            f"the weights of {name} are not here: `dune-fast teachers fetch {PUBLISHED_ENCODERS.get(name, name)}` gets "
            f"them from their publishers; or put it at {folder / name}.pth yourself (set DUNE_FAST_WEIGHTS for another "
            "folder), or give the file's path"
        )
    here = [known for known in published if (folder / f"{known}.pth").is_file()]
    here += [known for known, released in PUBLISHED_RADIO.items() if (folder / released.file).is_file()]
    runs = sorted(str(found.parent) for found in Path("runs").glob("*/encoder.safetensors"))
    raise ModelNotFoundError(
        f"there is no model {name!r}: give a run's folder ({', '.join(runs) or 'none in runs/'}), a .safetensors or "
        f".pth file, or one of the published names {', '.join(published)} (in {folder}: {', '.join(here) or 'none'})"
    )
