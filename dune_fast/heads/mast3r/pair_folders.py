"""Pairs of posed images on disk.

The layout "views", for training and for validation; VIEW is a path below ROOT without suffix:

    ROOT/pairs.txt           two VIEWs a line; blank lines and lines that begin with # are skipped
    ROOT/VIEW.jpg, .png      the image
    ROOT/VIEW.depth.npy      float [H, W], metres along the optical axis; 0 unknown, below 0 sky; or
    ROOT/VIEW.depth.png      16 bits, millimetres; 0 unknown
    ROOT/VIEW.npz            `intrinsics` [3, 3], pixel centres at integers, and `pose` [4, 4], camera-to-world; or
    ROOT/VIEW.txt            the same as seven lines of numbers

The layout "mapfree", the Map-free Relocalization dataset, has poses but no depth, so nothing is trained on it:

    ROOT/SCENE/intrinsics.txt   frame fx fy cx cy W H
    ROOT/SCENE/poses.txt        frame qw qx qy qz tx ty tz, world-to-camera
    ROOT/SCENE/overlaps.npz     `idxs` [P, 4]: sequence and frame of both views; `overlaps` [P]
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dune_fast.dali_pipelines.errors import BrokenImage, DataError
from dune_fast.dali_pipelines.images import decode
from dune_fast.heads.mast3r.crops import PosedView

LAYOUTS = ("views", "mapfree")
OVERLAPS = (0.2, 0.7)
"""Of the Map-free pairs that are used, as its baselines do."""
_IMAGES = (".jpg", ".png", ".jpeg")
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)
"""What reading a file that is damaged, or another one, raises."""
_SINGULAR = 1e-6
"""A pose is a rotation and a translation, with the determinant 1."""


@dataclass
class PairDatasetConfig:
    """One data set of pairs."""

    root: str = ""
    """Its folder."""
    layout: str = "views"
    """"views" or "mapfree"; see dune_fast/heads/mast3r/pair_folders.py."""
    metric: bool = True
    """Whether depth and poses are in metres. The scale of other sets is not learnt."""
    weight: float = 0.0
    """Share of every batch, in any unit; 0 for all: by the numbers of pairs."""

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise DataError(f"layout is {self.layout!r}: give one of {', '.join(LAYOUTS)}")
        if not 0 <= self.weight < float("inf"):
            raise DataError(f"weight is {self.weight}: give a number of at least 0")


@dataclass(frozen=True)
class PairFolder:
    """The pairs of one data set."""

    name: str
    root: Path
    layout: str
    metric: bool
    pairs: Sequence[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[PosedView, PosedView]:
        """Both views of a pair, in float32; the world is the frame of the first camera as it is stored.

        Raises:
            DataError: a file that is not there or cannot be read, sizes that do not agree, or a camera that is none.
        """
        views = [self.read_view(name) for name in self.pairs[index]]
        to_first = np.linalg.inv(views[0].pose)  # so that float32 holds poses far from the world's origin
        return tuple(
            v._replace(intrinsics=v.intrinsics.astype(np.float32), pose=(to_first @ v.pose).astype(np.float32))
            for v in views
        )

    def read_view(self, name: str) -> PosedView:
        """One view, its camera in float64, in the data set's own world."""
        try:
            if self.layout == "mapfree":
                image, depth = _read_image(self.root / name), None
                intrinsics, pose = _mapfree_camera(self.root, name)
            else:
                image, depth = _read_image(_image_path(self.root, name)), _read_depth(self.root, name)
                intrinsics, pose = _read_camera(self.root, name)
        except (*_UNREADABLE, BrokenImage) as error:
            raise DataError(f"{self.name}: view {name} of {self.root} cannot be read: {error}") from error
        depth = np.zeros(image.shape[:2], np.float32) if depth is None else depth
        if depth.shape != image.shape[:2]:
            sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (image, depth)]
            raise DataError(f"{self.name}: {name} of {self.root} has an image of {sizes[0]} pixels and a depth map of "
                            f"{sizes[1]}: they must agree")  # fmt: skip
        if intrinsics.shape != (3, 3) or pose.shape != (4, 4):
            raise DataError(f"{self.name}: {name} of {self.root} has intrinsics {list(intrinsics.shape)} and a pose "
                            f"{list(pose.shape)}: they must be [3, 3] and [4, 4]")  # fmt: skip
        if not (np.isfinite(intrinsics).all() and np.isfinite(pose).all() and intrinsics[[0, 1], [0, 1]].min() > 0
                and abs(np.linalg.det(pose)) > _SINGULAR):  # fmt: skip
            raise DataError(f"{self.name}: {name} of {self.root} has a camera that is none: it needs finite numbers, "
                            "positive focal lengths, and a pose that is a rotation and a translation")  # fmt: skip
        return PosedView(image, depth, intrinsics, pose)


def open_pairs(name: str, cfg: PairDatasetConfig) -> PairFolder:
    """Lists a data set's pairs. DataError if there is none."""
    root = Path(cfg.root).expanduser()
    found = _mapfree_pairs(root) if cfg.layout == "mapfree" else _listed_pairs(root / "pairs.txt")
    if not found:
        raise DataError(f"{name}: there is no pair in {root}; the layout {cfg.layout!r} is described in "
                        "dune_fast/heads/mast3r/pair_folders.py")  # fmt: skip
    return PairFolder(name, root, cfg.layout, cfg.metric, found)


