"""What the figures of a run show, as numbers: series of its metrics, spectra of features, attention of the cls token.

    explained(k) = sum of the k largest eigenvalues of cov(x) / their sum
    d_t[i]       = L_t[i] - L_t[i-1]    change of teacher t's loss between two records
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.engine.conflicts import MIN_STEPS
from dune_fast.kernels.nn.vit import VisionTransformer

Records = Sequence[Mapping[str, Any]]


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table; None and NaN become empty fields."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(["" if x is None or x != x else x for x in row])
    write_whole(path, text.getvalue().encode())


def training_records(records: Records) -> list[Mapping[str, Any]]:
    """Those of training steps; the others are of evaluations."""
    return [record for record in records if "loss" in record]


def teachers_of(records: Records, prefix: str = "loss/") -> list[str]:
    """Teachers with a value `prefix` + name in the last record, sorted."""
    names = records[-1] if records else ()
    return sorted(key.removeprefix(prefix) for key in names if key.startswith(prefix) and key.count("/") == 1)


def series(records: Records, key: str) -> np.ndarray:
    """float64 [records]; NaN where a value is missing or was not finite."""
    return np.array([record.get(key) for record in records], float)


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Centred moving average of the finite values; shorter windows at both ends. [n] -> [n]."""
    x, half = np.asarray(values, float), window // 2
    finite = np.isfinite(x)
    at = np.arange(len(x))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(x))
    totals, counts = (np.concatenate([[0.0], np.cumsum(v)]) for v in (np.where(finite, x, 0.0), finite))
    number = counts[high] - counts[low]
    return np.where(number > 0, (totals[high] - totals[low]) / np.maximum(number, 1), np.nan)


@dataclass(frozen=True)
class LossChanges:
    """How the changes of the teachers' losses go together, over all pairs of consecutive records.

    Where those are too few, the last of what the run has recorded of every step's changes; `count` is 0 then.
    """

    teachers: list[str]
    count: int
    """Changes between records."""
    interval: int
    """Steps between two records, as a rule (the median)."""
    pearson: np.ndarray
    """[teachers, teachers]; NaN where a loss never changes."""
    agreement: np.ndarray
    """Share of the changes whose signs are equal, [teachers, teachers]."""
    steps: np.ndarray
    """Steps at which the run itself has recorded the correlation of every step's changes."""
    recorded: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]
    """Pair -> (Pearson, sign agreement) at `steps`; see `dune_fast.engine.conflicts`."""


def loss_changes(records: Records) -> LossChanges | None:
    """Correlations of the losses' changes; None with fewer than two teachers or too few steps (`conflicts.MIN_STEPS`).

    Records of losses that are not finite are left out.
    """
    records = training_records(records)
    teachers = teachers_of(records)
    if len(teachers) < 2:
        return None
    losses = np.stack([series(records, f"loss/{name}") for name in teachers])  # [teachers, records]
    finite = np.isfinite(losses).all(0)
    changes, count = np.diff(losses[:, finite]), max(int(finite.sum()) - 1, 0)
    told = [r for r in records if any(key.startswith("conflict/") for key in r)]
    recorded = {}
    for a, b in itertools.combinations(teachers, 2):
        for name in (f"conflict/{a}_vs_{b}", f"conflict/{b}_vs_{a}"):  # in the order of the configuration
            if any(f"{name}/sign_agreement" in r for r in told):
                recorded[a, b] = series(told, f"{name}/pearson"), series(told, f"{name}/sign_agreement")
    at = np.array([r["step"] for r in told])
    if count >= MIN_STEPS:
        with np.errstate(invalid="ignore", divide="ignore"):
            pearson = np.corrcoef(changes)
        signs = np.sign(changes)
        agreement = (signs[:, None] == signs[None]).mean(-1)
        steps = np.array([record["step"] for record in records])[finite]
        return LossChanges(teachers, count, int(np.median(np.diff(steps))), pearson, agreement, at, recorded)
    if not recorded:
        return None
    pearson, agreement = np.eye(len(teachers)), np.eye(len(teachers))
    for (a, b), values in recorded.items():
        i, j = teachers.index(a), teachers.index(b)
        for matrix, value in zip((pearson, agreement), values, strict=True):
            matrix[i, j] = matrix[j, i] = value[-1]
    return LossChanges(teachers, 0, 1, pearson, agreement, at, recorded)


class Covariance:
    """Covariance of vectors that come in batches, in float64.

    Sums are of differences to the first batch's mean: features whose mean is large beside their spread lose nothing.

    Args:
        channels: of a vector.
        device: where it is summed.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self._products = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """x: [..., C]."""
        x = x.detach().reshape(-1, x.shape[-1]).double()
        if not len(x):
            return
        if self._shift is None:
            self._shift = x.mean(0)
        x = x - self._shift
        self.count += len(x)
        self._sum += x.sum(0)
        self._products += x.T @ x

    def value(self) -> Tensor:
        """float64 [C, C] on the CPU, over the number of vectors; zeros without any."""
        count = max(self.count, 1)
        mean = self._sum / count
        return (self._products / count - torch.outer(mean, mean)).cpu()


def explained_variance(covariance: Tensor) -> np.ndarray:
    """Cumulative share of the variance in the k + 1 strongest principal components. [C, C] -> float64 [C]."""
    values = torch.linalg.eigvalsh(covariance.double()).flip(0).clamp_min(0.0)
    total = values.sum()
    return (values.cumsum(0) / total).numpy() if total > 0 else np.full(len(values), np.nan)


def components_for(explained: np.ndarray, share: float) -> int | None:
    """How many components explain `share` of the variance; None if there is no variance."""
    return None if np.isnan(explained).any() else int(np.searchsorted(explained, share - 1e-12) + 1)


@torch.no_grad()
def cls_attention(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """What the cls token attends to in the last block: softmax(q k^T / sqrt(head_dim)), its row of the cls token.

    Args:
        encoder: with a cls token and a table of positions, as every student.
        images: [B, 3, H, W], normalised.

    Returns:
        float32 [B, heads, rows, columns], of the patches; what goes to cls and registers is missing to a sum of 1.
    """
    rows, columns = encoder.grid(images)
    attention, kept = encoder.blocks[-1].attn, []
    handle = attention.qkv.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        encoder.forward_tokens(images)
    finally:
        handle.remove()
    query, key, _ = kept[0].float().unflatten(-1, (3, attention.num_heads, -1)).unbind(2)  # each [B, N, H, D]
    scores = torch.einsum("bhd,bnhd->bhn", query[:, 0], key) * query.shape[-1] ** -0.5
    weights = scores.softmax(-1)[..., encoder.num_prefix_tokens :]
    return weights.unflatten(-1, (rows, columns))
