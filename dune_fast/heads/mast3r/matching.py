"""Matches of two views' maps by reciprocal nearest neighbours, found from a grid of start pixels.

    i_0 = a start pixel of view 1;   j = NN2(i),  i' = NN1(j), again from i' until i' = i or j stays the same

NN takes the largest inner product of descriptors, or the smallest distance of points. Leroy et al., "Grounding Image
Matching in 3D with MASt3R", ECCV 2024, section 3.3. Neighbours are searched for in blocks, so no matrix of all pixels
by all pixels is made. Pixels are flat indices y * W + x here, (x, y) in results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dune_fast.heads.head import HeadError

DISTANCES = ("dot", "l2")
_CPU_BLOCK, _GPU_BLOCK = 2**10, 2**13
"""Queries and candidates that are compared at a time: matrices of 4 MB, which a CPU's cache holds, and of 256 MB."""
_ROUNDS = 10


class Matches(NamedTuple):
    """N pixels of each view that show the same point."""

    xy1: Tensor
    """int64 [N, 2], (x, y)."""
    xy2: Tensor
    """int64 [N, 2]."""
    confidence: Tensor
    """float [N], the smaller of both pixels' `desc_conf`."""

    def at(self, kept: Tensor) -> Matches:
        """Those of a mask bool [N]."""
        return Matches(*(x[kept] for x in self))


def nearest(queries: Tensor, candidates: Tensor, distance: str = "dot", block: int | None = None) -> Tensor:
    """The nearest candidate of each query, the first of equal ones.

    Args:
        queries: [N, d].
        candidates: [M, d].
        distance: "dot" for the largest inner product, "l2" for the smallest Euclidean distance.
        block: queries and candidates that are compared at a time, by device by default; it does not change the result.

    Returns:
        int64 [N].
    """
    if distance not in DISTANCES:
        raise HeadError(f"distance {distance!r} is unknown; choose one of {', '.join(DISTANCES)}")
    block = block or (_GPU_BLOCK if queries.is_cuda else _CPU_BLOCK)
    return torch.cat([_nearest(part, candidates, distance, block) for part in queries.split(block)])


def _nearest(queries: Tensor, candidates: Tensor, distance: str, block: int) -> Tensor:
    """As `nearest`, of one block of queries."""
    best = queries.new_full((len(queries),), -torch.inf)
    found = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(candidates), block):
        part = candidates[start : start + block]
        if distance == "dot":
            likeness = queries @ part.T.contiguous()
        else:  # differences, not |a|^2 - 2ab + |b|^2, which loses the digits of points far from the origin
            likeness = -torch.cdist(queries, part, compute_mode="donot_use_mm_for_euclid_dist")
        value = likeness.amax(dim=1)
        better = (value > best).nonzero().flatten()
        found[better] = likeness[better].argmax(dim=1) + start  # of few rows: argmax takes ten times as long as amax
        best = torch.maximum(best, value)
    return found


def start_pixels(height: int, width: int, step: int, device: torch.device | None = None) -> Tensor:
    """Flat indices of every `step`-th pixel in both directions from step // 2 on: int64 [N], sorted."""
    y, x = (torch.arange(side, device=device)[step // 2 :: step] for side in (height, width))
    return (y[:, None] * width + x).flatten()


def reciprocal(
    map1: Tensor, map2: Tensor, step: int = 8, start: Tensor | None = None, tolerance: float | None = None,
    distance: str = "dot", block: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Reciprocal nearest neighbours of two maps, from start pixels of view 1; what has not converged is dropped.

    Args:
        map1, map2: [H1, W1, d] and [H2, W2, d], descriptors or points.
        step: distance of the start pixels of the grid.
        start: int64 [S, 2], other start pixels (x, y).
        tolerance: in pixels. With it there is one round; a pair is kept if the way back ends less than this far from
            the start, and the start pixel itself is the match's pixel of view 1.
        distance, block: see `nearest`.

    Returns:
        Pixels (x, y) of both views, int64 [N, 2] each, no pair twice, sorted by flat indices of view 1, then view 2.
    """
    (height, width1, _), width2 = map1.shape, map2.shape[1]
    flat1, flat2 = map1.flatten(0, 1), map2.flatten(0, 1)
    first = start_pixels(height, width1, step, map1.device) if start is None else start[:, 1] * width1 + start[:, 0]
    first = first.unique()

    def there(i: Tensor) -> Tensor:
        return nearest(flat1[i], flat2, distance, block)

    def back(j: Tensor) -> Tensor:
        return nearest(flat2[j], flat1, distance, block)

    if tolerance is not None:
        second = there(first)
        off = (_xy(back(second), width1) - _xy(first, width1)).float().norm(dim=1)
        kept = off < tolerance
        return _pairs(first[kept], second[kept], width1, width2)
    i, j = first, torch.full_like(first, -1)
    active = torch.arange(len(first), device=first.device)
    for _ in range(_ROUNDS):
        target = there(i[active])
        moved = target != j[active]
        active, target = active[moved], target[moved]
        j[active] = target
        source = back(target)
        moved = source != i[active]
        active = active[moved]
        i[active] = source[moved]
        if not len(active):
            break
    converged = torch.ones_like(i, dtype=torch.bool)
    converged[active] = False
    return _pairs(i[converged], j[converged], width1, width2)


def symmetric(
    map1: Tensor, map2: Tensor, conf1: Tensor, conf2: Tensor, step: int = 8, distance: str = "dot",
    block: int | None = None,
) -> Matches:  # fmt: skip
    """Matches found from the start pixels of either view; conf1 and conf2 [H, W] give their confidence."""
    width1, width2 = map1.shape[1], map2.shape[1]
    a1, a2 = reciprocal(map1, map2, step, distance=distance, block=block)
    b2, b1 = reciprocal(map2, map1, step, distance=distance, block=block)
    one, two = (torch.cat([_flat(a, width), _flat(b, width)]) for a, b, width in ((a1, b1, width1), (a2, b2, width2)))
    return with_confidence(*_pairs(one, two, width1, width2), conf1, conf2)


def with_confidence(xy1: Tensor, xy2: Tensor, conf1: Tensor, conf2: Tensor) -> Matches:
    """Pixels with the smaller of both confidences, of maps [H, W]."""
    return Matches(xy1, xy2, torch.minimum(conf1[xy1[:, 1], xy1[:, 0]], conf2[xy2[:, 1], xy2[:, 0]]))


def trusted(
    matches: Matches, size1: tuple[int, int], size2: tuple[int, int], border: int = 3, confidence: float = 1.001
) -> Matches:
    """Those at least `border` pixels from all edges of both images, (height, width), and at least so confident."""
    kept = matches.confidence >= confidence
    for xy, (height, width) in ((matches.xy1, size1), (matches.xy2, size2)):
        limit = torch.tensor([width, height], device=xy.device)
        kept &= ((xy >= border) & (xy < limit - border)).all(dim=1)
    return matches.at(kept)


def _flat(xy: Tensor, width: int) -> Tensor:
    return xy[:, 1] * width + xy[:, 0]


def _xy(index: Tensor, width: int) -> Tensor:
    return torch.stack([index % width, index // width], dim=1)


def _pairs(i: Tensor, j: Tensor, width1: int, width2: int) -> tuple[Tensor, Tensor]:
    """Pairs of flat indices without repetition, sorted, as pixels."""
    unique = torch.stack([i, j], dim=1).unique(dim=0)
    return _xy(unique[:, 0], width1), _xy(unique[:, 1], width2)
