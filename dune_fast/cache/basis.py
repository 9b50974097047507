"""`basis.safetensors` of a cache: mean and principal components of every teacher that has more channels than wanted.

Several builds may work in one folder. Each computes the basis if the file is not there; the first whole file stays, and
all use that one. Every shard says by a SHA-256 which basis it is of.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file

from dune_fast.cache.formats import Basis
from dune_fast.teachers.files import file_sha256

FILE = "basis.safetensors"


def keep_basis(folder: Path, bases: Mapping[str, Basis]) -> None:
    """Writes the file, unless another process was first.

    Args:
        bases: `<teacher>/patch` -> basis.

    Raises:
        ValueError: the file system has no hard links.
    """
    tensors = {f"{name}.{field}": x.cpu().contiguous() for name, b in bases.items() for field, x in b._asdict().items()}
    fresh = folder / f"{FILE}.{os.uname().nodename}.{os.getpid()}"
    try:
        save_file(tensors, fresh)
        with fresh.open("rb") as handle:
            os.fsync(handle.fileno())
        try:
            os.link(fresh, folder / FILE)  # whole and exclusive, on network file systems too
        except FileExistsError:
            return
        except OSError as error:
            raise ValueError(
                f"cache.folder={folder} takes no hard links ({error.strerror}), by which builds agree on one basis: "
                "choose a folder on another file system, or cache.components=0"
            ) from error
    finally:
        fresh.unlink(missing_ok=True)


def read_basis(folder: Path) -> tuple[dict[str, Basis], str]:
    """What `keep_basis` has kept, and its SHA-256; OSError or ValueError if it is missing or damaged."""
    path = folder / FILE
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    names = sorted({name.rpartition(".")[0] for name in tensors})
    return {n: Basis(tensors[f"{n}.mean"], tensors[f"{n}.components"]) for n in names}, file_sha256(path)
