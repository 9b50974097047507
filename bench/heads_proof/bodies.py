"""A body model in SMPL-X's format that is nobody's property: capsules around 55 joints, for tests and the proof.

Names, shapes and order of the arrays are the official ones, with fewer vertices. The skeleton is a standing person with
spread arms, y up, x to its left, z ahead, in metres; the left and the right half mirror each other.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from dune_fast.dali_pipelines.storage import write_whole

PARENTS = (
    -1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 15, 15, 15,
    20, 25, 26, 20, 28, 29, 20, 31, 32, 20, 34, 35, 20, 37, 38, 21, 40, 41, 21, 43, 44, 21, 46, 47, 21, 49, 50, 21, 52,
    53,
)  # fmt: skip
_MIDDLE = {
    0: (0, -0.35, 0), 3: (0, -0.24, -0.01), 6: (0, -0.11, -0.02), 9: (0, -0.02, -0.01), 12: (0, 0.17, -0.02),
    15: (0, 0.27, 0), 22: (0, 0.25, 0.02),
}  # fmt: skip
_LEFT = {
    1: (0.07, -0.44, 0), 4: (0.11, -0.82, 0), 7: (0.09, -1.23, -0.03), 10: (0.12, -1.29, 0.1), 13: (0.07, 0.09, -0.01),
    16: (0.18, 0.11, -0.02), 18: (0.44, 0.1, -0.04), 20: (0.7, 0.1, -0.04), 23: (0.03, 0.31, 0.08),
}  # fmt: skip
_RIGHT = {1: 2, 4: 5, 7: 8, 10: 11, 13: 14, 16: 17, 18: 19, 20: 21, 23: 24}
_FINGERS = (0.03, 0.01, -0.03, -0.01, 0.05)  # z of index, middle, pinky, ring, thumb

_RADII = {0: 0.13, 1: 0.085, 3: 0.12, 4: 0.06, 6: 0.125, 7: 0.045, 9: 0.13, 12: 0.05, 13: 0.07, 15: 0.1, 16: 0.055,
          18: 0.045, 20: 0.035}  # fmt: skip
_AROUND, _RINGS = 6, 3
_SITES = (
    (0, 0.3, 0.11), (-0.03, 0.31, 0.08), (0.03, 0.31, 0.08), (-0.1, 0.3, 0), (0.1, 0.3, 0), (0.13, -1.3, 0.2),
    (0.15, -1.3, 0.18), (0.09, -1.3, -0.07), (-0.13, -1.3, 0.2), (-0.15, -1.3, 0.18), (-0.09, -1.3, -0.07),
    (0.78, 0.1, 0.02), (0.86, 0.1, -0.01), (0.86, 0.1, -0.03), (0.86, 0.1, -0.05), (0.84, 0.1, -0.07),
    (-0.78, 0.1, 0.02), (-0.86, 0.1, -0.01), (-0.86, 0.1, -0.03), (-0.86, 0.1, -0.05), (-0.84, 0.1, -0.07),
)  # fmt: skip
"""Where the 21 vertices that are joints are looked for, in the order of `smplx.VERTEX_JOINTS`."""


def joints() -> np.ndarray:
    """The skeleton at rest, [55, 3] metres."""
    out = np.zeros((55, 3))
    for i, place in (_MIDDLE | _LEFT).items():
        out[i] = place
    for left, right in _RIGHT.items():
        out[right] = out[left] * (-1, 1, 1)
    for finger, z in enumerate(_FINGERS):
        for k in range(3):
            i = 25 + 3 * finger + k
            out[i] = (0.76 + 0.035 * k - 0.03 * (finger == 4), 0.1, -0.04 + z)
            out[i + 15] = out[i] * (-1, 1, 1)
    return out


def _bones(rest: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray, float]]:
    """(joint that moves it, its two ends, radius) of every capsule."""
    found = []
    for child, parent in enumerate(PARENTS):
        if parent >= 0 and child < 22 and parent in _RADII | {r: 0 for r in _RIGHT.values()}:
            radius = _RADII.get(parent) or _RADII[next(k for k, r in _RIGHT.items() if r == parent)]
            if np.linalg.norm(rest[child] - rest[parent]) > 0.05:
                found.append((parent, rest[parent], rest[child], radius))
    found.append((15, rest[15], rest[15] + (0, 0.12, 0.01), _RADII[15]))
    for side, sign in ((0, 1), (1, -1)):
        toe, wrist = 10 + side, 20 + side
        found.append((toe, rest[toe], rest[toe] + (0, -0.01, 0.09), 0.04))
        found.append((wrist, rest[wrist], rest[28 + 15 * side], 0.04))  # the palm, to the middle finger
        for finger in range(5):
            first = 25 + 15 * side + 3 * finger
            found.append((first, rest[first], rest[first + 2] + (0.03 * sign, 0, 0), 0.012))
    return found


def _capsule(a: np.ndarray, b: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices [n, 3], their places along the axis from 0 to 1 [n], faces [m, 3] that turn outwards."""
    axis = (b - a) / np.linalg.norm(b - a)
    side = np.cross(axis, (0.0, 0, 1) if abs(axis[2]) < 0.9 else (0.0, 1, 0))
    side /= np.linalg.norm(side)
    up = np.cross(axis, side)
    angles = 2 * np.pi * np.arange(_AROUND) / _AROUND
    ring = radius * (np.cos(angles)[:, None] * side + np.sin(angles)[:, None] * up)
    along = np.linspace(0.0, 1.0, _RINGS)
    points = [a - radius * 0.7 * axis, *(a + t * (b - a) + r for t in along for r in ring), b + radius * 0.7 * axis]
    last, faces = 1 + _RINGS * _AROUND, []
    for k in range(_AROUND):
        following = (k + 1) % _AROUND
        faces.append((0, 1 + following, 1 + k))
        faces.append((last, last - _AROUND + k, last - _AROUND + following))
        for level in range(_RINGS - 1):
            low, high = 1 + level * _AROUND, 1 + (level + 1) * _AROUND
            faces += [(low + k, low + following, high + following), (low + k, high + following, high + k)]
    return np.array(points), np.array([0, *np.repeat(along, _AROUND), 1]), np.array(faces)


