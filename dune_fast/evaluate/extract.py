"""Features of images, extracted once: in parts that a kill does not lose, shared by ranks, known by a fingerprint.

    FOLDER/manifest.json        what the features depend on, and what there is: `FeatureSet`
    FOLDER/parts/000012.st      safetensors of images 12 n ... 12 n + n - 1: `cls` [n, C], `mean` [n, C],
                                `patch` [n, h, w, C] as asked for, and `seen` [n], 0 where an image is broken

A part is written whole or not at all. Which images a part holds depends neither on the batch nor on the ranks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.numpy
import torch
from torch import Tensor

from dune_fast.dali_pipelines.addresses import ask, is_url
from dune_fast.dali_pipelines.datasets import DataConfig, Dataset, DatasetConfig, Images
from dune_fast.dali_pipelines.loader import ValLoader
from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.evaluate.model import FrozenModel, fingerprint
from dune_fast.evaluate.ranks import Ranks

FORMAT = 1
"""Version of the parts and of the arithmetic before them; another one is extracted anew."""
TOKENS = ("cls", "mean", "patch")
"""The class token, the mean of the patch tokens, the patch tokens as a grid."""
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
MANIFEST = "manifest.json"
_PART_BYTES, _PART_IMAGES = 64 << 20, 256  # a kill loses less than one part of work


class FeatureError(ValueError):
    """Features cannot be extracted or read; the message says what to do."""


@dataclass(frozen=True)
class FeatureSet:
    """Complete features of some images."""

    folder: Path
    images: int
    """How many, broken ones included."""
    per_part: int
    """Images of a part; the last one may have fewer."""
    shapes: dict[str, list[int]]
    """Token -> shape of an image's features."""
    values: dict[str, Any]
    """What they depend on: weights, reading, preprocessing, images."""

    @property
    def parts(self) -> int:
        """Number of parts."""
        return math.ceil(self.images / self.per_part)

    def part_path(self, index: int) -> Path:
        """Where a part is, or will be."""
        return self.folder / "parts" / f"{index:06d}.st"

    def rows(self, index: int) -> range:
        """The images of a part."""
        return range(index * self.per_part, min(self.images, (index + 1) * self.per_part))

    def read(self) -> Iterator[dict[str, Any]]:
        """The parts in order: token -> numpy array, and `seen`."""
        for index in range(self.parts):
            yield safetensors.numpy.load_file(self.part_path(index))

    def whole(self, token: str) -> tuple[Tensor, Tensor]:
        """All images' features of one token in memory, [N, ...], and which images were seen, bool [N]."""
        found = [(torch.from_numpy(part[token]), torch.from_numpy(part["seen"])) for part in self.read()]
        features, seen = zip(*found, strict=True)
        return torch.cat(features), torch.cat(seen).bool()


def image_identity(images: Sequence[Images]) -> list[str]:
    """A line an image: its name, where its bytes are, size and time of change of that file."""
    locations = [(part.relative(i), part.locate(i)) for part in images for i in range(len(part))]
    paths = sorted({location.path for _, location in locations})
    with ThreadPoolExecutor(16, thread_name_prefix="stat-images") as pool:
        state = dict(zip(paths, pool.map(_state, paths), strict=True))
    return [f"{name} {at.path} {at.offset} {at.length} {state[at.path]}" for name, at in locations]


def _state(path: str) -> str:
    if is_url(path):
        try:
            info = ask(path, lambda fs, inner: fs.info(inner))
        except FileNotFoundError:
            return "missing"
        return " ".join(str(info.get(key)) for key in ("size", "mtime", "LastModified", "ETag"))
    try:
        found = os.stat(path)
    except OSError:
        return "missing"  # a broken image, of which the reader speaks
    return f"{found.st_size} {found.st_mtime_ns}"


def identity(model: FrozenModel, images: Sequence[Images], size: int, tokens: Sequence[str], dtype: str) -> dict:
    """What features depend on, in a form that JSON holds."""
    return {
        "format": FORMAT,
        "weights_sha256": model.weights_sha256,
        "reading": json.loads(json.dumps(model.reading, default=str)),
        "size": size,
        "tokens": sorted(tokens),
        "dtype": dtype,
        "num_images": sum(map(len, images)),
        "images_sha256": fingerprint({"images": image_identity(images)}),
    }


