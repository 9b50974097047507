"""The people of photographs as SMPL-X bodies: `dune-fast infer multihmr`.

For each image NAME.jpg the folder gets NAME.npz, the people as `heads.multihmr.people_files` describes them, in pixels
of the image, turned upright; NAME_people.png, the bodies drawn, with number and score; NAME_person0.obj and so on, a
mesh each.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.evaluate.hmr import NMS, THRESHOLD, people_in, truth_folder
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.head import HeadError, check_encoder
from dune_fast.heads.multihmr.body_file import BodyModelError, how_to_get
from dune_fast.heads.multihmr.camera import FOV, default_intrinsics
from dune_fast.heads.multihmr.find import find_people, parameters, read_image
from dune_fast.heads.multihmr.folder import PeopleFolder
from dune_fast.heads.multihmr.head import MultiHmrHead, People, Placed
from dune_fast.heads.multihmr.people_files import read_people, write_people
from dune_fast.heads.multihmr.smplx import BodyModel, load_body_model
from dune_fast.heads.multihmr.square import Square, fit_square
from dune_fast.infer.bodies import draw_bodies, draw_scores, write_obj
from dune_fast.infer.files import InferenceError, check_names
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.teachers.local_paths import result_folder

logger = logging.getLogger(__name__)


def run(
    images: Sequence[Path], encoder: VisionTransformer, head: MultiHmrHead, body_model: Path, out: Path, *,
    threshold: float = 0.3, nms: int = 3, fov: float = FOV, intrinsics: np.ndarray | None = None, meshes: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Finds the people of each image and writes them, see the top of this file.

    Args:
        images: files; each in its own pass.
        encoder: that the head was trained on, on its device.
        head: on the same device.
        body_model: the user's SMPLX_NEUTRAL.npz, or its folder.
        out: folder of the results.
        threshold: score from which on a patch holds a person.
        nms: patches of the neighbourhood within which the highest score alone counts.
        fov: field of view of the longer side in degrees, where no intrinsics are given.
        intrinsics: K [3, 3] in pixels of the images.
        meshes: whether to write OBJ files.

    Returns:
        For each image: its path, `people` (number), `files`.

    Raises:
        ValueError: an image cannot be read, two have one name, a data set's people would be overwritten, the body model
            is missing or another, encoder and head do not fit, threshold or field of view make no sense.
    """
    if not isinstance(head, MultiHmrHead):
        raise HeadError(f"this is a {head.kind} head; finding people needs a multihmr head")
    check_encoder(head, encoder)
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold:g}: give a score above 0, at most 1")
    if intrinsics is not None:
        intrinsics = check_intrinsics(intrinsics)
    paths = [Path(path) for path in images]
    check_names(paths)
    for path in paths:
        _check_target(out / f"{path.stem}.npz")
    model = load_body_model(body_model).to(next(head.parameters()).device)
    result_folder(out)
    results = []
    for path in paths:
        image = read_image(path)
        square = fit_square(image, head.image_size)
        own = default_intrinsics(head.image_size, fov).numpy() if intrinsics is None else square.intrinsics(intrinsics)
        people, placed = find_people(square.pixels, own, encoder, head, model, threshold, nms)
        files = _write(path, np.asarray(image), square.original(own), people, placed, model, square, out, meshes)
        logger.info("%s: %d people, %s", path, len(people.scores), files[0])
        results.append({"image": str(path), "people": len(people.scores), "files": [str(file) for file in files]})
    return results


def predict_people(
    data: Path, encoder: VisionTransformer, head: MultiHmrHead, predictions: Path, body_model: Path | None = None
) -> None:
    """Of `evaluate --task hmr`: writes the people of every image that has a people file, found with its intrinsics.

    Args:
        data: folder of images with people files beside them, or of a data set with `val/`.
        encoder, head: on one device.
        predictions: folder of the people files, of its own; they have the images' names below `data`. Those of an
            earlier evaluation are taken away.
        body_model: file or folder.

    Raises:
        ValueError: no such images, a people file without an image, or no body model.
    """
    check_encoder(head, encoder)
    if body_model is None:
        raise BodyModelError(f"a head's people are bodies of SMPL-X: give --body-model FILE; {how_to_get()}")
    model = load_body_model(body_model).to(next(head.parameters()).device)
    root = truth_folder(data)
    files = PeopleFolder(root.parent, root.name, head.image_size).files
    if alone := set(people_in(root, "the truth").values()) - {file for _, file in files}:
        raise DataError(f"{min(alone)} has no image beside it: put it there, or take the file away")
    for old in sorted(predictions.rglob("*.npz")):
        _check_target(old)
        old.unlink()
    with Ranks().progress("finding people", len(files)) as progress:
        for image, file in files:
            square, k = fit_square(read_image(image), head.image_size), read_people(file)["K"].astype(np.float64)
            people, placed = find_people(square.pixels, square.intrinsics(k), encoder, head, model, THRESHOLD, NMS)
            target = predictions / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_people(target, parameters(people, placed, model, k))
            progress.advance(1)


def check_intrinsics(given: np.ndarray) -> np.ndarray:
    """K [3, 3] as float64; ValueError unless it is that of a pinhole camera in pixels."""
    k = np.asarray(given, dtype=np.float64)
    if k.shape != (3, 3) or not np.isfinite(k).all() or k[0, 0] <= 0 or k[1, 1] <= 0 or abs(k[2] - (0, 0, 1)).max() > 0:
        raise ValueError(f"intrinsics {k.tolist()}: give [[f, 0, x], [0, f, y], [0, 0, 1]] in pixels of the image")
    return k


def _check_target(path: Path) -> None:
    """ValueError if a people file is there that no head has made, such as a data set's."""
    if path.is_file():
        try:
            made = "scores" in read_people(path)
        except DataError:
            made = False
        if not made:
            raise InferenceError(f"{path} is there and is not of this command: choose another --out")


def _write(
    path: Path, image: np.ndarray, intrinsics: np.ndarray, people: People, placed: Placed, model: BodyModel,
    square: Square, out: Path, meshes: bool,
) -> list[Path]:  # fmt: skip
    """The files of one image."""
    arrays = parameters(people, placed, model, intrinsics)
    files = [out / f"{path.stem}.npz", out / f"{path.stem}_people.png"]
    write_people(files[0], arrays)
    faces = model.faces.cpu().numpy()
    drawn = draw_bodies(image, arrays["v3d"], faces, intrinsics)
    places = (people.location.cpu().numpy() - (square.left, square.top)) / square.scale
    Image.fromarray(draw_scores(drawn, places, arrays["scores"])).save(files[1])
    for old in out.glob(f"{glob.escape(path.stem)}_person*.obj"):  # an earlier run may have found more people
        if old.stem.removeprefix(f"{path.stem}_person").isdecimal():
            old.unlink()
    for i, vertices in enumerate(arrays["v3d"] if meshes else ()):
        files.append(out / f"{path.stem}_person{i}.obj")
        write_obj(files[-1], vertices, faces)
    return files
