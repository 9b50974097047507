"""What low precision does to a teacher's features: token cosine between them and float32's, both standardized.

    y = (x - mean_c) / max(std_c, 1e-3),   drift = 1 - mean over tokens of cos(y_low, y_fp32)

mean_c and std_c are those of the float32 features over the images given, as in DUNE's standardization; both sides take
them. Standardized is what the student sees: a channel whose mean is far above its spread loses its digits in bf16,
which the cosine of raw features would not show.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dune_fast.kernels.moments import moments
from dune_fast.teachers.config import RANDOM
from dune_fast.teachers.ensemble import TeacherEnsemble

LIMITS = {"bf16": 1e-3, "fp8": 5e-3}
"""Precision -> largest drift that is not refused."""
MIN_IMAGES = 2
"""One image has no deviation over cls tokens to standardize with."""
_SMALLEST_STD = 1e-3


class DriftError(ValueError):
    """A teacher's precision changes its features too much."""


@dataclass(frozen=True)
class Drift:
    """One teacher's token type."""

    teacher: str
    token: str
    precision: str
    mean_cosine: float
    """Over all tokens."""
    min_cosine: float
    """Of the worst token."""
    limit: float
    """Largest 1 - mean_cosine that is accepted."""
    forced: bool
    """Whether it trains all the same: `force_precision`, or weights that are drawn and so say nothing anyway."""

    @property
    def exceeds(self) -> bool:
        """Whether the drift is above the limit; features that are not finite are."""
        return not 1.0 - self.mean_cosine <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """For `drift.json`."""
        return asdict(self) | {"exceeds": self.exceeds}


@torch.no_grad()
def measure_drift(ensemble: TeacherEnsemble, images: Tensor, names: Collection[str] | None = None) -> list[Drift]:
    """Runs every teacher of lower precision once as it is and once in float32, whose weights are read again.

    Args:
        ensemble: as it trains.
        images: [B, 3, H, W], ImageNet-normalised, on the ensemble's device; at least two, else ValueError.
        names: of the teachers that are looked at; all by default.

    Returns:
        An entry for each teacher and token type in lower precision than float32, in the ensemble's order.
    """
    if len(images) < MIN_IMAGES:
        raise ValueError(f"drift is measured on at least {MIN_IMAGES} images, got {len(images)}")
    configs = {n: t.config for n, t in ensemble.teachers.items() if t.config.precision != "fp32"}
    configs = {name: cfg for name, cfg in configs.items() if names is None or name in names}
    sources: dict[tuple[str, str], list[str]] = {}
    for name, cfg in configs.items():
        sources.setdefault((cfg.family, cfg.weights), []).append(name)
    low = ensemble(images)
    exact = {"precision": "fp32", "stream": "fp32", "epilogue_gelu": False, "attention": "auto", "compile": False}
    found: dict[str, list[Drift]] = {}
    for names in sources.values():  # file by file: no more than one is in memory
        twins = {name: replace(configs[name], **exact) for name in names}
        twin = TeacherEnsemble(twins, ensemble.student_patch_size, device=images.device)
        for name, tokens in twin(images).items():
            found[name] = [_drift(ensemble, name, token, low[name][token], x) for token, x in tokens.items()]
        del twin
        gc.collect()  # modules refer to each other: their memory would wait for the next collection
    return [drift for name in configs for drift in found[name]]


def _drift(ensemble: TeacherEnsemble, name: str, token: str, low: Tensor, full: Tensor) -> Drift:
    cfg = ensemble.teachers[name].config
    mean, m2 = moments(full)
    rows = full.numel() // full.shape[-1]
    std = (m2 / (rows - 1)).sqrt().clamp_min(_SMALLEST_STD)
    ours, exact = (((x.float() - mean) / std).flatten(0, -2) for x in (low, full))
    cosine = F.cosine_similarity(ours.double(), exact.double(), dim=-1)  # float32 resolves 1 - 6e-8 only
    mean_cosine, min_cosine = torch.stack([cosine.mean(), cosine.amin()]).tolist()
    forced = cfg.force_precision or cfg.weights.startswith(RANDOM)
    return Drift(name, token, cfg.precision, mean_cosine, min_cosine, LIMITS[cfg.precision], forced)


def refusal(drifts: Sequence[Drift]) -> str:
    """A sentence for what exceeds its limit and is not forced; empty if nothing does."""
    refused = [drift for drift in drifts if drift.exceeds and not drift.forced]
    if not refused:
        return ""
    found = "; ".join(
        f"{d.teacher}'s {d.token} tokens in {d.precision} are {1 - d.mean_cosine:.2g} from float32, "
        f"at most {d.limit:g} is allowed (worst token {1 - d.min_cosine:.2g})"
        for d in refused
    )
    cures = {"fp8": "bf16", "bf16": "fp32"}
    cure = " and ".join(
        f"teachers.{name}.precision={cures[precision]}"
        for name, precision in dict.fromkeys((d.teacher, d.precision) for d in refused)
    )
    return (
        f"low precision changes teachers' standardized features too much (1 - mean token cosine): {found}; set {cure}, "
        "or force_precision=true beside it to train on them all the same"
    )


def check_drift(drifts: Sequence[Drift]) -> None:
    """DriftError if some drift exceeds its limit and is not forced."""
    if message := refusal(drifts):
        raise DriftError(message)


def drift_rows(drifts: Sequence[Drift]) -> list[tuple[str, ...]]:
    """The report as rows of text: teacher, tokens, precision, drift, worst token, limit, verdict."""
    return [
        (d.teacher, d.token, d.precision, f"{1 - d.mean_cosine:.2e}", f"{1 - d.min_cosine:.2e}", f"{d.limit:g}",
         "ok" if not d.exceeds else "forced" if d.forced else "refused")
        for d in drifts
    ]  # fmt: skip