def extract(
    model: FrozenModel,
    images: Sequence[Images],
    size: int,
    tokens: Sequence[str],
    *,
    folder: Path | None = None,
    cache: Path | None = None,
    dtype: str = "fp32",
    batch: int = 32,
    ranks: Ranks | None = None,
    data: DataConfig | None = None,
    title: str = "features",
) -> FeatureSet:
    """Features of squares cut out of the middle, as a run's evaluation and `encoder.transform` cut them.

    What is there already, of this or an interrupted call, is not computed again.

    Args:
        model: see `evaluate.model`.
        images: in the order of the features.
        size: side of the squares in pixels.
        tokens: some of `TOKENS`.
        folder: where the parts go.
        cache: instead of `folder`: a folder of many, in which the fingerprint names the one to use.
        dtype: "fp32" or "fp16", of what is kept.
        batch: images at a time on each rank.
        ranks: all of them call this.
        data: threads and patience of the reading.
        title: for the progress bar.

    Raises:
        FeatureError: `folder` holds features of something else, or a token that the network has not.
        DataError: images that cannot be read, or too many broken ones.
    """
    ranks = ranks or Ranks()
    if unknown := [t for t in tokens if t not in TOKENS]:
        raise FeatureError(f"tokens {', '.join(unknown)}: choose some of {', '.join(TOKENS)}")
    if "cls" in tokens and not model.has_cls:
        raise FeatureError(f"{model.name} has no cls token: ask for mean or patch")
    if batch < 1:
        raise FeatureError(f"the batch is {batch} images: at least 1 is needed")
    values = identity(model, images, size, tokens, dtype)
    assert folder is not None or cache is not None
    folder = cache / fingerprint(values)[:24] if folder is None else folder
    grid = size // model.patch_size
    every = {"cls": [model.cls_channels], "mean": [model.channels], "patch": [grid, grid, model.channels]}
    shapes = {t: every[t] for t in tokens}
    nbytes = sum(math.prod(shape) for shape in shapes.values()) * DTYPES[dtype].itemsize
    per_part = max(1, min(_PART_IMAGES, _PART_BYTES // nbytes))
    found = FeatureSet(folder, values["num_images"], per_part, shapes, values)
    _open(found, ranks)
    missing = [i for i in range(found.parts) if not found.part_path(i).is_file()]
    mine = [i for i in missing if i % ranks.size == ranks.rank]  # others may have begun: by number, not by what is left
    done = found.images - sum(len(found.rows(i)) for i in missing)
    with ranks.progress(title, found.images, done=done) as progress:
        for index, part in _compute(model, images, found, mine, batch, dtype, ranks, data or DataConfig()):
            write_whole(found.part_path(index), safetensors.numpy.save(part))
            progress.advance(len(part["seen"]) * ranks.size)  # the others are about as far
    ranks.barrier()
    return found


def _open(wanted: FeatureSet, ranks: Ranks) -> None:
    """Makes the folder; FeatureError if it holds features of something else."""
    path = wanted.folder / MANIFEST
    (wanted.folder / "parts").mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        if path.is_file():
            there = json.loads(path.read_text())
            if changed := sorted(k for k in {*there, *wanted.values} if there.get(k) != wanted.values.get(k)):
                raise FeatureError(
                    f"{wanted.folder} holds features of something else ({', '.join(changed)} differ): choose another "
                    "--out, or delete that folder"
                )
        else:
            write_whole(path, (json.dumps(wanted.values, indent=1) + "\n").encode())
    ranks.barrier()


def _compute(
    model: FrozenModel,
    images: Sequence[Images],
    wanted: FeatureSet,
    parts: Sequence[int],
    batch: int,
    dtype: str,
    ranks: Ranks,
    data: DataConfig,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Part after part, as numpy arrays; rows of broken images are NaN and not `seen`."""
    rows = [row for part in parts for row in wanted.rows(part)]
    if not rows:
        return
    datasets, start = [], 0
    for number, each in enumerate(images):  # one dataset for each kind of place that images are in
        own = [row - start for row in rows if start <= row < start + len(each)]
        start += len(each)
        if own:
            datasets.append(Dataset(f"images {number}", DatasetConfig(), each, each.select(own)))
    buffer, current, kept = _empty(wanted, parts[0], dtype), 0, DTYPES[dtype]
    # DALI in the loader gives ImageNet-normalised squares; every rank reads its own parts
    with ValLoader(data, wanted.values["size"], batch, 0, 1, ranks.device, datasets) as loader:
        for each in loader:
            tokens = _tokens(model, each.images, wanted.shapes)
            for at, position in enumerate(each.positions.tolist()):
                row = rows[position]
                while row not in wanted.rows(parts[current]):
                    yield parts[current], _arrays(buffer)
                    current += 1
                    buffer = _empty(wanted, parts[current], dtype)
                inside = row - wanted.rows(parts[current]).start
                for token, x in tokens.items():
                    buffer[token][inside] = x[at].to(kept)
                buffer["seen"][inside] = 1
    for part in parts[current:]:  # whose last images may be broken
        yield part, _arrays(buffer)
        current += 1
        if current < len(parts):
            buffer = _empty(wanted, parts[current], dtype)


def _tokens(model: FrozenModel, images: Tensor, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """float32 on the CPU: token -> [B, ...], patches channels last."""
    patch, cls = model.encode(images)[-1]  # [B, C, h, w], [B, C]
    tokens = {"cls": cls, "mean": patch.mean((2, 3)), "patch": patch.permute(0, 2, 3, 1)}
    return {token: tokens[token].cpu() for token in shapes}


def _empty(wanted: FeatureSet, part: int, dtype: str) -> dict[str, Tensor]:
    count = len(wanted.rows(part))
    empty = {t: torch.full((count, *shape), torch.nan, dtype=DTYPES[dtype]) for t, shape in wanted.shapes.items()}
    return empty | {"seen": torch.zeros(count, dtype=torch.uint8)}


def _arrays(buffer: dict[str, Tensor]) -> dict[str, Any]:
    return {name: x.numpy() for name, x in buffer.items()}
