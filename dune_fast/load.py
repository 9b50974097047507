"""Trained models by a path or a published name: `dune_fast.load_encoder`, `dune_fast.load_model`.

What a path may be: a finished run's folder; its `encoder.safetensors` or `student.safetensors`, with `config.yaml`
beside it; an exported `encoder.safetensors`, which says its own architecture; a published checkpoint (`.pth`). A
published name stands for `<name>.pth` in the folder $DUNE_FAST_WEIGHTS, `weights` by default. Nothing is downloaded and
no file can run code.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.engine.checkpoints import load_run
from dune_fast.engine.config import load_config
from dune_fast.nn.projectors import Projection
from dune_fast.nn.student import Student
from dune_fast.nn.vit import VisionTransformer
from dune_fast.released import load_released
from teachers.architecture import infer_vit, stored_architecture
from teachers.containers import container_state, read_container
from teachers.dune import encoder_state
from teachers.weights import build_loaded

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

_ARCHIVES = (".pth", ".pt")


class ModelNotFoundError(ValueError):
    """There is no model of this path or name; the message says what there is and where a file is to be put."""


class DistilledModel(nn.Module):
    """A trained student: the encoder, a projector for every teacher, and the teachers' statistics.

    Args:
        student: encoder and projectors.
        statistics: means and deviations of the teachers' features.
    """

    def __init__(self, student: Student, statistics: TeacherStatistics) -> None:
        super().__init__()
        self.student = student
        self.statistics = statistics

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
        """What the student takes each teacher's features to be.

        Args:
            images: [B, 3, H, W].
            standardized: as the losses compare them; False gives the teachers' own scale and basis.

        Returns:
            teacher -> token type -> [B, C] or [B, N, C].
        """
        projected = self.student(images)
        if standardized:
            return projected
        return self.statistics.restored(projected)


def load_encoder(path_or_name: str | os.PathLike, device: torch.device | str = "cpu") -> VisionTransformer:
    """A trained encoder, float32, frozen, in evaluation mode.

    Args:
        path_or_name: see the top of this file.
        device: where it goes.

    Returns:
        `model(images)` gives `x_norm_clstoken` [B, D], `x_norm_regtokens` [B, R, D], `x_norm_patchtokens` [B, N, D] and
        `x_prenorm` [B, 1 + R + N, D] of ImageNet-normalised images [B, 3, H, W]; `model.get_intermediate_layers` as in
        DINOv2.

    Raises:
        ModelNotFoundError: there is no such file, run or name.
        TeacherWeightsError: the file is damaged, unsafe, or another model's.
        ConfigError: `config.yaml` is missing or wrong.
    """
    path = locate(path_or_name)
    if path.is_dir():
        path = path / "encoder.safetensors"
        if not path.is_file():
            begun = (path.parent / "config.yaml").is_file()
            why = "the run has not ended; go on with it first" if begun else f"{path.parent} is not the folder of a run"
            raise ModelNotFoundError(f"{path} does not exist: {why}")
    state = encoder_state(container_state(read_container(path), path), path)
    if path.suffix == ".safetensors":
        architecture = stored_architecture(path) or load_config(path.parent / "config.yaml").student
        unused: tuple[str, ...] = ()
    else:
        architecture = infer_vit(state, path)
        unused = ("",)  # published files may hold more than the model; what is missing is an error
    built = build_loaded(lambda: VisionTransformer(architecture), state, path, unused)
    assert isinstance(built, VisionTransformer)
    return built.to(device)


def load_model(path_or_name: str | os.PathLike, device: torch.device | str = "cpu") -> DistilledModel:
    """A trained student with its projectors and the teachers' statistics, frozen, in evaluation mode.

    Args:
        path_or_name: see the top of this file; a file with the encoder alone is refused.
        device: where it goes.

    Raises:
        As `load_encoder`.
    """
    path = locate(path_or_name)
    if path.name == "student.safetensors":
        path = path.parent
    if path.is_dir():
        _, student, statistics = load_run(path)
    elif path.suffix == ".safetensors":
        raise ModelNotFoundError(
            f"{path} holds an encoder without projectors: load it with load_encoder, or give the folder of its run"
        )
    else:
        student, statistics = load_released(path)
    return DistilledModel(student, statistics).eval().requires_grad_(False).to(device)


def weights_folder() -> Path:
    """Where published files are looked for: $DUNE_FAST_WEIGHTS, or `weights` in the working directory."""
    return Path(os.environ.get("DUNE_FAST_WEIGHTS") or "weights").expanduser()


def locate(path_or_name: str | os.PathLike) -> Path:
    """The file or the run's folder that a path or a published name stands for; ModelNotFoundError if there is none."""
    path = Path(path_or_name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix in (".safetensors", *_ARCHIVES)):
        return path
    if path.is_file():
        raise ModelNotFoundError(f"{path} is neither a .safetensors nor a .pth file, nor the folder of a run")
    name = str(path_or_name)
    folder = weights_folder()
    published = (*PUBLISHED, *PUBLISHED_ENCODERS)
    if name in published:
        for suffix in _ARCHIVES:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
        raise ModelNotFoundError(
            f"the weights of {name} are not here: `dune-fast teachers fetch {PUBLISHED_ENCODERS.get(name, name)}` gets "
            f"them from their publishers; or put it at {folder / name}.pth yourself (set DUNE_FAST_WEIGHTS for another "
            "folder), or give the file's path"
        )
    here = [known for known in published if (folder / f"{known}.pth").is_file()]
    runs = sorted(str(found.parent) for found in Path("runs").glob("*/encoder.safetensors"))
    raise ModelNotFoundError(
        f"there is no model {name!r}: give a run's folder ({', '.join(runs) or 'none in runs/'}), a .safetensors or "
        f".pth file, or one of the published names {', '.join(published)} (in {folder}: {', '.join(here) or 'none'})"
    )
