"""Reciprocal matches against brute force, and in blocks of any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dune_fast.heads.head import HeadError
from dune_fast.heads.mast3r.matching import Matches, nearest, reciprocal, start_pixels, symmetric, trusted


def likeness(a: Tensor, b: Tensor, distance: str) -> Tensor:
    return a @ b.T if distance == "dot" else -(a[:, None] - b[None]).square().sum(-1)


def chains(map1: Tensor, map2: Tensor, start: list[int], distance: str) -> set[tuple[int, int]]:
    """Pair after pair, by the matrix of all pixels by all pixels."""
    table = likeness(map1.flatten(0, 1), map2.flatten(0, 1), distance)
    to2, to1 = table.argmax(1), table.argmax(0)
    found = set()
    for i in start:
        j = None
        for _ in range(10):
            if to2[i] == j:
                break
            j = to2[i]
            if to1[j] == i:
                break
            i = to1[j]
        else:
            continue
        found.add((int(i), int(j)))
    return found


def flat(xy: Tensor, width: int) -> list[int]:
    return (xy[:, 1] * width + xy[:, 0]).tolist()


@pytest.fixture
def maps() -> tuple[Tensor, Tensor]:
    """Of two sizes; many of the first map's pixels are in the second one, with noise."""
    one = torch.randn(17, 13, 5)
    two = one.flatten(0, 1)[torch.randperm(221)[:180]].view(12, 15, 5) + 0.5 * torch.randn(12, 15, 5)
    return one, two


@pytest.mark.parametrize("distance", ["dot", "l2"])
@pytest.mark.parametrize("step", [1, 3, 8])
def test_matches_are_those_of_brute_force(maps, distance, step):
    one, two = maps
    start = [y * 13 + x for y in range(step // 2, 17, step) for x in range(step // 2, 13, step)]
    assert start_pixels(17, 13, step).tolist() == start
    xy1, xy2 = reciprocal(one, two, step, distance=distance)
    pairs = list(zip(flat(xy1, 13), flat(xy2, 15), strict=True))
    assert pairs == sorted(chains(one, two, start, distance)) and pairs
    table = likeness(one.flatten(0, 1), two.flatten(0, 1), distance)
    assert all(table[i].argmax() == j and table[:, j].argmax() == i for i, j in pairs)


@pytest.mark.parametrize("distance", ["dot", "l2"])
def test_blocks_do_not_change_the_result(maps, distance):
    """Whole numbers, so that many candidates are equally near: the first one counts, whatever the block."""
    one, two = ((2 * x).round() for x in maps)
    whole = reciprocal(one, two, 2, distance=distance, block=10**6)
    queries, candidates = one.flatten(0, 1), two.flatten(0, 1)
    table = likeness(queries, candidates, distance)
    assert ((table == table.max(1, keepdim=True).values).sum(1) > 1).any()
    assert torch.equal(nearest(queries[:3], candidates, distance, block=1), table[:3].argmax(1))
    for block in (23, 64, 180):
        assert torch.equal(nearest(queries, candidates, distance, block), table.argmax(1))
        for a, b in zip(whole, reciprocal(one, two, 2, distance=distance, block=block), strict=True):
            assert torch.equal(a, b)


def test_a_chain_that_does_not_end_is_dropped(monkeypatch):
    """Points on a line, ever closer: every round goes one further."""
    one = torch.cumsum(torch.tensor([0.0] + [1 / (k + 1) for k in range(40)]), 0)
    middle = (one[1:] + one[:-1]) / 2 - 1e-4 * torch.arange(1, 41)
    map1, map2 = (torch.stack([x, torch.zeros_like(x)], -1)[None] for x in (one, middle + 2e-4 * torch.arange(1, 41)))
    start = torch.tensor([[0, 0]])
    assert not len(reciprocal(map1, map2, start=start, distance="l2")[0])
    near_the_end = torch.tensor([[38, 0]])
    assert len(reciprocal(map1, map2, start=near_the_end, distance="l2")[0]) == 1


def test_with_a_tolerance_the_start_pixel_is_returned(maps):
    one, two = maps
    start = torch.tensor([[3, 2], [12, 16], [0, 0], [3, 2], [7, 9], [5, 5]])
    table = likeness(one.flatten(0, 1), two.flatten(0, 1), "dot")
    wanted = set()
    for x, y in start.tolist():
        j = table[y * 13 + x].argmax()
        back = int(table[:, j].argmax())
        if (back % 13 - x) ** 2 + (back // 13 - y) ** 2 < 4**2:
            wanted.add((x, y, int(j) % 15, int(j) // 15))
    xy1, xy2 = reciprocal(one, two, start=start, tolerance=4)
    assert {tuple(pair) for pair in torch.cat([xy1, xy2], 1).tolist()} == wanted and wanted


def test_symmetric_matches_come_from_both_sides(maps):
    one, two = maps
    conf1, conf2 = torch.rand(17, 13), torch.rand(12, 15)
    both = symmetric(one, two, conf1, conf2, step=4)
    a1, a2 = reciprocal(one, two, 4)
    b2, b1 = reciprocal(two, one, 4)
    wanted = {tuple(pair) for pair in torch.cat([torch.cat([a1, a2], 1), torch.cat([b1, b2], 1)]).tolist()}
    pairs = torch.cat([both.xy1, both.xy2], 1).tolist()
    assert {tuple(pair) for pair in pairs} == wanted and len(pairs) == len(wanted) > len(a1)
    for (x1, y1, x2, y2), confidence in zip(pairs, both.confidence.tolist(), strict=True):
        assert confidence == min(float(conf1[y1, x1]), float(conf2[y2, x2]))


def test_matches_near_an_edge_and_doubtful_ones_are_left_out():
    xy1 = torch.tensor([[3, 3], [2, 5], [6, 6], [7, 5], [5, 7], [4, 4], [4, 4]])
    xy2 = torch.tensor([[4, 4], [4, 4], [5, 5], [4, 4], [4, 4], [4, 9], [4, 4]])
    confidence = torch.tensor([2.0, 2, 2, 2, 2, 2, 1.0])
    kept = trusted(Matches(xy1, xy2, confidence), (10, 10), (12, 9))
    assert kept.xy1.tolist() == [[3, 3], [6, 6]] and kept.xy2.tolist() == [[4, 4], [5, 5]]


def test_maps_without_a_start_pixel_have_no_match():
    tiny = torch.randn(2, 3, 4)
    found = symmetric(tiny, tiny, torch.ones(2, 3), torch.ones(2, 3), step=8)
    assert found.xy1.shape == found.xy2.shape == (0, 2) and found.confidence.shape == (0,)
    assert len(trusted(found, (2, 3), (2, 3)).xy1) == 0


def test_an_unknown_distance_is_refused():
    with pytest.raises(HeadError, match="distance 'cosine' is unknown; choose one of dot, l2"):
        nearest(torch.zeros(1, 2), torch.zeros(1, 2), "cosine")
