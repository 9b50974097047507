"""Images with a label or a depth for each pixel: where they are in ADE20K, Cityscapes, NYUd, ScanNet and plain folders.

    ade20k      ROOT/images/{training,validation}/*.jpg, ROOT/annotations/{training,validation}/*.png
    cityscapes  ROOT/leftImg8bit/{train,val}/CITY/*_leftImg8bit.png, ROOT/gtFine/{train,val}/CITY/*_labelIds.png
    nyud        ROOT/nyu_train.txt and nyu_test.txt: image and target a line, below ROOT (further columns do not count)
    scannet     ROOT/SCENE/color/*.jpg with depth/*.png or label/*.png, ROOT/scannetv2_{train,val}.txt name the scenes
    plain       ROOT/images/{train,val}/..., ROOT/labels/{train,val}/... (or depth/...); or train.txt, val.txt as nyud

ROOT/classes.txt may name the classes of labels, one a line; ADE20K's objectInfo150.txt is read too.
Labels are PNGs of classes. Depths are PNGs of 16 bits in millimetres (`depth_scale`), or .npy in metres; 0: not known.
Images are read as they are stored, whatever their EXIF orientation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dune_fast.dali_pipelines.errors import BrokenImage, DataError
from dune_fast.dali_pipelines.images import SUFFIXES, decode
from dune_fast.heads.linear.segmentation import IGNORED

LAYOUTS = ("ade20k", "cityscapes", "nyud", "scannet", "plain")
TASKS = ("segmentation", "depth")
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The ids of the files that are classes 0 to 18."""
_SCANNET = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)
"""NYU40's ids of the benchmark's 20 classes."""
CLASSES = {"ade20k": 150, "cityscapes": 19, "nyud": 40, "scannet": 20}
_SPLITS = {"train": ("training", "train"), "val": ("validation", "val", "valid", "test")}


@dataclass(frozen=True)
class Pairs:
    """The images of one split."""

    layout: str
    task: str
    files: tuple[tuple[str, str], ...]
    """(image, target) each."""
    depth_scale: float = 1000.0
    """Units of a depth PNG in a metre."""

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """An image, uint8 [3, H, W], and its labels, int64 [H, W], or depth, float32 [H, W] in metres.

        Raises:
            DataError: a file that cannot be read, or an image and a target of different sizes.
        """
        image_path, target_path = self.files[index]
        try:
            image = np.array(decode(np.fromfile(image_path, np.uint8)))
            target = self._target(target_path)
        except (OSError, ValueError, BrokenImage) as error:
            raise DataError(f"{image_path} with {target_path} cannot be read: {error}") from error
        if image.shape[:2] != target.shape:
            if self.layout == "scannet":  # the colours have more pixels than the depth
                height, width = target.shape
                image = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
            else:
                turned = image.shape[1::-1] == target.shape
                raise DataError(
                    f"{image_path} has {image.shape[1]}x{image.shape[0]} pixels, {target_path} "
                    f"{target.shape[1]}x{target.shape[0]}: they must agree"
                    f"{' (EXIF orientations are not applied: write the image upright)' if turned else ''}"
                )
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(target)

    def _target(self, path: str) -> np.ndarray:
        if path.endswith(".npy"):
            values = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                values = np.array(image)
        if values.ndim != 2:
            raise ValueError(f"the target has {values.ndim} dimensions; a map of one value a pixel is needed")
        if self.task == "segmentation":
            return mapped_labels(values.astype(np.int64), self.layout, path)
        depth = values.astype(np.float32)
        depth = depth if path.endswith(".npy") else depth / np.float32(self.depth_scale)
        return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def mapped_labels(values: np.ndarray, layout: str, path: str = "") -> np.ndarray:
    """The ids of a file as classes from 0, 255 for none. int64 [H, W] -> int64 [H, W]."""
    if layout in ("ade20k", "nyud"):  # 0 is no class
        return np.where((values == 0) | (values == IGNORED), IGNORED, values - 1)
    table = {"cityscapes": _CITYSCAPES, "scannet": _SCANNET}.get(layout, ())
    if not table or path.endswith("_labelTrainIds.png"):
        return values
    mapping = np.full(max(int(values.max(initial=0)), 255) + 1, IGNORED, np.int64)
    mapping[list(table)] = np.arange(len(table))
    return mapping[values]


def guess_layout(root: Path) -> str:
    """The layout that the folder looks like."""
    if (root / "gtFine").is_dir():
        return "cityscapes"
    if (root / "nyu_train.txt").is_file():
        return "nyud"
    if (root / "scannetv2_train.txt").is_file():
        return "scannet"
    return "ade20k" if (root / "annotations" / "training").is_dir() else "plain"


