"""Which images there are: a folder, an asset or a list becomes sorted paths, split into training and validation.

Any folder, glob or list is accepted for any dataset; nothing but the file names is looked at here. Files that turn out
broken are the loader's business.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""What counts as an image where no pattern is given, in either case."""


class DataError(ValueError):
    """The user's data or its configuration is wrong; the message says what was given and what to do."""


@dataclass
class DatasetConfig:
    """One dataset of images."""

    root: str = ""
    """A folder; or "asset:NAME", photographs fetched from a package registry; or a text file with one path a line
    (relative ones start at the file's folder; blank lines and lines that begin with # are skipped)."""
    pattern: str = ""
    """Globs below the folder, separated by "|", such as "train/**/*.png|test/**/*.png"; files and folders whose names
    begin with a dot are skipped. Empty: all images in the folder and below, by their suffix. Not used with a text
    file."""
    group: str = "generic"
    """Which teacher's kind of data it is: "generic", "3d", "human", or any other name. Each group has its share of
    every batch."""
    repeat: int = 1
    """How often each image is seen in one pass over the dataset's group."""
    holdout: int = 0
    """How many images to keep out of training, for validation. Chosen by a hash of the path below the root, so the
    choice is the same everywhere and does not depend on the seed."""
    val_root: str = ""
    """Instead of `holdout`: where the validation images are, as `root`."""
    rotate: str = ""
    """Glob on the path below the root: images that match are stored turned and are turned clockwise by 90 degrees
    (BEDLAM: "*closeup*")."""
    shrink: int = 0
    """Shorter side in pixels. Larger images are shrunk to it once, into the cache folder, so that decoding does not
    dominate; 0 uses the images as they are. See `dali_pipelines.shrink`."""


@dataclass
class DataConfig:
    """The images of a run. Defaults are DUNE's; UNIC used a crop_scale of [0.08, 1.0]."""

    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    """By name."""
    group_weights: dict[str, float] = field(default_factory=dict)
    """Share of every batch a group gets, in any unit. Empty: the same for every group ("teacher balanced")."""
    crop_scale: list[float] = field(default_factory=lambda: [0.4, 1.0])
    """RandomResizedCrop: range of the crop's share of the image's area."""
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """RandomResizedCrop: range of width / height, log-uniform."""
    flip_probability: float = 0.5
    """Of a horizontal flip."""
    jitter_probability: float = 0.8
    """Of the colour jitter; the next four are its strengths, as in torchvision's ColorJitter."""
    brightness: float = 0.4
    """Factor in [1 - brightness, 1 + brightness]."""
    contrast: float = 0.4
    """Factor in [1 - contrast, 1 + contrast]."""
    saturation: float = 0.2
    """Factor in [1 - saturation, 1 + saturation]."""
    hue: float = 0.1
    """Turns in [-hue, hue], at most 0.5."""
    grayscale_probability: float = 0.2
    """Of turning the image gray."""
    blur_probability: float = 0.2
    """Of a Gaussian blur with 9 taps."""
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 5.0])
    """Range of the blur's width in pixels."""
    solarize_probability: float = 0.2
    """Of solarizing at 0.5."""
    num_threads: int = 4
    """Threads that read files, and threads that decode, each, per process."""
    prefetch: int = 2
    """Batches that are decoded ahead."""
    max_broken_share: float = 0.01
    """The run stops when more than this share of a dataset's images cannot be decoded..."""
    max_broken_spared: int = 4
    """...but never for this many or fewer, unless they are more than half of the dataset."""

    def validate(self) -> None:
        """Raises DataError for values that make no sense; which datasets exist is checked when they are indexed."""
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            _check(f"{name}_probability", getattr(self, f"{name}_probability"), 0, 1)
        _check("hue", self.hue, 0, 0.5)
        for name in ("brightness", "contrast", "saturation"):
            _check(name, getattr(self, name), 0, float("inf"))
        for name, low, high in (("crop_scale", 0, 1), ("crop_ratio", 0, float("inf")), ("blur_sigma", 0, float("inf"))):
            values = list(getattr(self, name))
            if len(values) != 2 or not low < values[0] <= values[1] <= high:
                raise DataError(f"data.{name} is {values}: give [smallest, largest], above {low} and at most {high}")
        _check("max_broken_share", self.max_broken_share, 0, 1)
        for name in ("num_threads", "prefetch"):
            if getattr(self, name) < 1:
                raise DataError(f"data.{name} is {getattr(self, name)}: at least 1 is needed")


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise DataError(f"data.{name} is {value}: allowed are values from {low} to {high}")


