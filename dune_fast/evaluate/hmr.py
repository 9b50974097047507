"""`dune-fast evaluate --task hmr`: people found against people that are there, over a data set.

Predictions and truth are people files, `heads.multihmr.people_files`, one an image, of the same name; predictions may
also come from an encoder with a head. Vertices and joints that a file does not hold are computed from its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.evaluate.human_mesh import MeshErrors
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.multihmr.camera import project
from dune_fast.heads.multihmr.find import find_people, parameters, read_image
from dune_fast.heads.multihmr.head import MultiHmrHead
from dune_fast.heads.multihmr.people_files import read_people
from dune_fast.heads.multihmr.smplx import BodyModel, load_body_model
from dune_fast.heads.multihmr.square import fit_square
from dune_fast.heads.multihmr.targets import PARTS
from dune_fast.kernels.nn.vit import VisionTransformer

THRESHOLD, NMS = 0.2, 3
"""Of the published evaluation."""

Bodies = tuple[Tensor, Tensor, Tensor]
"""Vertices [P, V, 3], pelvis [P, 3] in metres, joints [P, 127, 2] in pixels."""


def bodies_of(arrays: Mapping[str, np.ndarray], model: BodyModel | None, path: Path) -> Bodies:
    """The bodies of a people file; DataError if they are to be computed and there is no body model."""
    if all(name in arrays for name in ("v3d", "j3d", "j2d")):
        v3d, j3d, j2d = (torch.from_numpy(arrays[name]) for name in ("v3d", "j3d", "j2d"))
        return v3d, j3d[:, 0], j2d
    if model is None:
        raise DataError(f"{path} has parameters and no v3d, j3d, j2d: give the body model, too (--body-model)")
    given = {name: torch.from_numpy(array).to(model.faces.device) for name, array in arrays.items()}
    body = model(given["betas"], model.matrices(*(given[name] for name in PARTS)), given.get("expression"))
    v3d, j3d = body.vertices + given["transl"][:, None], body.joints + given["transl"][:, None]
    return v3d.cpu(), j3d[:, 0].cpu(), project(j3d, given["K"].expand(len(j3d), 3, 3)).cpu()


def people_in(folder: Path, what: str) -> dict[str, Path]:
    """Name of an image, below the folder and without its ending -> its people file; DataError if there is none."""
    if not folder.is_dir():
        fault = "this is a file" if folder.exists() else "there is no such folder"
        raise DataError(f"{what} {folder}: {fault}; give the folder of people files")
    found = {str(p.relative_to(folder).with_suffix("")): p for p in sorted(folder.rglob("*.npz"))}
    if not found:
        raise DataError(f"{what} {folder}: there is no people file (NAME.npz, of `dune-fast infer multihmr`)")
    return found


def compare_files(
    found: Path, truth: Path, model: BodyModel | None = None, joint_regressor: Tensor | None = None
) -> dict[str, float]:  # fmt: skip
    """Metrics of two folders, see `human_mesh.MeshErrors.result`, and `images`.

    Args:
        found: people files of predictions; an image without one counts as an image in which nobody was found.
        truth: people files of what is there.
        model: for files without vertices.
        joint_regressor: see `MeshErrors`.

    Raises:
        DataError: an empty folder, predictions of images that the truth does not have, meshes of different models.
    """
    theirs, ours = people_in(truth, "the truth"), people_in(found, "the predictions")
    if strange := [name for name in ours if name not in theirs]:
        raise DataError(
            f"{found} has predictions of {', '.join(strange[:3])}, of which {truth} has no truth: names must agree"
        )
    errors = MeshErrors(joint_regressor)
    for name, path in theirs.items():
        wanted = bodies_of(read_people(path), model, path)
        given = bodies_of(read_people(ours[name]), model, ours[name]) if name in ours else tuple(x[:0] for x in wanted)
        errors.add(given, same_meshes(wanted, given, path, str(ours.get(name))))
    return {"images": float(len(theirs)), **errors.result()}


def same_meshes(truth: Bodies, found: Bodies, path: Path, other: str) -> Bodies:
    """The truth, which `path` holds; DataError if its meshes are of another body model than those found."""
    ours, theirs = truth[0].shape[1], found[0].shape[1]
    if ours != theirs:
        raise DataError(f"{other} has meshes of {theirs} vertices, {path} of {ours}: they must be of one body model")
    return truth


def measure_people(data: Path, predictions: Path, body_model: Path | None = None) -> dict[str, Any]:
    """Of `evaluate --task hmr`: {"metrics": ..., "images": number}; arguments and errors as of `compare_files`.

    Args:
        data: folder of people files, or of a data set with `val/`.
        predictions: folder of people files.
        body_model: file or folder, where people files hold parameters alone.
    """
    model = None if body_model is None else load_body_model(body_model)
    found = compare_files(predictions, truth_folder(data), model)
    images = int(found.pop("images"))
    return {"metrics": found, "images": images}


def truth_folder(data: Path) -> Path:
    """The folder of people files that a data set stands for: its `val/`, or itself."""
    return data / "val" if (data / "val").is_dir() else data


def compare_head(
    files: Sequence[tuple[Path, Path]], encoder: VisionTransformer, head: MultiHmrHead, model: BodyModel,
    ranks: Ranks | None = None, threshold: float = THRESHOLD, nms: int = NMS, joint_regressor: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """Metrics of a head on images with people files, (image, file) each.

    Args:
        files: of a split, see `heads.multihmr.folder.PeopleFolder.files`.
        encoder, head, model: on one device.
        ranks: share the images out; None for one process.
        threshold, nms: see `MultiHmrHead.forward`.
        joint_regressor: see `MeshErrors`.
    """
    ranks = ranks or Ranks()
    errors = MeshErrors(None if joint_regressor is None else joint_regressor.cpu())
    for i in ranks.share("finding people", len(files)):
        image, path = files[i]
        square, arrays = fit_square(read_image(image), head.image_size), read_people(path)
        k = square.intrinsics(arrays["K"].astype(np.float64))
        people, placed = find_people(square.pixels, k, encoder, head, model, threshold, nms)
        given = parameters(people, placed, model, arrays["K"])
        found = bodies_of(given, None, path)
        errors.add(found, same_meshes(bodies_of(arrays, model, path), found, path, "the body model"))
    return total(errors, ranks, len(files))


def total(errors: MeshErrors, ranks: Ranks, images: int) -> dict[str, float]:
    """`MeshErrors.result` over all ranks."""
    names = ("pve", "pa_pve", *(("mpjpe", "pa_mpjpe") if errors.joint_regressor is not None else ()))
    counts = errors.counts
    sums = [float(n) for n in (counts.truth, counts.misses, counts.false_positives)]
    for name in names:
        values = errors.errors.get(name, [])
        sums += [sum(values), float(len(values))]
    added = ranks.add(torch.tensor(sums, dtype=torch.float64, device=ranks.device)).tolist()
    counts.truth, counts.misses, counts.false_positives = (round(n) for n in added[:3])
    means = {name: added[3 + 2 * k] / added[4 + 2 * k] for k, name in enumerate(names) if added[4 + 2 * k]}
    return {"images": float(images), **means, **counts.scores()}
