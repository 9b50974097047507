"""What a weights file is: container, family, architecture, what fits, and a fingerprint of its features."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import container_state, read_container, state_entry
from dune_fast.teachers.encoder_names import beside_encoder
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.registry import recognize, vit_family
from dune_fast.teachers.timm_names import image_size_of, timm_config, timm_fit, timm_matches
from dune_fast.teachers.weights import Fit, compare, weights_path

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
    family: str | None = None  # None if the file is of no known one
    architecture: ViTConfig | None = None  # of a ViT
    models: list[str] = field(default_factory=list)  # of timm's, that the file fits
    config: TeacherConfig | None = None
    """How a run would use it."""
    fit: Fit | None = None
    """`surplus` has all tensors that are not used."""
    unplaced: list[str] = field(default_factory=list)
    """Tensors of the encoder that our network has no place for: without them its features would be others."""
    problem: str = ""
    """Why no architecture could be read off the tensors."""
    fingerprint: dict[str, dict[str, float]] = field(default_factory=dict)
    """Token type -> mean, deviation and probe of the features of a fixed image, see `fingerprint`."""

    @property
    def sound(self) -> bool:
        """Whether a run could use the file."""
        fit = self.fit
        return fit is not None and not (fit.missing or fit.misshapen or fit.unsound or self.unplaced)


def inspect_file(path: Path | str, num_heads: int | None = None, model: str = "") -> Report:
    """Reads a file as a run would and says what is in it.

    Args:
        path: a file, or the folder of a run or a checkpoint.
        num_heads: attention heads, where neither container nor convention (channels / 64) gives them.
        model: the model of timm that it is of; found by its tensors where no name is given.

    TeacherWeightsError if it is missing, damaged or unsafe; one of no known family is reported.
    """
    path = weights_path(str(path))
    content = read_container(path)
    entry = state_entry(content, path)
    kind = "safetensors" if path.suffix == ".safetensors" else "torch archive"
    state = container_state(content, path)
    where = "a bare state dict" if entry is None else f"state dict under {entry!r}"
    report = Report(path, f"{kind}, {where}", len(state), sum(value.numel() for value in state.values()))
    name = None if model else recognize(state, path)
    if name is not None:
        _inspect_vit(report, name, content, state, num_heads)
    if not report.sound and (found := [model] if model else timm_matches(state, path)):
        _inspect_timm(report, found, state)
    if report.sound:
        assert report.config is not None
        report.fingerprint = fingerprint(report.config)
    return report


def _inspect_vit(
    report: Report, name: str, content: dict[str, Any], state: dict[str, Tensor], num_heads: int | None
) -> None:
    """Fills in what the file is as one of our own ViTs."""
    report.family, family = name, vit_family(name)
    try:
        report.architecture, converted = family.read_content(content, report.path, TeacherConfig(num_heads=num_heads))
    except ValueError as error:  # a tensor that says the sizes is missing, or heads that do not divide the channels
        report.problem = str(error)
        return
    with torch.device("meta"):
        wanted = family.network(report.architecture).state_dict()
    report.fit = compare(wanted, converted, beside_encoder)
    report.unplaced = report.fit.surplus
    used = {id(value) for key, value in converted.items() if key in wanted}
    unplaced = {id(converted[key]) for key in report.unplaced}
    made = {"reg_token", "pos_embed"}  # renamed or completed, so other tensors by now
    report.fit.surplus = [
        key for key, value in state.items()
        if key not in wanted and key not in made and id(value) not in used | unplaced and not family.reads(key)
    ]  # fmt: skip
    mean, std = family.statistics
    report.config = TeacherConfig(
        family=name, weights=str(report.path), patch_size=report.architecture.patch_size,
        num_features=family.width(report.architecture), token_types=list(family.alike(report.architecture)),
        mean=list(mean), std=list(std), num_heads=report.architecture.num_heads,
    )  # fmt: skip


def _inspect_timm(report: Report, models: list[str], state: dict[str, Tensor]) -> None:
    """Fills in what the file is as a model of timm's."""
    report.family, report.models, report.problem, report.architecture = "timm", models, "", None
    report.config = timm_config(models[0], str(report.path), image_size_of(state, models[0]))
    report.fit, report.unplaced = timm_fit(report.config, state), []


def fixed_image(side: int) -> Tensor:
    """A smooth coloured pattern in [0, 1], ImageNet-normalised: [1, 3, side, side], the same everywhere."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    waves = torch.stack([torch.sin(9 * x + 4 * y), torch.cos(7 * y - 3 * x), torch.sin(11 * x * y + 1)])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((0.5 + 0.5 * waves - mean) / std)[None]


def fingerprint(cfg: TeacherConfig) -> dict[str, dict[str, float]]:
    """Three numbers a token type that change when weights, architecture or normalisation do.

    The mean, the deviation, and the probe: the mean of features times cos(channel index).
    """
    ensemble = TeacherEnsemble({"teacher": cfg}, cfg.patch_size)
    try:
        tokens = ensemble(fixed_image(_GRID * cfg.patch_size))["teacher"]
    except ValueError:  # a network that takes one size alone
        if (own := getattr(ensemble.teachers["teacher"].trunk, "own_size", None)) is None:
            raise
        tokens = ensemble(fixed_image(own))["teacher"]
    weights = torch.cos(torch.arange(cfg.num_features, dtype=torch.float32))
    return {
        kind: {"mean": float(x.mean()), "std": float(x.std()), "probe": float((x * weights).mean())}
        for kind, x in tokens.items()
    }
