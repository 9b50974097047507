"""A student's initial weights out of an earlier model: a run, a published checkpoint, a plain encoder, and a report.

At another resolution the position table is resized as the student itself does for other sizes: it starts as exactly
the function that the first student is there.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dune_fast.engine.config import RunConfig
from dune_fast.engine.warm_start_radio import STARTED_ANEW, fitted_to_radio
from dune_fast.kernels.nn.radio import RADIOConfig, RADIOViT
from dune_fast.kernels.nn.spectral import start_spectral
from dune_fast.kernels.nn.theia import TheiaViT
from dune_fast.kernels.nn.vit import VisionTransformer, resize_positions
from dune_fast.released import released_projector
from dune_fast.student import Student, build_student
from dune_fast.teachers.architecture import stored_architecture
from dune_fast.teachers.assets import asset_path
from dune_fast.teachers.containers import below, container_state, read_container
from dune_fast.teachers.dune import container_options
from dune_fast.teachers.encoder_names import beside_encoder
from dune_fast.teachers.local_paths import local_path
from dune_fast.teachers.radio import BACKBONE, summary_tokens
from dune_fast.teachers.registry import recognize, vit_family
from dune_fast.teachers.run_files import CheckpointError, weights_in
from dune_fast.teachers.timm_names import SHORTHAND
from dune_fast.teachers.weights import compare

logger = logging.getLogger(__name__)

# student.safetensors has the projectors too; model.safetensors is in folders of timm's hub
_RUN_FILES = ("student.safetensors", "encoder.safetensors", "model.safetensors")


class WarmStartError(ValueError):
    """`student_weights` names nothing that the student can start from."""


@dataclass
class WarmStart:
    """What a student has taken over, and what not; goes to the log and to `run.json`."""

    source: str
    """The file."""
    tensors: int
    """Of the encoder, as the file has them or fitted."""
    fitted: list[str] = field(default_factory=list)
    """Sentences on what was not taken as it stands."""
    projectors: list[str] = field(default_factory=list)
    """Teachers whose projectors were taken over."""
    shared: list[str] = field(default_factory=list)
    """Sources whose projectors' common layers were taken over."""
    drawn: list[str] = field(default_factory=list)
    """Teachers whose projectors keep their initial weights."""
    not_taken: dict[str, int] = field(default_factory=dict)
    """Part of the file that the student has no place for -> how many tensors."""

    def __str__(self) -> str:
        fitted = f"; {'; '.join(self.fitted)}" if self.fitted else ""
        drawn = f"; as drawn: projectors of {', '.join(self.drawn)}" if self.drawn else ""
        rest = ", ".join(f"{part} ({count})" for part, count in self.not_taken.items()) or "nothing"
        return (
            f"the encoder ({self.tensors} tensors{fitted}), projectors of {', '.join(self.projectors) or 'no teacher'}"
            f"{drawn}; not taken of the file: {rest}"
        )

    def as_dict(self) -> dict[str, object]:
        """For `run.json`."""
        return dataclasses.asdict(self)


def initial_student(cfg: RunConfig) -> tuple[Student, WarmStart | None]:
    """The student that a run starts from: weights by its seed, then `student_weights` where it names some; and what
    it has taken of these.

    Raises:
        WarmStartError, TeacherWeightsError: as `warm_start`.
    """
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
    return student, warm_start(student, cfg.student_weights) if cfg.student_weights else None