def write_view(root: Path, name: str, view: PosedView, millimetres: bool = False) -> None:
    """Writes a view in the layout "views": PNG, depth as float32 .npy or as PNG in millimetres, camera as .npz."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(view.image).save(f"{path}.png")
    if millimetres:
        levels = np.rint(1000 * np.maximum(view.depth, 0))
        Image.fromarray(np.where(levels < 2**16, levels, 0).astype(np.uint16)).save(f"{path}.depth.png")
    else:
        np.save(f"{path}.depth.npy", view.depth.astype(np.float32))
    np.savez(f"{path}.npz", intrinsics=view.intrinsics, pose=view.pose)


def write_pairs(root: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """Writes pairs.txt, last: a folder with it is whole."""
    (root / "pairs.txt").write_text("".join(f"{first} {second}\n" for first, second in pairs))


def _listed_pairs(path: Path) -> list[tuple[str, str]]:
    """The lines of pairs.txt."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; it has to name two views a line") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not (words := line.split()) or words[0].startswith("#"):
            continue
        if len(words) != 2:
            raise DataError(f"{path}, line {number}: {line!r} has to be the names of two views")
        found.append((words[0], words[1]))
    return found


def _image_path(root: Path, name: str) -> Path:
    paths = [root / f"{name}{suffix}" for suffix in _IMAGES]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise ValueError(f"there is no image {name}{{{','.join(_IMAGES)}}}")
    return found


def _read_image(path: Path) -> np.ndarray:
    return np.array(decode(np.fromfile(path, np.uint8)))


def _load(path: Path) -> Any:
    """An array or a file of arrays; nothing in it is run."""
    fault = f"{path.name} is damaged, or no file of numpy's"
    if path.suffix == ".npz" and not zipfile.is_zipfile(path):  # which numpy would leave open
        raise ValueError(fault)
    try:
        return np.load(path, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise ValueError(fault) from error


def _read_depth(root: Path, name: str) -> np.ndarray:
    """float32 [H, W] in metres; what is not finite becomes 0, unknown."""
    if (path := root / f"{name}.depth.npy").is_file():
        depth = _load(path).astype(np.float32)
    else:
        with Image.open(root / f"{name}.depth.png") as image:
            if not image.mode.startswith("I"):
                raise ValueError(f"{name}.depth.png has the mode {image.mode}: 16 bits of millimetres are needed")
            depth = np.array(image).astype(np.float32) / 1000
    if depth.ndim != 2:
        raise ValueError(f"the depth map has {depth.ndim} dimensions, not 2")
    return np.where(np.isfinite(depth), depth, np.float32(0))


def _read_camera(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Intrinsics and pose, float64."""
    if (path := root / f"{name}.npz").is_file():
        with _load(path) as file:
            return file["intrinsics"].astype(np.float64), file["pose"].astype(np.float64)
    lines = (root / f"{name}.txt").read_text().splitlines()
    rows = [np.array(words, np.float64) for line in lines if (words := line.split())]
    if [len(row) for row in rows] != [3, 3, 3, 4, 4, 4, 4]:
        raise ValueError(f"{name}.txt has to hold three lines of intrinsics and four of the pose")
    return np.stack(rows[:3]), np.stack(rows[3:])


def _mapfree_pairs(root: Path) -> list[tuple[str, str]]:
    """Frames of both sequences whose overlap is in `OVERLAPS`, scene by scene."""
    found = []
    for path in sorted(root.glob("*/overlaps.npz")):
        try:
            with _load(path) as file:
                chosen = (file["overlaps"] > OVERLAPS[0]) & (file["overlaps"] < OVERLAPS[1])
                rows = file["idxs"][chosen].reshape(-1, 2, 2).tolist()  # of both views (sequence, frame)
            found += [tuple(f"{path.parent.name}/seq{s}/frame_{f:05d}.jpg" for s, f in row) for row in rows]
        except (*_UNREADABLE, IndexError) as error:
            raise DataError(f"{path} cannot be read: {error}; it holds `idxs` [P, 4] and `overlaps` [P]") from error
    return found


def _mapfree_camera(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Intrinsics and camera-to-world pose of a frame."""
    scene, _, frame = name.partition("/")
    lines = {}
    for file in ("intrinsics.txt", "poses.txt"):
        rows = (line.split() for line in (root / scene / file).read_text().splitlines())
        lines[file] = {row[0]: [float(x) for x in row[1:]] for row in rows if row and not row[0].startswith("#")}
    if lacking := [file for file, rows in lines.items() if frame not in rows]:
        raise ValueError(f"{scene}/{lacking[0]} lacks it")
    fx, fy, cx, cy, *_ = lines["intrinsics.txt"][frame]
    qw, qx, qy, qz, *t = lines["poses.txt"][frame]
    q = np.array([qw, qx, qy, qz])
    w, (x, y, z) = q[0] / np.linalg.norm(q), q[1:] / np.linalg.norm(q)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    world_to_camera = np.eye(4)
    world_to_camera[:3, :3] = np.eye(3) + 2 * w * cross + 2 * cross @ cross
    world_to_camera[:3, 3] = t
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), np.linalg.inv(world_to_camera)
