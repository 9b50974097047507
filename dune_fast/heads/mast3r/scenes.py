"""Synthetic rooms with posed views and exact depth, in the layout "views" of `pair_folders`: data for a trial.

    python -m dune_fast.heads.mast3r.scenes FOLDER --scenes 50

A room and the boxes in it are textured with noise of many scales, patches and, where they are given, photographs. A
pixel's ray has the third component 1 in its camera, so the parameter at which it meets a face is its depth. A scene is
a function of (seed, number) and the photographs alone.
"""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dune_fast.heads.mast3r.correspondences import back_project, visible
from dune_fast.heads.mast3r.crops import PosedView
from dune_fast.heads.mast3r.pair_folders import write_pairs, write_view

logger = logging.getLogger(__name__)

_TEXELS = 512
"""Side of a texture, in texels."""
_BANK = 48
"""Textures of a seed; a face takes a part of one in colours of its own."""


@dataclass(frozen=True)
class SceneConfig:
    """What is rendered."""

    seed: int = 0
    size: tuple[int, int] = (224, 168)
    """(width, height) of a view, in pixels."""
    boxes: tuple[int, int] = (4, 8)
    """Fewest and most boxes in a room."""
    views: int = 4
    """Of a scene; every two of them whose overlap is in the range are a pair, in one order."""
    overlap: tuple[float, float] = (0.3, 0.95)
    """Share of the first view's pixels that the second one shows."""
    baseline: tuple[float, float] = (0.15, 1.2)
    """Distance of a view from the scene's first one, in metres."""
    samples: int = 2
    """Rays of a pixel's colour, along each axis; depth is that of its centre."""
    focal: tuple[float, float] = (0.8, 1.2)
    """Range of the focal length, in widths of the view."""
    off_centre: float = 4.0
    """Pixels that the principal point is off the middle, at most, along each axis."""


class Room(NamedTuple):
    """Textured boxes; the last one is the room, seen from inside. Metres; y points down."""

    centres: np.ndarray
    """[N, 3]"""
    halves: np.ndarray
    """[N, 3], half the sides."""
    rotations: np.ndarray
    """[N, 3, 3], from the box's axes to the world's."""
    textures: np.ndarray
    """uint8 [K, T, T, 3], which are mirrored beyond their borders."""
    taken: np.ndarray
    """[6 N], the texture of face 6 * box + 2 * axis + (1 at the axis' positive end)."""
    spans: np.ndarray
    """[6 N], metres that a texture covers."""
    offsets: np.ndarray
    """[6 N, 2], metres."""
    tints: np.ndarray
    """[6 N, 3], factors of red, green and blue, at most 1."""


def make_room(rng: np.random.Generator, cfg: SceneConfig, textures: np.ndarray) -> Room:
    """A drawn room of about 6 x 3 x 6 metres with boxes on its floor and in the air."""
    count = int(rng.integers(cfg.boxes[0], cfg.boxes[1] + 1))
    whole = np.array([rng.uniform(2.5, 3.5), rng.uniform(1.3, 1.7), rng.uniform(2.5, 3.5)])
    halves = rng.uniform(0.15, 0.6, (count, 3))
    centres = rng.uniform(-0.55, 0.55, (count, 3)) * whole
    on_floor = rng.random(count) < 0.6
    centres[on_floor, 1] = (whole[1] - halves[:, 1])[on_floor]
    angles = [*rng.uniform(0, np.pi, count), 0.0]
    rotations = np.stack([_about_y(angle) for angle in angles])
    faces = 6 * (count + 1)
    # a face is no larger than its texture: nothing on it is there twice
    largest = np.repeat([*halves.max(1), whole.max()], 6)
    spans = largest * np.concatenate([rng.uniform(2.5, 4.0, faces - 6), np.full(6, 2.0)])
    offsets = largest[:, None] + rng.uniform(0, 1, (faces, 2)) * (spans - 2 * largest)[:, None]
    return Room(
        np.concatenate([centres, [np.zeros(3)]]), np.concatenate([halves, [whole]]), rotations, textures,
        rng.integers(len(textures), size=faces), spans, offsets, rng.uniform(0.5, 1.0, (faces, 3)),
    )  # fmt: skip


@functools.lru_cache(maxsize=2)
def make_textures(seed: int, photographs: tuple[Path, ...] = ()) -> np.ndarray:
    """The textures of a seed, uint8 [K, T, T, 3]; half are photographs if there are any."""
    rng = np.random.default_rng([seed % 2**64, 0])
    made = [_photograph(rng, photographs) if photographs and i % 2 else _noise(rng, i % 3 == 0) for i in range(_BANK)]
    return np.stack(made)


