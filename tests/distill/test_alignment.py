"""Maps on one grid: rules, homographies, masks, how images count; ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dune_fast.distill.alignment import RULES, View, align, align_tokens, image_losses, sums_of, token_mask
from tests.distill.threads import on_ranks


def maps(side: int, other: int, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, channels, n, n, generator=g) for n in (side, other))


def moved(columns: float, side: int) -> torch.Tensor:
    """A view that lies so many of `side` columns further to the right of the student's."""
    matrix = torch.eye(3).repeat(2, 1, 1)
    matrix[:, 0, 2] = columns * 2 / (side - 1)
    return matrix


@pytest.mark.parametrize(
    ("rule", "side", "options"),
    [
        ("smaller", 4, {"mode": "bilinear", "align_corners": False}),
        ("larger", 6, {"mode": "bilinear", "align_corners": False}),
        ("partitioned", 6, {"mode": "bilinear", "align_corners": True}),
        ("larger_bicubic", 6, {"mode": "bicubic", "align_corners": False}),
    ],
)
def test_without_a_view_the_other_grid_is_resized(rule, side, options):
    student, teacher = maps(4, 6)
    for s, t in ((student, teacher), (teacher, student)):
        aligned = align(s, t, RULES[rule])
        assert aligned.weight is None
        for ours, given in ((aligned.student, s), (aligned.teacher, t)):
            expected = given if given.shape[-1] == side else F.interpolate(given, (side, side), **options)
            torch.testing.assert_close(ours, expected)
    s, t, weight = align_tokens(student.flatten(2).mT, teacher.flatten(2).mT, RULES[rule])
    assert s.shape == t.shape == (2, side**2, 3) and weight is None


@pytest.mark.parametrize("rule", ["smaller", "teacher", "partitioned"])
def test_a_shift_by_whole_patches_compares_the_same_patches(rule):
    student, _ = maps(5, 5)
    view = View(moved(2, 5))
    aligned = align(student, student.roll(-2, -1), RULES[rule], view)  # the teacher's column j is the student's j + 2
    torch.testing.assert_close(aligned.student[..., :3], aligned.teacher[..., :3], rtol=1e-4, atol=1e-5)
    counted = aligned.weight > 0.5
    assert counted[..., :3].all() and not counted[..., 4:].any()
    assert (aligned.weight[..., 4:] == 0).all() == RULES[rule].inside


def test_the_teachers_map_is_sampled_where_it_is_the_finer_one_but_not_by_the_later_revision():
    student, teacher = maps(4, 6)
    view = View(moved(0, 4))
    assert align(student, teacher, RULES["smaller"], view).student is student
    assert align(student, teacher, RULES["teacher"], view).teacher is teacher


@pytest.mark.parametrize(("whole", "expected"), [(False, [[1, 0], [1, 1]]), (True, [[0, 0], [1, 1]])])
def test_a_tokens_pixels_decide(whole, expected):
    pixels = torch.ones(1, 4, 4)
    pixels[0, 0, 0] = 0  # 3 of 4 pixels
    pixels[0, :2, 2] = 0  # 2 of 4
    assert token_mask(pixels, 2, 2, whole).tolist() == [expected]


@pytest.mark.parametrize("rule", ["smaller", "teacher"])
def test_the_mean_over_images_of_all_ranks_is_the_weighted_loss(rule):
    """Images count by their valid tokens, or by their root; an image without any does not harm."""
    g = np.random.default_rng(1)
    positions, weight = g.random((6, 9)), (g.random((6, 9)) > 0.4).astype(np.float32)
    weight[2] = 0
    counts = weight.sum(1)
    if rule == "smaller":
        expected = (positions * weight).sum() / counts.sum()
    else:
        share = np.sqrt(np.maximum(counts, 1))
        expected = (share / share.sum() * (positions * weight).sum(1) / np.maximum(counts, 1)).sum()
    positions, weight = torch.from_numpy(positions), torch.from_numpy(weight)

    def rank(i: int, all_reduce):
        sums = sums_of(weight[3 * i : 3 * i + 3], RULES[rule])
        all_reduce(sums)
        return image_losses(positions[3 * i : 3 * i + 3], weight[3 * i : 3 * i + 3], RULES[rule], sums).mean()

    assert sum(on_ranks(2, rank)) / 2 == pytest.approx(expected)
    alone = image_losses(positions, weight, RULES[rule], sums_of(weight, RULES[rule]))
    assert alone.mean() == pytest.approx(expected)


def test_maps_that_are_no_squares_are_refused():
    with pytest.raises(ValueError, match="6 patches are no square grid"):
        align_tokens(torch.randn(1, 6, 3), torch.randn(1, 4, 3), RULES["smaller"])