def _regressor(rest: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """[55, V]: each joint out of its nearest vertices, exactly, with weights that add up to 1."""
    out = np.zeros((len(rest), len(vertices)))
    for i, joint in enumerate(rest):
        near = np.argsort(np.linalg.norm(vertices - joint, axis=1))[:24]
        system = np.concatenate([vertices[near].T, np.ones((1, len(near)))])
        even = np.full(len(near), 1 / len(near))
        wanted = np.append(joint, 1.0) - system @ even
        out[i, near] = even + np.linalg.lstsq(system, wanted, rcond=None)[0]
    return out


def body_arrays(columns: int = 400, seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of the file, float32 and integers.

    Args:
        columns: shape directions: 400, or the old files' 20.
        seed: of the small random ones.
    """
    rng, rest = np.random.default_rng(seed), joints()
    vertices, weights, faces = [], [], []
    for joint, a, b, radius in _bones(rest):
        points, along, triangles = _capsule(a, b, radius)
        part = np.zeros((len(points), 55))
        part[:, joint] = 1.0
        if PARENTS[joint] >= 0:  # the first ring bends with what is before
            bent = along == 0
            part[bent, joint], part[bent, PARENTS[joint]] = 0.6, 0.4
        faces.append(triangles + sum(map(len, vertices)))
        vertices.append(points)
        weights.append(part)
    v, w, f = np.concatenate(vertices), np.concatenate(weights), np.concatenate(faces)
    shapes = np.zeros((len(v), 3, columns))
    shapes[..., 0] = 0.04 * v  # tall
    shapes[..., 1] = 0.03 * (v - w @ rest) * (1, 0, 1)  # stout
    start, head = {400: 300, 20: 10}[columns], w[:, 15] > 0.5
    for k in range(2, 10):
        wave = np.sin(v @ rng.normal(size=(3, 3)) * 3 + rng.uniform(0, 6, 3))
        shapes[..., k] = 0.006 * wave
    shapes[head, :, start : start + 10] = 0.004 * rng.normal(size=(head.sum(), 3, 10))
    around = np.argsort(np.linalg.norm(v[f].mean(1) - (0, 0.3, 0.12), axis=1))  # faces, from the face's middle on
    bary = rng.dirichlet((1, 1, 1), 51)
    kintree = np.stack([np.array([2**32 - 1, *PARENTS[1:]]), np.arange(55)])
    arrays = {
        "v_template": v, "shapedirs": shapes, "posedirs": 3e-4 * rng.normal(size=(len(v), 3, 486)),
        "J_regressor": _regressor(rest, v), "weights": w, "lmk_bary_coords": bary,
        "hands_meanl": 0.1 * rng.normal(size=45), "hands_meanr": 0.1 * rng.normal(size=45),
    }  # fmt: skip
    nearest = [int(np.argmin(np.linalg.norm(v - np.array(site), axis=1))) for site in _SITES]
    return {name: array.astype(np.float32) for name, array in arrays.items()} | {
        "kintree_table": kintree.astype(np.int64), "f": f.astype(np.uint32),
        "lmk_faces_idx": np.resize(around[:20], 51).astype(np.int64), "vertex_ids": np.array(nearest, np.int64),
    }  # fmt: skip


def write_body_model(path: Path, columns: int = 400, seed: int = 0) -> Path:
    """Writes the model as SMPLX_NEUTRAL.npz is written; returns the path."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **body_arrays(columns, seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())
    return path
