"""`dune-fast features`: the features of a folder, a list or shards as files for other programs.

    OUT/cls.npy, mean.npy [N, C], patch.npy [N, h, w, C]     --format npy, the default
    OUT/features.safetensors                                 the same three in one file
    OUT/features.parquet                                     a row an image: name, cls, mean, patch (flat)
    OUT/names.txt                                            the images, one a line, in the order of the rows
    OUT/features.json                                        weights' SHA-256, size, shapes, broken images

Rows of broken images are NaN. The work in progress is in OUT/parts, which goes at the end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dune_fast.dali_pipelines.datasets import DatasetConfig, Images, index_dataset
from dune_fast.dali_pipelines.storage import sync_folder, write_whole
from dune_fast.evaluate.extract import MANIFEST, FeatureError, FeatureSet, extract, identity
from dune_fast.evaluate.model import FrozenModel
from dune_fast.evaluate.ranks import Ranks
from dune_fast.teachers.local_paths import result_folder

logger = logging.getLogger(__name__)

FORMATS = ("npy", "safetensors", "parquet")
SUMMARY = "features.json"
_SAFETENSORS = {"float16": "F16", "float32": "F32"}


def images_of(given: str, pattern: str = "") -> list[Images]:
    """All images of a folder, glob, list, shards or asset, training images first.

    Args:
        given: see `DatasetConfig.root`.
        pattern: see `DatasetConfig.pattern`.

    Raises:
        DataError: nothing is there.
    """
    dataset = index_dataset("images", DatasetConfig(root=given, pattern=pattern))
    return [images for images in (dataset.train, dataset.val) if len(images)]


def check_format(form: str) -> None:
    """ValueError for a format that is not known, or whose package is missing."""
    if form not in FORMATS:
        raise FeatureError(f"--format {form}: choose one of {', '.join(FORMATS)}")
    if form == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise FeatureError(
                "--format parquet needs the package pyarrow, which is not installed: `pip install pyarrow`, or choose "
                "--format npy or safetensors"
            ) from error


def write_features(
    model: FrozenModel,
    images: Sequence[Images],
    out: Path,
    size: int,
    tokens: Sequence[str],
    dtype: str,
    form: str,
    batch: int,
    ranks: Ranks,
) -> dict[str, Any]:
    """Extracts, or goes on with it, and writes the files. A call that finds them done does nothing.

    Returns:
        What `features.json` says.

    Raises:
        FeatureError: `out` holds features of something else.
        ResultPathError: `out` cannot be written.
        DataError: images that cannot be read, or too many broken ones.
    """
    check_format(form)
    wanted = identity(model, images, size, tokens, dtype) | {"file_format": form}
    if (done := _finished(out, wanted)) is not None:
        logger.info("%s is complete already", out)
        return done
    result_folder(out)
    title = f"features of {model.name}"
    found = extract(model, images, size, tokens, folder=out, dtype=dtype, batch=batch, ranks=ranks, title=title)
    if ranks.rank == 0:
        summary = _finish(found, images, out, form, wanted | {"model": model.name, "patch_size": model.patch_size})
    ranks.barrier()
    return summary if ranks.rank == 0 else json.loads((out / SUMMARY).read_text())


def _finished(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    if not (out / SUMMARY).is_file():
        return None
    there = json.loads((out / SUMMARY).read_text())
    if changed := sorted(key for key, value in wanted.items() if there.get(key) != value):
        raise FeatureError(
            f"{out} holds features of something else ({', '.join(changed)} differ): choose another --out, or delete "
            "that folder"
        )
    _remove_parts(out)  # of a call that was killed while it did so
    return there


def _finish(
    found: FeatureSet, images: Sequence[Images], out: Path, form: str, values: dict[str, Any]
) -> dict[str, Any]:
    """The files from the parts, each written whole; the summary last."""
    names = [part[i] for part in images for i in range(len(part))]
    write_whole(out / "names.txt", "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape"))
    dtype = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}[values["dtype"]]
    broken = [names[row] for row in _broken_rows(found)]
    if form == "parquet":
        _write_parquet(found, names, out / "features.parquet")
    elif form == "safetensors":
        with _whole_file(out / "features.safetensors") as file:
            _write_safetensors(found, dtype, file)
    else:
        for token, shape in found.shapes.items():
            with _whole_file(out / f"{token}.npy") as file:
                header = {"descr": dtype.str, "fortran_order": False, "shape": (found.images, *shape)}
                np.lib.format.write_array_header_1_0(file, header)
                _write_rows(found, token, file)
    summary = values | {"shapes": {t: [found.images, *s] for t, s in found.shapes.items()}, "broken": broken}
    write_whole(out / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    _remove_parts(out)
    if broken:
        logger.warning("%d of %d images are broken: NaN in their rows, named in %s", len(broken), len(names), SUMMARY)
    return summary


def _remove_parts(out: Path) -> None:
    """What an unfinished extraction needs; the manifest goes last."""
    shutil.rmtree(out / "parts", ignore_errors=True)
    (out / MANIFEST).unlink(missing_ok=True)


def _broken_rows(found: FeatureSet) -> list[int]:
    seen = np.concatenate([part["seen"] for part in found.read()])
    return np.flatnonzero(seen == 0).tolist()


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name once it is complete and on the disk."""
    partial = path.with_name(f".{path.name}.part")
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def _write_rows(found: FeatureSet, token: str, file: BinaryIO) -> None:
    for part in found.read():
        file.write(np.ascontiguousarray(part[token]).data)


def _write_safetensors(found: FeatureSet, dtype: np.dtype, file: BinaryIO) -> None:
    """The format's header, then the tensors part by part: `save_file` would need all of them in memory."""
    header, end = {}, 0
    for token, shape in found.shapes.items():
        size = found.images * int(np.prod(shape)) * dtype.itemsize
        header[token] = {
            "dtype": _SAFETENSORS[dtype.name], "shape": [found.images, *shape], "data_offsets": [end, end + size],
        }  # fmt: skip
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)
    for token in found.shapes:
        _write_rows(found, token, file)


def _write_parquet(found: FeatureSet, names: Sequence[str], path: Path) -> None:
    """A row group a part."""
    import pyarrow
    import pyarrow.parquet

    partial, writer = path.with_name(f".{path.name}.part"), None
    for index, part in enumerate(found.read()):
        columns = {"name": pyarrow.array([names[row] for row in found.rows(index)])}
        for token in found.shapes:
            x = part[token].reshape(len(part[token]), -1)
            columns[token] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(x.reshape(-1)), x.shape[1])
        table = pyarrow.table(columns)
        writer = writer or pyarrow.parquet.ParquetWriter(partial, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
        os.replace(partial, path)
