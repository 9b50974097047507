"""Agreement of the student's projections with every teacher on held-out images, and k-NN without labels.

    cos(s, (t - mean) / std), averaged over images (and patches), with the teachers' running statistics

1 means the student's projection points where the standardized teacher does; 0 is what unrelated features give.

The k-NN asks which photograph a window is of: every photograph is cut into 3 x 3 windows that do not overlap, and the
cls features of the other windows vote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from dune_fast.dali_pipelines.loader import Batch
from dune_fast.distill.alignment import RULES, align_tokens
from dune_fast.distill.standardization import AllReduce, TeacherStatistics
from dune_fast.evaluate.knn import knn_predict
from dune_fast.kernels.distill_loss import standardize
from dune_fast.teachers.ensemble import TeacherEnsemble

WINDOWS = 3
"""Windows along each side of a photograph."""
_NEIGHBOURS = 5

Cosines = dict[str, dict[str, float]]
"""teacher -> token type -> mean cosine similarity"""


@torch.no_grad()
def held_out_cosines(
    students: Mapping[str, nn.Module],
    teachers: TeacherEnsemble,
    statistics: TeacherStatistics,
    batches: Iterable[Batch],
    all_reduce: AllReduce | None = None,
    align: str = "",
) -> dict[str, Cosines]:
    """Mean cosine similarity of several students on the same images.

    Args:
        students: name -> images -> teacher -> token type -> projection.
        teachers: frozen.
        statistics: their running statistics standardize.
        batches: this rank's share of the held-out images.
        all_reduce: sums a tensor over ranks.
        align: `objective.align` of the run, where teachers have grids of their own.

    Returns:
        student -> teacher -> token type -> cosine, over the images of all ranks.

    Raises:
        ValueError: there is no held-out image on any rank.
    """
    standardizers = statistics.running()
    keys = [(s, t, token) for s in students for t, token, _ in statistics.items()]
    device = next(statistics.buffers()).device
    sums = torch.zeros(len(keys) + 1, dtype=torch.float64, device=device)  # the last one counts images
    for batch in batches:
        features = statistics.rotated(teachers(batch.images))
        projections = {name: student(batch.images) for name, student in students.items()}
        for i, (name, teacher, token) in enumerate(keys):
            projection, target = projections[name][teacher][token], features[teacher][token]
            if align and token == "patch":
                projection, target, _ = align_tokens(projection, target, RULES[align])
            target = standardize(target, *standardizers[teacher][token])
            cosine = F.cosine_similarity(projection.float(), target, dim=-1)
            sums[i] += cosine.flatten(1).mean(1).sum() if cosine.ndim > 1 else cosine.sum()
        sums[-1] += len(batch.images)
    if all_reduce is not None:
        all_reduce(sums)
    totals = sums.tolist()
    if totals[-1] == 0:
        raise ValueError("there is no held-out image: set data.datasets.<name>.holdout or val_root")
    result: dict[str, Cosines] = {}
    for (name, teacher, token), total in zip(keys, totals, strict=False):
        result.setdefault(name, {}).setdefault(teacher, {})[token] = total / totals[-1]
    return result


def cut(images: Tensor, size: int) -> Tensor:
    """Images [B, 3, W size, W size] to their windows, row by row, [B * W * W, 3, size, size]."""
    windows = images.unfold(2, size, size).unfold(3, size, size)  # [B, 3, W, W, size, size]
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def window_knn(cls: Tensor) -> float:
    """Share of windows whose 5 nearest others vote for their own photograph.

    Args:
        cls: [photographs, windows, D].
    """
    count, windows, _ = cls.shape
    rows, labels = cls.flatten(0, 1), torch.arange(count, device=cls.device).repeat_interleave(windows)
    found = knn_predict(rows, rows, labels, count, _NEIGHBOURS, leave_one_out=True)
    return (found == labels).double().mean().item()


def cosine_table(result: Mapping[str, Cosines]) -> Table:
    """A table: a row for each teacher and token type, a column for each student."""
    table = Table(title="Cosine similarity to the teachers on held-out images")
    table.add_column("teacher")
    table.add_column("tokens")
    for name in result:
        table.add_column(name, justify="right")
    first = next(iter(result.values()))
    for teacher, tokens in first.items():
        for token in tokens:
            table.add_row(teacher, token, *(f"{cosines[teacher][token]:.3f}" for cosines in result.values()))
    return table


def pca_rgb(tokens: Tensor, height: int, width: int, whole_map: bool = False) -> Tensor:
    """The first three principal components of patch tokens as colours, each component's range mapped to [0, 1].

    Args:
        tokens: [height * width, C].
        whole_map: one range for the three components together, as in DUNE's figure: strong components have more colour.

    Returns:
        float32 [height, width, 3].
    """
    x = tokens.double() - tokens.double().mean(0)
    _, _, vectors = torch.linalg.svd(x, full_matrices=False)
    components = x @ vectors[:3].T
    # a singular vector's sign is arbitrary: fix it, so that the same features always get the same colours
    components = components * torch.where(components.mean(0) - components.median(0).values < 0, -1.0, 1.0)
    low, high = (components.min(), components.max()) if whole_map else (components.amin(0), components.amax(0))
    return ((components - low) / (high - low).clamp_min(1e-12)).reshape(height, width, -1).float()
