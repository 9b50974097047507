"""BEDLAM's labels and images to a folder of images with people files, which `PeopleFolder` reads.

    LABELS/SCENE.npz        the processed labels of a split: imgname, pose_cam, shape, trans_cam, cam_ext, cam_int
    IMAGES/SCENE_6fps/png/  the images by `imgname`, SEQUENCE/NAME.png; the ending with the rate and png/ may be missing
    OUT/SCENE/SEQUENCE/     gets NAME.npz, and NAME.png as a link; images of close-ups are turned and written anew
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.heads.multihmr.bedlam import CLOSEUP, by_image, people_of, upright
from dune_fast.heads.multihmr.npz import NpzError, read_npz
from dune_fast.heads.multihmr.people_files import write_people

logger = logging.getLogger(__name__)

_ARRAYS = {
    "imgname": ("P",), "pose_cam": ("P", 165), "shape": ("P", "L"), "trans_cam": ("P", 3), "cam_ext": ("P", 4, 4),
    "cam_int": ("P", 3, 3),
}  # fmt: skip
_MOST = {"P": 1 << 22, "L": 300}


def convert(labels: Path, images: Path, out: Path, every: int = 1) -> int:
    """Writes the people files of a split, and its images beside them; the number of images.

    Args:
        labels: folder with a file a scene, or one such file.
        images: folder of the scenes' images. Labels of scenes and images that are not there are left out, with a
            warning.
        out: ROOT/train or ROOT/val of a `PeopleFolder`.
        every: of the images of a scene, every so many are taken; published validation takes every 25th.

    Raises:
        DataError: no such folders, labels that cannot be read, no image at all.
    """
    files = sorted(labels.glob("*.npz")) if labels.is_dir() else [labels]
    if not files or not files[0].is_file():
        raise DataError(f"{labels} has no labels, SCENE.npz: give the folder of BEDLAM's processed labels")
    if not images.is_dir():
        raise DataError(f"there is no folder {images}: give the one that holds the scenes' images")
    if every < 1:
        raise DataError(f"every {every}: give a number of images above 0")
    written = 0
    for file in files:
        count, absent = _scene(file, images, out / file.stem, every)
        written += count
        if absent:
            logger.warning("%s: %d images are not below %s; their people are left out", file, absent, images)
        logger.info("%s: %d images with people files in %s", file.stem, count, out / file.stem)
    if not written:
        raise DataError(f"of the labels in {labels}, no image is below {images}: give the folder with SCENE_6fps/png/")
    return written


def _scene(file: Path, images: Path, out: Path, every: int) -> tuple[int, int]:
    """Images of one scene that are written, and those that are not there."""
    try:
        arrays = read_npz(file, _ARRAYS, {}, _MOST, text=("imgname",))
    except NpzError as error:
        raise DataError(f"{file} holds no labels of BEDLAM ({error}): get it again") from error
    rate = re.compile(re.escape(file.stem) + r"(_\d+fps)?")
    folders = [p for p in sorted(images.iterdir()) if rate.fullmatch(p.name)]
    places = [place for folder in folders for place in (folder / "png", folder) if place.is_dir()]
    written = absent = 0
    for name, rows in list(by_image(arrays["imgname"]).items())[::every]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{file} names the image {name!r}, which is not below a folder of images: get it again")
        image = next((place / name for place in places if (place / name).is_file()), None)
        if image is None:
            absent += 1
            continue
        target = out / name
        if target.is_file() and not target.is_symlink() and target.samefile(image):
            raise DataError(f"{target} is the image itself: give another folder for the results")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        size = _place(image, target, file.stem)
        given = (arrays[key][rows].astype(np.float64) for key in _ARRAYS if key != "imgname")
        try:
            write_people(target.with_suffix(".npz"), people_of(*given, size))
        except ValueError as error:
            raise DataError(f"{file}, {name}: {error}") from error
        written += 1
    return written, absent


def _place(image: Path, target: Path, scene: str) -> tuple[int, int]:
    """The upright image at `target`, as a link where that is the file itself; its (width, height)."""
    try:
        with Image.open(image) as opened:
            if CLOSEUP not in scene:
                os.symlink(image.resolve(), target)
                return opened.size
            turned = upright(opened.convert("RGB"), scene)
    except OSError as error:
        raise DataError(f"{image} cannot be read or linked at {target}: {error}") from error
    turned.save(target, compress_level=1)
    return turned.size
