"""Segmentation and depth of photographs: `dune-fast infer seg | depth`.

    seg     NAME.labels.png   the class of each pixel, 8 bits (16 with more than 256 classes)
            NAME.seg.png      the photograph under the classes' colours, with the names of those of 0.5 % or more
            classes.json      label -> name and colour
    depth   NAME.depth.png    millimetres, 16 bits
            NAME.depth.npy    metres, float32
            NAME.colours.png  near red, far blue, with a scale in metres

Both read images as the evaluation does: segmentation by sliding windows over an image whose short side is a window of
the head's training; depth on the whole image, averaged with its mirror image. Results have the photograph's size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.evaluate.crops import scaled
from dune_fast.evaluate.dense import flip_averaged_depth, resized_argmax, window_logits
from dune_fast.evaluate.model import FrozenModel, open_model
from dune_fast.heads.head import HeadError
from dune_fast.heads.linear.depth import DepthHead
from dune_fast.heads.linear.layers import LinearHead, resize
from dune_fast.heads.linear.segmentation import SegmentationHead
from dune_fast.infer.files import InferenceError, check_names, read_image
from dune_fast.infer.legends import class_colours, depth_colours, with_class_legend, with_depth_legend
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.local_paths import result_folder

logger = logging.getLogger(__name__)

SHORT_SIDE = 480
"""Pixels, of the images that depth heads are trained and evaluated on (NYUd's); larger images are made so small."""
_STRENGTH = 0.55  # of colours over the photograph
_NAMED = 0.005  # share of an image from which on a class is in its legend
_MILLIMETRES, _DEEPEST = 1000.0, 65.535


def run(
    images: Sequence[Path], encoder: str, head: LinearHead, out: Path, *, device: torch.device | None = None,
    precision: str = "auto", size: int | None = None, teacher: Callable[[str], TeacherConfig] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Writes the files of each image, see the top of this file.

    Args:
        images: files, each of a name of its own.
        encoder: that the head was trained on, by a name that `evaluate.model.open_model` takes.
        head: a `SegmentationHead` or a `DepthHead`.
        out: folder of the results.
        device, precision: of encoder and head.
        size: depth: pixels of the short side at which an image is read; None for its own, at most `SHORT_SIDE`.
        teacher: configuration of a teacher by its name, where `encoder` may be one.

    Returns:
        For each image: its path, what was found, `files`.

    Raises:
        InferenceError: an image cannot be read, or two have one name.
        HeadError: encoder and head do not fit.
        ValueError: an encoder that cannot be loaded.
    """
    if not isinstance(head, LinearHead):
        raise HeadError(f"this is a {head.kind} head; segmentation and depth need linear ones")
    if size is not None and (isinstance(head, SegmentationHead) or size < 1):
        raise InferenceError(f"size {size}: give pixels above 0, for depth; a segmentation head has its own windows")
    check_names(images)
    device = device or torch.device("cpu")
    model = open_model(
        encoder, device, teacher=teacher, projector=head.projector, norm=head.normalised, layers=head.layers,
        last_blocks=head.last_blocks, precision=precision,
    )  # fmt: skip
    check_model(head, model)
    head, results = head.eval().to(device), []
    result_folder(out)
    if isinstance(head, SegmentationHead):
        write_whole(out / "classes.json", json.dumps(legend(head), indent=1).encode())
    for path in images:
        image = read_image(path)
        if isinstance(head, SegmentationHead):
            found = _write_labels(path.stem, image, labels_of(image, model, head, device), head, out)
        else:
            assert isinstance(head, DepthHead)
            found = _write_depth(path.stem, depth_of(image, model, head, device, size), out)
        logger.info("%s: %s", path, found["files"][0])
        results.append({"image": str(path), **found})
    return results


def check_model(head: LinearHead, model: FrozenModel) -> None:
    """HeadError if a network's tokens are not those that a head was trained on."""
    found, wanted = (model.channels, model.patch_size), (head.width, head.patch_size)
    if found != wanted or head.cls_width not in (0, model.cls_channels):
        own = f" and {head.cls_width} of a class token" if head.cls_width else ""
        raise HeadError(
            f"the {head.kind} head reads {wanted[0]} channels of {wanted[1]} px patches{own}; {model.name} gives "
            f"{found[0]} of {found[1]} px and {model.cls_channels or 'no'} of a class token: choose the encoder that "
            "the head was trained on"
        )


@torch.no_grad()
def labels_of(image: np.ndarray, model: FrozenModel, head: SegmentationHead, device: torch.device) -> np.ndarray:
    """Classes int64 [H, W] of an image uint8 [H, W, 3]."""
    logits = window_logits(_tensor(image), model, head, device)
    return resized_argmax(logits, image.shape[:2]).cpu().numpy()


@torch.no_grad()
def depth_of(
    image: np.ndarray, model: FrozenModel, head: DepthHead, device: torch.device, size: int | None = None
) -> np.ndarray:
    """Depth float32 [H, W] in metres of an image uint8 [H, W, 3]; `size` as in `run`."""
    x = _tensor(image)
    short = min(x.shape[1:])
    read = scaled(x, size or min(short, SHORT_SIDE))[0]
    depth = flip_averaged_depth(read, model, head, device)
    if depth.shape != image.shape[:2]:
        depth = resize(depth[None, None], image.shape[:2])[0, 0]
    return depth.cpu().numpy()


def legend(head: SegmentationHead) -> dict[str, Any]:
    """Label -> name ("" where the head has none) and colour."""
    names = head.names or [""] * head.classes
    return {
        str(i): {"name": name, "colour": colour.tolist()}
        for i, (name, colour) in enumerate(zip(names, class_colours(head.classes), strict=True))
    }


def _tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


def _write_labels(
    name: str, image: np.ndarray, labels: np.ndarray, head: SegmentationHead, out: Path
) -> dict[str, Any]:
    """Labels and overlay; the shares of the classes that the image has, the largest first."""
    colours = class_colours(head.classes)
    counts = np.bincount(labels.reshape(-1), minlength=head.classes)
    present = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    called = {i: head.names[i] if head.names else str(i) for i in present}
    said = [i for i in present if counts[i] >= _NAMED * labels.size] or present[:1]
    overlay = np.round((1 - _STRENGTH) * image + _STRENGTH * colours[labels]).astype(np.uint8)
    files = [out / f"{name}.labels.png", out / f"{name}.seg.png"]
    Image.fromarray(labels.astype(np.uint8 if head.classes <= 256 else np.uint16)).save(files[0])
    shares = {called[i]: counts[i] / labels.size for i in present}
    words = {i: called[i] if head.names else f"class {i}" for i in said}
    entries = [(f"{100 * counts[i] / labels.size:.0f} % {words[i]}", colours[i]) for i in said]
    with_class_legend(overlay, entries).save(files[1])
    return {"classes": {key: round(float(share), 4) for key, share in shares.items()}, "files": list(map(str, files))}


def _write_depth(name: str, depth: np.ndarray, out: Path) -> dict[str, Any]:
    """Depth as PNG, numbers and colours, and its range."""
    files = [out / f"{name}.depth.png", out / f"{name}.depth.npy", out / f"{name}.colours.png"]
    if depth.max() > _DEEPEST:
        logger.warning("%s: 16 bits of millimetres end at %.1f m; %s has all depths", files[0], _DEEPEST, files[1].name)
    Image.fromarray(np.round(_MILLIMETRES * depth.clip(0, _DEEPEST)).astype(np.uint16)).save(files[0])
    np.save(files[1], depth.astype(np.float32))
    low, high = (float(x) for x in np.percentile(depth, (1, 99)))
    with_depth_legend(depth_colours(depth, low, high), low, high).save(files[2])
    found = {"nearest": float(depth.min()), "farthest": float(depth.max())}
    return {**{key: round(value, 3) for key, value in found.items()}, "files": list(map(str, files))}