def _photograph(rng: np.random.Generator, photographs: Sequence[Path]) -> np.ndarray:
    """A square part of one of them."""
    with Image.open(photographs[rng.integers(len(photographs))]) as image:
        image.draft("RGB", (2 * _TEXELS, 2 * _TEXELS))
        side = int(min(image.size) * rng.uniform(0.6, 1.0))
        left, top = (int(rng.integers(length - side + 1)) for length in image.size)
        box = (left, top, left + side, top + side)
        return np.array(image.convert("RGB").resize((_TEXELS, _TEXELS), Image.Resampling.BICUBIC, box))


def _noise(rng: np.random.Generator, patches: bool) -> np.ndarray:
    """Noise of many scales, mostly grey, with the brightness of squares changed where `patches` is set."""
    texture = np.zeros((_TEXELS, _TEXELS, 3), np.float32)
    for octave in range(2, 9):
        grid = (2**octave, 2**octave)
        colours = rng.normal(0, 1, (1, *grid)) + 0.5 * rng.normal(0, 1, (3, *grid))
        for channel, values in enumerate(colours.astype(np.float32)):
            grown = Image.fromarray(values).resize((_TEXELS, _TEXELS), Image.Resampling.BICUBIC)
            texture[..., channel] += 2.0 ** (-0.5 * octave) * np.asarray(grown)
    texture = 128 + 50 * texture / texture.std() + rng.uniform(-50, 50, 3)
    if patches:
        cells = rng.uniform(0.4, 1.2, (rng.integers(6, 20),) * 2)
        index = np.arange(_TEXELS) * len(cells) // _TEXELS
        texture *= cells[index[:, None], index][..., None]
    return texture.clip(0, 255).astype(np.uint8)