class PathList(Sequence[str]):
    """Paths in one block of bytes: 20 million of them as Python strings would cost every rank two gigabytes."""

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0] + [len(path) for path in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


@dataclass(frozen=True)
class Dataset:
    """The images of one dataset."""

    name: str
    """Its name in the configuration."""
    config: DatasetConfig
    """Its configuration."""
    root: str
    """The folder of the training images (of the text file, where one is given)."""
    train: PathList
    """Paths, sorted."""
    val_root: str
    """The folder of the validation images."""
    val: PathList
    """Paths, sorted; may be empty."""


def index_dataset(name: str, config: DatasetConfig) -> Dataset:
    """Finds the images of a dataset.

    Args:
        name: for messages.
        config: where they are.

    Raises:
        DataError: no root, a folder or list that does not exist, no image found, or a holdout that leaves nothing to
            train on.
        AssetError (also a ValueError): an asset that is unknown or cannot be fetched.
    """
    if config.repeat < 1 or config.holdout < 0 or config.shrink < 0:
        raise DataError(f"dataset {name!r}: repeat must be at least 1, holdout and shrink at least 0, got {config}")
    root, relative = _list_images(name, config.root, config.pattern, "root")
    if config.val_root:
        if config.holdout:
            raise DataError(f"dataset {name!r} has both val_root and holdout: keep one")
        val_root, val = _list_images(name, config.val_root, config.pattern, "val_root")
        return Dataset(name, config, root, _join(root, relative), val_root, _join(val_root, val))
    if config.holdout >= len(relative):
        raise DataError(
            f"dataset {name!r}: a holdout of {config.holdout} leaves nothing to train on, "
            f"it has {len(relative)} images; lower data.datasets.{name}.holdout"
        )
    held = set(sorted(relative, key=_hash)[: config.holdout]) if config.holdout else set()
    train = _join(root, (path for path in relative if path not in held))
    return Dataset(name, config, root, train, root, _join(root, sorted(held)))


def index_datasets(config: DataConfig) -> list[Dataset]:
    """All datasets of a configuration, by name. Raises what `index_dataset` raises, and DataError if there is none."""
    config.validate()
    if not config.datasets:
        raise DataError(
            "data.datasets is empty: name at least one dataset, "
            "for instance data=folder data.datasets.images.root=/path/to/images"
        )
    return [index_dataset(name, config.datasets[name]) for name in sorted(config.datasets)]


def _hash(path: str) -> tuple[bytes, str]:
    return hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).digest(), path


def _join(root: str, relative: Iterable[str]) -> PathList:
    return PathList(os.path.join(root, path) for path in relative)


def _list_images(name: str, given: str, pattern: str, key: str) -> tuple[str, list[str]]:
    """(folder, sorted paths relative to it) of a folder, an asset or a text file."""
    where = f"data.datasets.{name}.{key}"
    if not given or given == "???":
        raise DataError(
            f"dataset {name!r} has no {key}: set {where} to a folder, to a text file of paths, or to asset:NAME"
        )
    if given.startswith("asset:"):
        from teachers.assets import fetch  # only demos need it

        folder = str(fetch(given.removeprefix("asset:")))
    else:
        folder = os.path.abspath(os.path.expanduser(given))
    if os.path.isfile(folder):
        return _read_list(name, folder)
    if not os.path.isdir(folder):
        raise DataError(f"dataset {name!r}: {given} is neither a folder nor a text file of paths; correct {where}")
    relative = _glob(folder, pattern) if pattern else _walk(folder)
    if not relative:
        looked_for = f"no file matches {pattern!r}" if pattern else f"no file ends in {', '.join(SUFFIXES)}"
        raise DataError(
            f"dataset {name!r}: {looked_for} in {given} or below; correct {where} or data.datasets.{name}.pattern"
        )
    return folder, relative


def _walk(folder: str) -> list[str]:
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder above would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        below = os.path.relpath(parent, folder)
        images = (f for f in files if f.lower().endswith(SUFFIXES) and not f.startswith("."))
        found.extend(f if below == "." else os.path.join(below, f) for f in images)
    return sorted(found)


def _glob(folder: str, pattern: str) -> list[str]:
    found = {p for part in pattern.split("|") for p in glob.iglob(part.strip(), root_dir=folder, recursive=True)}
    return sorted(p for p in found if os.path.isfile(os.path.join(folder, p)))


def _read_list(name: str, file: str) -> tuple[str, list[str]]:
    try:
        lines = Path(file).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise DataError(f"dataset {name!r}: cannot read {file}: {error}") from error
    folder = os.path.dirname(file)
    paths = sorted({line.strip() for line in lines if line.strip() and not line.startswith("#")})
    if not paths:
        raise DataError(f"dataset {name!r}: {file} lists no path; it should hold one path a line")
    if not any(os.path.isfile(os.path.join(folder, path)) for path in paths[:16]):
        raise DataError(
            f"dataset {name!r}: none of the first paths in {file} exists, such as {paths[0]!r}; "
            f"paths that are not absolute start at {folder}"
        )
    return folder, paths
