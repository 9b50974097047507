"""What a weights file is: container, family, architecture, what fits, and a fingerprint of its features."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dune_fast.nn.vit import VisionTransformer, ViTConfig
from teachers.config import IMAGENET_MEAN, IMAGENET_STD, TeacherConfig
from teachers.containers import container_state, read_container, state_entry
from teachers.ensemble import TeacherEnsemble
from teachers.registry import family_class
from teachers.vit import ViTTeacher
from teachers.weights import Fit, compare

VIT_FAMILIES = ("mast3r", "multihmr", "dune", "deit3", "dbotft", "dinov2", "dino")
"""Families told apart by their names of tensors, the most peculiar first; iBOT's are DINO's, UNIC's DUNE's."""
_GRID = 8  # patches a side of the fingerprint's image


@dataclass
class Report:
    """What `inspect_file` found."""

    path: Path
    container: str
    """E.g. "torch archive, state dict under 'model'"."""
    tensors: int
    values: int
    """Numbers in all tensors together."""
    family: str | None = None
    """Name in the registry; None if the file is of no known ViT family."""
    architecture: ViTConfig | None = None
    fit: Fit | None = None
    problem: str = ""
    """Why no architecture could be read off the tensors."""
    fingerprint: dict[str, dict[str, float]] = field(default_factory=dict)
    """Token type -> mean, deviation and probe of the features of a fixed image, see `fingerprint`."""

    @property
    def sound(self) -> bool:
        """Whether a run could use the file."""
        return self.fit is not None and not (self.fit.missing or self.fit.misshapen or self.fit.unsound)


def inspect_file(path: Path, num_heads: int | None = None) -> Report:
    """Reads a file as a run would and says what is in it.

    Args:
        path: a published container or a safetensors file.
        num_heads: attention heads, where neither container nor convention (channels / 64) gives them.

    Raises:
        TeacherWeightsError: missing, damaged or unsafe; a file that is sound but of no known family is reported.
    """
    content = read_container(path)
    entry = state_entry(content, path)
    kind = "safetensors" if Path(path).suffix == ".safetensors" else "torch archive"
    state = container_state(content, path)
    where = "a bare state dict" if entry is None else f"state dict under {entry!r}"
    report = Report(Path(path), f"{kind}, {where}", len(state), sum(value.numel() for value in state.values()))
    report.family = recognize(state)
    if report.family is None:
        return report
    family = family_class(report.family)
    assert issubclass(family, ViTTeacher)
    try:
        report.architecture, converted = family.read_file(path, TeacherConfig(num_heads=num_heads))
    except ValueError as error:  # a tensor that says the sizes is missing, or heads that do not divide the channels
        report.problem = str(error)
        return report
    with torch.device("meta"):
        wanted = VisionTransformer(report.architecture).state_dict()
    report.fit = compare(wanted, converted)
    used = {id(value) for key, value in family.convert(state, path).items() if key in wanted}
    report.fit.surplus = [key for key, value in state.items() if key not in wanted and id(value) not in used]
    if report.sound:
        report.fingerprint = fingerprint(report.family, path, report.architecture)
    return report


def recognize(state: dict[str, Tensor]) -> str | None:
    """The family that a state dict belongs to by its names, None if none."""
    for name in VIT_FAMILIES:
        family = family_class(name)
        assert issubclass(family, ViTTeacher)
        if family.recognizes(state.keys()):
            return name
    return None


def fixed_image(side: int) -> Tensor:
    """A smooth coloured pattern in [0, 1], ImageNet-normalised: [1, 3, side, side], the same everywhere."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    waves = torch.stack([torch.sin(9 * x + 4 * y), torch.cos(7 * y - 3 * x), torch.sin(11 * x * y + 1)])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((0.5 + 0.5 * waves - mean) / std)[None]


def fingerprint(family: str, path: Path, architecture: ViTConfig) -> dict[str, dict[str, float]]:
    """Three numbers a token type that change when weights, architecture or normalisation do.

    The mean, the deviation, and the probe: the mean of features times cos(channel index).
    """
    teacher = family_class(family)
    mean, std = teacher.statistics
    cfg = TeacherConfig(
        family=family, weights=str(path), patch_size=architecture.patch_size, num_features=architecture.embed_dim,
        token_types=list(teacher.token_types), mean=list(mean), std=list(std), num_heads=architecture.num_heads,
    )  # fmt: skip
    tokens = TeacherEnsemble({"teacher": cfg}, cfg.patch_size)(fixed_image(_GRID * cfg.patch_size))["teacher"]
    weights = torch.cos(torch.arange(cfg.num_features, dtype=torch.float32))
    return {
        kind: {"mean": float(x.mean()), "std": float(x.std()), "probe": float((x * weights).mean())}
        for kind, x in tokens.items()
    }
