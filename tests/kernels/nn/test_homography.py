"""Projective maps, grids and masks, against OpenCV and by their properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dune_fast.kernels.nn.homography import between_views, box_mask, corners, grid, projective, valid_mask

TURNED = [[9.0, -6.0], [58.7, 9.4], [46.9, 47.6], [-2.8, 32.2]]
WARPED = [[2.0, 0.0], [48.9, 0.0], [45.6, 33.8], [1.9, 37.0]]
MIRRORED = [[40.0, 3.4], [-8.2, 3.4], [-8.2, 30.0], [40.0, 30.0]]


@pytest.mark.parametrize("quad", [TURNED, WARPED, MIRRORED])
def test_maps_and_masks_are_opencvs(quad):
    cv2 = pytest.importorskip("cv2")
    source = corners((40, 52))
    found = projective(source, torch.tensor(quad))
    expected = cv2.getPerspectiveTransform(source.numpy().astype(np.float32), np.array(quad, np.float32))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)
    canvas = np.zeros((44, 48), np.uint8)
    cv2.fillPoly(canvas, [np.array(quad).round().astype(np.int32)], 1)
    mask = valid_mask(torch.tensor([quad]), (44, 48))[0].numpy()
    assert (mask != canvas.astype(bool)).mean() <= (0.0 if quad is MIRRORED else 0.03)
    inner = cv2.erode(canvas, np.ones((3, 3), np.uint8), borderValue=1)
    assert mask[inner > 0].all() and not mask[cv2.dilate(canvas, np.ones((3, 3), np.uint8)) == 0].any()


def test_a_box_is_the_mask_of_an_axis_parallel_quad():
    quads = torch.tensor([MIRRORED, [[-3.0, -4.0], [33.4, -4.0], [33.4, 28.0], [-3.0, 28.0]]])
    assert torch.equal(box_mask(quads, (44, 37)), valid_mask(quads, (44, 37)))
    assert box_mask(quads, (44, 37))[1, :29, :34].all() and box_mask(quads, (44, 37))[1].sum() == 29 * 34


def test_a_transform_takes_a_teachers_pixel_to_the_students_that_shows_the_same():
    """Also that points far apart agree: the grid of a map is in the other view where the transform says."""
    teacher, student = torch.tensor([TURNED, WARPED]), torch.tensor([MIRRORED, TURNED])
    found = between_views(teacher, (48, 60), student, (32, 40))
    for b in range(2):
        point = torch.tensor([0.3, 0.7, 1.0], dtype=torch.float64) * torch.tensor([52.0, 40.0, 1.0])
        views = []
        for quad, (height, width) in ((teacher[b], (48, 60)), (student[b], (32, 40))):
            x, y, z = projective(corners((40, 52)), quad) @ point
            views.append((2 * x / z / width - 1, 2 * y / z / height - 1))
        x, y, z = found[b] @ torch.stack([*views[0], torch.ones((), dtype=torch.float64)])
        torch.testing.assert_close(torch.stack([x / z, y / z]), torch.stack(views[1]))
    where = grid(found, (3, 5))
    assert where.shape == (2, 3, 5, 2)
    corner = found @ torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(where[:, 0, -1], corner[:, :2] / corner[:, 2:])


def test_a_view_onto_itself_is_the_identity():
    quads = torch.tensor([TURNED])
    found = between_views(quads, (48, 60), quads, (48, 60))
    torch.testing.assert_close(found / found[:, 2:, 2:], torch.eye(3, dtype=torch.float64)[None], atol=1e-9, rtol=0)
    assert torch.equal(grid(torch.eye(3)[None], (1, 3))[0, 0], torch.tensor([[-1.0, -1.0], [0.0, -1.0], [1.0, -1.0]]))
