"""Lists of images in pickles, without running them: a pickle is a program that may import and call anything.

UBody publishes the list of its images only as the keys of a pickle full of annotations; the code published with DUNE
reads pickled lists, and pairs of a folder and a list. Whatever a pickle would import is replaced by a class that does
nothing but remember its keys or elements.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path

from dune_fast.dali_pipelines.errors import DataError


class _Anything:
    """Stands for every function, class and instance that a pickle asks for."""

    def __new__(cls, *_: object, **__: object) -> _Anything:
        self = super().__new__(cls)
        self.found: list[object] = []
        return self

    def __call__(self, *_: object, **__: object) -> _Anything:
        return self

    def __setitem__(self, key: object, _: object) -> None:
        self.found.append(key)

    def __setstate__(self, _: object) -> None:
        pass

    def append(self, item: object) -> None:
        self.found.append(item)

    def extend(self, items: Iterable[object]) -> None:
        self.found += items


class _Unpickler(pickle.Unpickler):
    """Looks nothing up."""

    def find_class(self, module: str, name: str) -> type[_Anything]:
        return _Anything

    def persistent_load(self, pid: object) -> _Anything:
        return _Anything()


def pickle_paths(path: str | Path) -> tuple[str, list[str]]:
    """The list of images that a pickle holds, and the folder that it says they are in, "" if it says none.

    The list is the keys of a dictionary, the elements of a list or a tuple, or the second element of a pair whose first
    is the folder. An element may be a tuple that begins with the path, as in torchvision's `ImageFolder.samples`.

    Raises:
        DataError: the file cannot be read, is no pickle, or holds no such list.
    """
    try:
        with open(path, "rb") as stream:
            # strings of Python 2 are bytes: those of file names
            result = _Unpickler(stream, encoding="utf-8", errors="surrogateescape").load()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # nonsense ends in all kinds
        raise DataError(f"{path} is not a whole pickle: {error}") from error
    folder, pair = "", _elements(result)
    if len(pair) == 2 and isinstance(pair[0], str) and not isinstance(pair[1], str) and not isinstance(result, dict):
        folder, result = pair
    first = [item[0] if isinstance(item, (list, tuple)) and item else item for item in _elements(result)]
    paths = [item for item in first if isinstance(item, str)]
    if not paths:
        raise DataError(
            f"{path} holds no list of images: neither a dictionary with paths as keys, nor a list of paths, nor a pair "
            "of a folder and such a list"
        )
    return folder, paths


def _elements(value: object) -> list[object]:
    """The keys of a dictionary, the elements of a list or a tuple; none of anything else."""
    if isinstance(value, _Anything):
        return value.found
    return list(value) if isinstance(value, (dict, list, tuple)) else []