def cast(room: Room, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nearest face of rays [P, 3] from a point [3] in the room.

    Returns:
        The parameter t of origin + t ray [P], the face (see `Room.taken`) [P], and where on it, in metres [P, 2].
    """
    best = np.full(len(rays), np.inf)
    face, place = np.zeros(len(rays), np.int64), np.zeros((len(rays), 2))
    for box, (centre, half, rotation) in enumerate(zip(room.centres, room.halves, room.rotations, strict=True)):
        start, local = (origin - centre) @ rotation, rays @ rotation  # in the box's axes
        inside = box == len(room.centres) - 1  # the room is left, not entered
        # per axis, where the ray passes the box's two planes: [P] each
        with np.errstate(divide="ignore"):
            planes = [(np.copysign(h, d if inside else -d) - s) / d for s, h, d in zip(start, half, local.T,
                                                                                       strict=True)]  # fmt: skip
            others = [(np.copysign(h, d) - s) / d for s, h, d in zip(start, half, local.T, strict=True)]
        t = functools.reduce(np.minimum if inside else np.maximum, planes)
        hit = (t < best) & (t > 1e-6)
        if not inside:
            hit &= t < functools.reduce(np.minimum, others)
        axis = np.select([t == plane for plane in planes[:2]], [0, 1], 2)[hit]
        at = start + t[hit, None] * local[hit]
        along = at[np.arange(len(at)), axis]
        best[hit], face[hit] = t[hit], 6 * box + 2 * axis + (along > 0)
        place[hit, 0] = np.where(axis == 0, at[:, 1], at[:, 0])
        place[hit, 1] = np.where(axis == 2, at[:, 1], at[:, 2])
    return best, face, place


def render(room: Room, intrinsics: np.ndarray, pose: np.ndarray, size: tuple[int, int], samples: int = 2) -> PosedView:
    """The view of a camera inside the room; depth float32, exact."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    back = np.linalg.inv(intrinsics).T

    def look(dx: float, dy: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pixels = np.stack([x + dx, y + dy, np.ones_like(x)], -1).reshape(-1, 3)
        return cast(room, pose[:3, 3], pixels @ back @ pose[:3, :3].T)

    offsets = (np.arange(samples) + 0.5) / samples - 0.5
    colours = [_colours(room, *look(dx, dy)[1:]) for dx in offsets for dy in offsets]
    image = np.mean(colours, 0).reshape(height, width, 3).round().astype(np.uint8)
    return PosedView(image, look(0, 0)[0].reshape(height, width).astype(np.float32), intrinsics, pose)


def _colours(room: Room, faces: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Float [P, 3]: bilinear in the faces' textures."""
    place = (at + room.offsets[faces]) / room.spans[faces, None] * (_TEXELS - 1)
    low = np.floor(place).astype(np.int64)
    part = place - low
    total = np.zeros((len(faces), 3))
    for i in (0, 1):
        for j in (0, 1):
            index = (low + (i, j)) % (2 * _TEXELS)
            index = np.minimum(index, 2 * _TEXELS - 1 - index)
            weight = np.abs(part - (1 - i, 1 - j)).prod(1)
            total += weight[:, None] * room.textures[room.taken[faces], index[:, 1], index[:, 0]]
    return total * room.tints[faces]


def make_scene(number: int, cfg: SceneConfig, photographs: Sequence[Path] = ()) -> tuple[list[PosedView], list]:
    """The views of a scene and the pairs of them, (index, index) each; at least one pair."""
    rng = np.random.default_rng([cfg.seed % 2**64, 1, number])
    while True:
        room = make_room(rng, cfg, make_textures(cfg.seed, tuple(photographs)))
        views: list[PosedView] = []
        target = room.halves[-1] * rng.uniform(-0.35, 0.35, 3)
        for _ in range(50):
            pose = _drawn_pose(rng, room, cfg, target, views[0].pose if views else None)
            focal = cfg.size[0] * rng.uniform(*cfg.focal)
            middle = (np.array(cfg.size) - 1) / 2 + rng.uniform(-cfg.off_centre, cfg.off_centre, 2)
            camera = np.array([[focal, 0, middle[0]], [0, focal, middle[1]], [0, 0, 1]])
            view = render(room, camera, pose, cfg.size, cfg.samples)
            if np.quantile(view.depth, 0.05) > 0.4:  # no box fills the view
                views.append(view)
            if len(views) == cfg.views:
                break
        pairs = [(i, j) for j in range(len(views)) for i in range(j)
                 if cfg.overlap[0] <= overlap(views[i], views[j]) <= cfg.overlap[1]]  # fmt: skip
        if pairs:
            return views, pairs


def overlap(first: PosedView, second: PosedView) -> float:
    """Share of the first view's pixels that the second one shows."""
    points = back_project(first.depth, first.intrinsics, first.pose)
    return float(visible(points, second.depth, second.intrinsics, second.pose).mean())


def write_scenes(root: Path, count: int, cfg: SceneConfig, photographs: Sequence[Path] = (), first: int = 0) -> None:
    """Writes scenes first to first + count - 1 and pairs.txt; a folder that has it is left as it is."""
    if (root / "pairs.txt").is_file():
        return
    pairs = []
    for number in range(first, first + count):
        views, chosen = make_scene(number, cfg, photographs)
        for i, view in enumerate(views):
            write_view(root, f"{number:05d}/{i}", view)
        pairs += [(f"{number:05d}/{i}", f"{number:05d}/{j}") for i, j in chosen]
        if (number - first + 1) % 50 == 0:
            logger.info("%s: %d of %d scenes", root, number - first + 1, count)
    write_pairs(root, pairs)


def _drawn_pose(
    rng: np.random.Generator, room: Room, cfg: SceneConfig, target: np.ndarray, first: np.ndarray | None
) -> np.ndarray:
    """A camera inside the room that looks at about the target, near the first view if there is one."""
    limit = 0.85 * room.halves[-1]
    if first is None:
        angle = rng.uniform(0, 2 * np.pi)
        place = target + rng.uniform(1.5, 3.0) * np.array([np.cos(angle), rng.uniform(-0.5, 0.1), np.sin(angle)])
    else:
        step = rng.normal(0, 1, 3) * (1, 0.4, 1)
        place = first[:3, 3] + step / np.linalg.norm(step) * rng.uniform(*cfg.baseline)
    place = place.clip(-limit, limit)
    forward = target + rng.normal(0, 0.25, 3) - place
    forward /= np.linalg.norm(forward)
    roll = rng.normal(0, 0.1)
    right = np.cross([np.sin(roll), np.cos(roll), 0.0], forward)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
    pose[:3, 3] = place
    return pose


def _about_y(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: writes scenes."""
    parser = argparse.ArgumentParser(prog="python -m dune_fast.heads.mast3r.scenes", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=2, default=(224, 168), metavar=("WIDTH", "HEIGHT"))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_scenes(args.folder, args.scenes, SceneConfig(args.seed, tuple(args.size)))


if __name__ == "__main__":
    main()