def open_pairs(
    root: Path, task: str, layout: str = "", depth_scale: float = 1000.0, name: str = "--data"
) -> tuple[Pairs, Pairs]:
    """Training and validation images.

    Args:
        root: folder of the dataset.
        task: "segmentation" or "depth".
        layout: one of `LAYOUTS`; "" for what the folder looks like.
        depth_scale: units of a depth PNG in a metre.
        name: of `root`, for messages.

    Raises:
        DataError: no such folder or layout, or no images there.
    """
    if not root.is_dir():
        raise DataError(f"{name} {root}: there is no such folder")
    layout = layout or guess_layout(root)
    if layout not in LAYOUTS:
        raise DataError(f"--layout {layout}: choose one of {', '.join(LAYOUTS)}")
    found = []
    for split in ("train", "val"):
        files = _FINDERS[layout](root, split, task)
        if not files:
            shown = next(line.strip() for line in (__doc__ or "").splitlines() if line.strip().startswith(layout))
            raise DataError(f"{name} {root}: no images with {task} for {split}; expected is the layout {shown}")
        found.append(Pairs(layout, task, tuple(sorted(files)), depth_scale))
    return found[0], found[1]


def _images(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]


def _folders(root: Path, images: str, targets: tuple[str, ...], split: str) -> list[tuple[str, str]]:
    """ROOT/images/SPLIT/NAME.jpg with ROOT/TARGETS/SPLIT/NAME.png or .npy."""
    found = []
    for name in _SPLITS[split]:
        for kind in targets:
            for image in _images(root / images / name):
                target = (root / kind / name / image.relative_to(root / images / name)).with_suffix(".png")
                target = target if target.is_file() else target.with_suffix(".npy")
                if target.is_file():
                    found.append((str(image), str(target)))
        if found:
            return found
    return found


def _ade20k(root: Path, split: str, task: str) -> list[tuple[str, str]]:
    return _folders(root, "images", ("annotations",), split) if task == "segmentation" else []


def _cityscapes(root: Path, split: str, task: str) -> list[tuple[str, str]]:
    found = []
    for image in sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png")) if task == "segmentation" else ():
        stem = root / "gtFine" / split / image.parent.name / image.name.replace("_leftImg8bit.png", "_gtFine_")
        for suffix in ("labelTrainIds.png", "labelIds.png"):
            if (target := Path(f"{stem}{suffix}")).is_file():
                found.append((str(image), str(target)))
                break
    return found


def _listed(root: Path, split: str, names: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    for name in names[split]:
        if not (root / name).is_file():
            continue
        found = []
        for number, line in enumerate((root / name).read_text().splitlines(), 1):
            words = line.split()
            if not words or line.startswith("#") or "None" in words:  # BTS writes None where there is no depth
                continue
            if len(words) < 2:
                raise DataError(f"{root / name}, line {number}: give an image and its target, separated by a space")
            found.append((str(root / words[0].lstrip("/")), str(root / words[1].lstrip("/"))))
        return found
    return []


def _nyud(root: Path, split: str, task: str) -> list[tuple[str, str]]:
    return _listed(root, split, {"train": ("nyu_train.txt", "train.txt"), "val": ("nyu_test.txt", "val.txt")})


def _scannet(root: Path, split: str, task: str) -> list[tuple[str, str]]:
    names = root / f"scannetv2_{split}.txt"
    if not names.is_file():
        return []
    kind, found = "label" if task == "segmentation" else "depth", []
    for scene in names.read_text().split():
        for image in _images(root / scene / "color"):
            if (target := root / scene / kind / f"{image.stem}.png").is_file():
                found.append((str(image), str(target)))
    return found


def _plain(root: Path, split: str, task: str) -> list[tuple[str, str]]:
    targets = ("labels", "annotations") if task == "segmentation" else ("depth", "depths")
    found = _folders(root, "images", targets, split)
    return found or _listed(root, split, {"train": ("train.txt",), "val": ("val.txt",)})


_FINDERS: dict[str, Callable[[Path, str, str], list[tuple[str, str]]]] = {
    "ade20k": _ade20k, "cityscapes": _cityscapes, "nyud": _nyud, "scannet": _scannet, "plain": _plain,
}  # fmt: skip


def class_names(root: Path) -> tuple[str, ...]:
    """The names of the classes, in the order of the labels, as the dataset says them; empty where it does not."""
    plain, ade20k = root / "classes.txt", root / "objectInfo150.txt"
    try:
        if plain.is_file():
            return tuple(line.strip() for line in plain.read_text().splitlines() if line.strip())
        if ade20k.is_file():  # Idx, Ratio, Train, Val, Stuff, Name
            return tuple(line.split("\t")[-1].strip() for line in ade20k.read_text().splitlines()[1:] if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the names of the classes in {root} cannot be read: {error}") from error
    return ()
