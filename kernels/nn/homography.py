"""Projective maps between views of one image, the grids that they are sampled at, and where a view shows the image.

    transform = T(student's corners -> S) . T(teacher's quad -> student's quad) . T(S -> teacher's corners)

A view is a picture of h x w pixels that was cut out of a source image, turned, resized or warped. Its quad is where the
source's corners (0, 0), (W, 0), (W, H), (0, H) have come to lie in it, x before y, in the view's pixels. T(a -> b) is
the projective map of four corners, and S the square from -1 to 1. So a transform takes a point of the teacher's view,
in [-1, 1], to the point of the student's view that shows the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

_UNIT = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
_SQUARE = ((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))


def projective(source: Tensor, target: Tensor) -> Tensor:
    """The maps that take four corners to four others.

    Args:
        source, target: [..., 4, 2], x before y; no three corners on one line.

    Returns:
        float64 [..., 3, 3], the last entry 1: (x, y, 1) -> (x' z, y' z, z).
    """
    source, target = torch.broadcast_tensors(source.double(), target.double())
    x, y, u, v = *source.unbind(-1), *target.unbind(-1)  # [..., 4]
    one, none = torch.ones_like(x), torch.zeros_like(x)
    rows = torch.cat([
        torch.stack([x, y, one, none, none, none, -u * x, -u * y], dim=-1),
        torch.stack([none, none, none, x, y, one, -v * x, -v * y], dim=-1),
    ], dim=-2)  # [..., 8, 8]  # fmt: skip
    found = torch.linalg.solve(rows, torch.cat([u, v], dim=-1))
    return torch.cat([found, one[..., :1]], dim=-1).unflatten(-1, (3, 3))


def corners(size: tuple[int, int]) -> Tensor:
    """The quad of an image, or a view, of (h, w) pixels in its own pixels: float64 [4, 2]."""
    height, width = size
    return torch.tensor(_UNIT, dtype=torch.float64) * torch.tensor([width, height], dtype=torch.float64)


def between_views(
    teacher_quad: Tensor, teacher_size: tuple[int, int], student_quad: Tensor, student_size: tuple[int, int]
) -> Tensor:
    """The transform of every image, from the teacher's view to the student's: float64 [B, 3, 3].

    Args:
        teacher_quad, student_quad: [B, 4, 2], in pixels of the views.
        teacher_size, student_size: (h, w) of the views.
    """
    square = torch.tensor(_SQUARE, dtype=torch.float64)
    inwards = projective(square, corners(teacher_size))
    outwards = projective(corners(student_size), square)
    return outwards @ projective(teacher_quad.cpu(), student_quad.cpu()) @ inwards


def grid(transform: Tensor, size: tuple[int, int]) -> Tensor:
    """Where the points of a map are in the other view: what `grid_sample` takes, with corners aligned.

    Args:
        transform: [B, 3, 3], from the map's view to the other one.
        size: (h, w) of the map; its points go from -1 to 1, ends included, and a single one is at -1.

    Returns:
        [B, h, w, 2], x before y, of the transform's type and device.
    """
    y, x = (torch.linspace(-1, 1, n, dtype=transform.dtype, device=transform.device) for n in size)
    points = torch.stack([x.expand(size), y[:, None].expand(size), torch.ones_like(x).expand(size)], dim=-1)
    found = points.flatten(0, 1) @ transform.transpose(-1, -2)  # [B, h w, 3]
    return (found[..., :2] / found[..., 2:]).unflatten(-2, size)


def valid_mask(quad: Tensor, size: tuple[int, int]) -> Tensor:
    """Which pixels of every view show the source image: bool [B, h, w], on the quad's device.

    Corners are rounded, and all pixels from edge to edge belong, those that the edges run through too. So the mask of
    an axis-parallel quad is the pixels from corner to corner (`box_mask`). Another quad has to be convex.

    Args:
        quad: [B, 4, 2], in pixels.
        size: (h, w) of the views.
    """
    height, width = size
    corner = quad.double().round()  # [B, 4, 2]
    edge = corner.roll(-1, dims=1) - corner
    y = torch.arange(height, dtype=torch.float64, device=quad.device)[:, None]
    x = torch.arange(width, dtype=torch.float64, device=quad.device)
    area = (corner[:, :, 0] * corner.roll(-1, 1)[:, :, 1] - corner[:, :, 1] * corner.roll(-1, 1)[:, :, 0]).sum(1)
    inside = torch.ones(len(quad), height, width, dtype=torch.bool, device=quad.device)
    for i in range(4):
        dx, dy = edge[:, i, 0, None, None], edge[:, i, 1, None, None]  # [B, 1, 1]
        cross = dx * (y - corner[:, i, 1, None, None]) - dy * (x - corner[:, i, 0, None, None])
        # a line drawn pixel by pixel strays by half a pixel along its minor axis
        inside &= cross * area.sign()[:, None, None] >= -0.5 * torch.maximum(dx.abs(), dy.abs())
    return inside


def box_mask(quad: Tensor, size: tuple[int, int]) -> Tensor:
    """`valid_mask` of axis-parallel quads, in one comparison a side."""
    corner = quad.double().round()
    low, high = corner.amin(1), corner.amax(1)  # [B, 2]
    inside = []
    for axis, side in ((1, size[0]), (0, size[1])):
        at = torch.arange(side, dtype=torch.float64, device=quad.device)
        inside.append((at >= low[:, axis, None]) & (at <= high[:, axis, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]