def warm_start(student: Student, source: str) -> WarmStart:
    """Overwrites the encoder's weights, and those of every projector that the source has in the same shape.

    Positions are resized to the student's image size. Registers that the source lacks, as DINOv2 without them, keep
    their initial weights. LayerScale that it lacks, as timm's plain ViTs, becomes 1, which changes nothing. All of
    that is logged and returned.

    Args:
        student: with its initial weights.
        source: the folder of a run (its newest checkpoint if it has not ended) or of a checkpoint, a file of a run, a
            published checkpoint (DUNE's, UNIC's, DINOv2's or timm's, or any with an encoder under such names), a bare
            state dict of an encoder, "asset:NAME", or "timm:MODEL" for `$DUNE_FAST_WEIGHTS/MODEL.safetensors`.

    Raises:
        WarmStartError: a folder without weights, or an encoder of another architecture.
        teachers.containers.TeacherWeightsError: the file is missing, damaged or unsafe.
    """
    path = _weights_file(source)
    content = read_container(path)
    state = container_state(content, path)
    name = recognize(state, path) or "dune"
    family = vit_family(name)
    if family.network not in (VisionTransformer, type(student.encoder)):
        raise WarmStartError(
            f"student_weights={source} is of the family {name}, whose network is another than this student's encoder; "
            "choose weights of DUNE, DINOv2 or a plain ViT of timm"
        )
    encoder = family.completed(family.convert(state, path), content, path)
    fitted = []
    if isinstance(student.encoder, RADIOViT):
        encoder, fitted = fitted_to_radio(encoder, student.encoder, path, _summaries(state, content, path))
    elif "pos_embed" in encoder:
        before = encoder["pos_embed"].shape
        encoder["pos_embed"] = _fitting_positions(encoder["pos_embed"], student.encoder)
        if (after := encoder["pos_embed"].shape) != before:
            fitted.append(f"positions resized from {before[1] - 1} to {after[1] - 1} patches")
    wanted = student.encoder.state_dict()
    if "register_tokens" in wanted and "register_tokens" not in encoder:
        encoder |= {key: wanted[key] for key in ("register_tokens", "register_positions") if key in wanted}
        fitted.append(f"{student.encoder.num_register_tokens} registers drawn, the source has none")
    elif "register_positions" in wanted and "register_positions" not in encoder:
        encoder["register_positions"] = torch.zeros_like(wanted["register_positions"])
    if "cls_token" in encoder and isinstance(student.encoder, TheiaViT) and not student.encoder.cfg.cls_token:
        del encoder["cls_token"]
        fitted.append("cls left out, the student has none")
    if not any(key.endswith("ls1.gamma") for key in encoder):
        scales = {key: torch.ones_like(value) for key, value in wanted.items() if key.endswith(".gamma")}
        encoder |= scales
        fitted += [f"{len(scales)} LayerScales set to 1, the source has none"] if scales else []
    if faults := compare(wanted, encoder, beside_encoder).faults:
        shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise WarmStartError(
            f"student_weights={source} is not an encoder of the student's architecture: {shown}. Choose the student "
            f"that {path.name} was made with, or other weights"
        )
    student.encoder.load_state_dict({key: encoder[key] for key in wanted})
    if STARTED_ANEW in fitted:  # gains that leave the source's weights as they are
        start_spectral(student.encoder)
    found = WarmStart(str(path), len(wanted), fitted)
    for source, layers in student.shared.items():
        if not compare(layers.state_dict(), theirs := below(state, f"shared.{source}.")).faults:
            layers.load_state_dict(theirs)
            found.shared.append(source)
    for name, projector in student.projectors.items():
        theirs = released_projector(state, name, content, path)
        source = student.projectors.sources[name]
        if compare(projector.state_dict(), theirs).faults or source in set(student.shared) - set(found.shared):
            found.drawn.append(name)
        else:
            projector.load_state_dict(theirs)
            found.projectors.append(name)
    prefix = BACKBONE if any(key.startswith(BACKBONE) for key in state) else family.prefix(state, path)
    taken = [f"projectors.{name}." for name in found.projectors] + [f"shared.{source}." for source in found.shared]
    found.not_taken = _not_taken(state, prefix, tuple(taken))
    logger.info("warm start from %s: %s", path, found)
    return found


def _summaries(state: Mapping[str, Tensor], content: Mapping[str, Any], path: Path) -> int | None:
    """Summary tokens of a container of RADIO's, or of a run's encoder; None where nothing says them."""
    if any(key.startswith(BACKBONE) for key in state):
        options = container_options(content)
        return summary_tokens(options, path)[0] if options.get("teachers") else None
    stored = stored_architecture(path)
    return stored.num_cls if isinstance(stored, RADIOConfig) else None


def _not_taken(names: Iterable[str], prefix: str, taken: tuple[str, ...]) -> dict[str, int]:
    """Part of a file -> how many of its tensors are neither the encoder's nor begin with one of `taken`."""
    rest: Counter[str] = Counter()
    for name in names:
        inner = name.removeprefix(prefix)
        of_encoder = name.startswith(prefix) and not beside_encoder(inner)
        if not of_encoder and not name.startswith(taken):
            parts = name.split(".")
            rest[".".join(parts[: 2 if parts[0] in ("projectors", "teacher_norms") else 1])] += 1
    return dict(sorted(rest.items()))


def _weights_file(source: str) -> Path:
    if source.startswith("asset:"):
        return asset_path(source)
    if source.startswith(SHORTHAND):
        folder, model = os.environ.get("DUNE_FAST_WEIGHTS") or "weights", source.removeprefix(SHORTHAND)
        source = f"{folder}/{model}.safetensors"
    path = local_path(source, "student_weights")
    if not path.is_dir():
        return path
    try:
        found = weights_in(path, *_RUN_FILES)
    except CheckpointError as error:
        raise WarmStartError(f"student_weights={path}: {error}") from error
    if found is None:
        raise WarmStartError(
            f"student_weights={path} is a folder without {', '.join(_RUN_FILES)} and without checkpoints: "
            "that run has not ended and has none yet, or it is not the folder of a run"
        )
    return found


@torch.no_grad()
def _fitting_positions(table: Tensor, encoder: VisionTransformer) -> Tensor:
    """The source's position table on the student's grid; one that is no table of a square grid stays as it is."""
    cfg = encoder.cfg
    side, prefix = cfg.image_size // cfg.patch_size, encoder.table_prefix
    count = table.shape[1] - prefix if table.ndim == 3 else 0
    if count < 1 or math.isqrt(count) ** 2 != count:
        return table  # the comparison says what is wrong with it
    return resize_positions(table, side, side, prefix, cfg.interpolate_offset, cfg.interpolate_antialias)
