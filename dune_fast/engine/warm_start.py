"""A student's initial weights out of an earlier model: a run, a published checkpoint, a plain encoder.

At another resolution the position table is resized as the student itself does for other sizes: it starts as exactly
the function that the first student is there.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from dune_fast.engine.config import RunConfig
from dune_fast.kernels.nn.vit import VisionTransformer, resize_positions
from dune_fast.released import released_projector
from dune_fast.student import Student, build_student
from dune_fast.teachers.containers import container_state, read_container
from dune_fast.teachers.encoder_names import beside_encoder
from dune_fast.teachers.local_paths import local_path
from dune_fast.teachers.registry import recognize, vit_family
from dune_fast.teachers.run_files import CheckpointError, weights_in
from dune_fast.teachers.weights import compare

logger = logging.getLogger(__name__)

# student.safetensors has the projectors too; model.safetensors is in folders of timm's hub
_RUN_FILES = ("student.safetensors", "encoder.safetensors", "model.safetensors")


class WarmStartError(ValueError):
    """`student_weights` names nothing that the student can start from."""


def initial_student(cfg: RunConfig) -> Student:
    """The student that a run starts from: weights by its seed, then `student_weights` where it names some.

    Raises:
        WarmStartError, TeacherWeightsError: as `warm_start`.
    """
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
    if cfg.student_weights:
        warm_start(student, cfg.student_weights)
    return student


def warm_start(student: Student, source: str) -> list[str]:
    """Overwrites the encoder's weights, and those of every projector that the source has in the same shape.

    Positions are resized to the student's image size. Registers that the source lacks, as DINOv2 without them, keep
    their initial weights. Both are logged. Returns the teachers whose projectors were taken over.

    Args:
        student: with its initial weights.
        source: the folder of a run (its newest checkpoint if it has not ended) or of a checkpoint, a file of a run, a
            published checkpoint (DUNE's, UNIC's, DINOv2's or timm's of it, or any with an encoder under such names), or
            a bare state dict of an encoder.

    Raises:
        WarmStartError: a folder without weights, or an encoder of another architecture.
        teachers.containers.TeacherWeightsError: the file is missing, damaged or unsafe.
    """
    path = _weights_file(local_path(source, "student_weights"))
    content = read_container(path)
    state = container_state(content, path)
    family = vit_family(recognize(state, path) or "dune")
    encoder = family.completed(family.convert(state, path), content, path)
    changes = []
    if "pos_embed" in encoder:
        before = encoder["pos_embed"].shape
        encoder["pos_embed"] = _fitting_positions(encoder["pos_embed"], student.encoder)
        if (after := encoder["pos_embed"].shape) != before:
            changes.append(f"positions resized from {before[1] - 1} to {after[1] - 1} patches")
    if student.encoder.num_register_tokens and "register_tokens" not in encoder:
        encoder["register_tokens"] = student.encoder.register_tokens.detach()
        changes.append(f"{student.encoder.num_register_tokens} registers drawn, the source has none")
    wanted = student.encoder.state_dict()
    if faults := compare(wanted, encoder, beside_encoder).faults:
        shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise WarmStartError(
            f"student_weights={source} is not an encoder of the student's architecture: {shown}. Choose the student "
            f"that {path.name} was made with, or other weights"
        )
    student.encoder.load_state_dict({key: encoder[key] for key in wanted})
    taken = []
    for name, projector in student.projectors.items():
        theirs = released_projector(state, name, content, path)
        if not compare(projector.state_dict(), theirs).faults:
            projector.load_state_dict(theirs)
            taken.append(name)
    logger.info(
        "warm start from %s: the encoder%s, projectors of %s",
        path, f" ({'; '.join(changes)})" if changes else "", ", ".join(taken) or "no teacher",
    )  # fmt: skip
    return taken


def _weights_file(path: Path) -> Path:
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
    side, prefix = cfg.image_size // cfg.patch_size, int(cfg.cls_token)
    count = table.shape[1] - prefix if table.ndim == 3 else 0
    if count < 1 or math.isqrt(count) ** 2 != count:
        return table  # the comparison says what is wrong with it
    return resize_positions(table, side, side, prefix, cfg.interpolate_offset, cfg.interpolate_antialias)
