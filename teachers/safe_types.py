"""What a checkpoint may hold beside tensors, each loaded as plain data: numbers, arrays, paths, dates, dictionaries.

The allow-list of `torch.load(weights_only=True)` maps most names to stand-ins here, not to the types themselves.
NumPy's own classes stay out, since a hostile `dtype` can make them read memory that is not theirs.
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import fractions
import math
import types
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN_KINDS = "biufcSUMm"  # NumPy's kinds of fixed size; "O" holds Python objects, which come as a list
_MAX_NESTING = 200


class UnreadTypeError(Exception):
    """A type that could be read without running code, and is not."""


class _Dtype:
    """Stands for `numpy.dtype`: the type's code and its byte order; structures are refused."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(code, str) or np.dtype(code).kind not in _PLAIN_KINDS + "O":
            raise UnreadTypeError(
                f"arrays of the type {code!r} are not read; where the file was made, save torch.from_numpy(ARRAY) or "
                "a list in their place"
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for `numpy.ndarray`; `plain` makes one of it."""

    def __init__(self, *_: Any) -> None:
        self.value = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        order = "F" if fortran else "C"
        if dtype.dtype.kind == "O":
            if type(data) is not list:
                raise ValueError("an array of objects without objects")
            values = np.empty(len(data), dtype=object)
            values[:] = data
        else:
            values = np.frombuffer(data, dtype.dtype, math.prod(shape)).copy()
        self.value = values.reshape(shape, order=order)


class _Ignored:
    """Stands for state that nobody here reads, such as a random number generator."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


class _Dict:
    """Stands for a dictionary with more abilities: makes a plain one."""

    def __new__(cls, *_: Any) -> dict:
        return {}


class _Text:
    """Stands for a kind of string."""

    def __new__(cls, text: str = "") -> str:
        return str.__str__(text)


class _Name:
    """Stands for a type that is mentioned, not used: the factory of a `defaultdict`."""


def _scalar(dtype: _Dtype, data: Any) -> Any:
    """A numpy scalar as a Python number or string; of an object dtype it is the object."""
    return data if dtype.dtype.kind == "O" else np.frombuffer(data, dtype.dtype, 1)[0].item()


def _allowed() -> list[Callable | tuple[Callable, str]]:
    pairs: dict[str, Callable] = {
        "numpy.dtype": _Dtype,
        "numpy.ndarray": _Name,
        "collections.defaultdict": _Dict,
        "collections.deque": lambda items=(), *_: list(items),
        "torch.torch_version.TorchVersion": _Text,
        "argparse.Namespace": argparse.Namespace,
        "types.SimpleNamespace": types.SimpleNamespace,
        "decimal.Decimal": decimal.Decimal,
        "fractions.Fraction": fractions.Fraction,
        "builtins.bytes": lambda *_: b"",  # called for b"" alone: other bytes are written out
        "builtins.frozenset": frozenset,
        "builtins.slice": slice,
        "builtins.range": range,
        # needed for the state of these stand-ins to be set
        f"{__name__}._Array": _Array,
        f"{__name__}._Ignored": _Ignored,
    }
    multiarray = ("numpy.core.multiarray", "numpy._core.multiarray")  # the first is numpy 1's
    pathlib = ("pathlib", "pathlib._local")  # the second is Python 3.13's
    lightning = ("pytorch_lightning.utilities", "lightning.pytorch.utilities")
    fabric = ("lightning_fabric.utilities", "lightning.fabric.utilities")
    table: list[tuple[Callable, tuple[str, ...], tuple[str, ...]]] = [  # stand-in, modules, names in each of them
        (_Array, multiarray, ("_reconstruct",)),
        (_scalar, multiarray, ("scalar",)),
        (_Ignored, ("numpy.random._pickle",), ("__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor")),
        (_Ignored, ("numpy.random.bit_generator",), ("SeedSequence", "__pyx_unpickle_SeedSequence")),
        (_Ignored, ("numpy.random._mt19937",), ("MT19937",)),
        (_Ignored, ("numpy.random._pcg64",), ("PCG64",)),
        (lambda *parts: PurePosixPath(*parts), pathlib, ("Path", "PurePath", "PosixPath", "PurePosixPath")),
        (lambda *parts: PureWindowsPath(*parts), pathlib, ("WindowsPath", "PureWindowsPath")),
        (_Name, ("builtins",), ("list", "dict", "tuple", "int", "float", "bool", "str")),
        (_Dict, lightning, ("parsing.AttributeDict",)),
        (_Dict, fabric, ("data.AttributeDict",)),
    ]
    pairs |= {f"{module}.{name}": made for made, modules, names in table for module in modules for name in names}
    pairs |= {f"datetime.{n}": getattr(datetime, n) for n in ("date", "time", "datetime", "timedelta", "timezone")}
    pairs |= {f"numpy.dtypes.{type(np.dtype(code)).__name__}": _Dtype for code in "?bhilqBHILQefdgFDGSUMmO"}
    return [(stand_in, name) for name, stand_in in pairs.items()]


ALLOWED = _allowed()
"""For `torch.serialization.safe_globals`: pairs of what is made and the name that it is made for."""


def plain(value: Any) -> Any:
    """What a file holds without stand-ins: arrays of numpy, as tensors where all of a dictionary's values are such.

    ValueError if it is nested beyond reason.
    """
    return _plain(value, {}, 0)


def _plain(value: Any, seen: dict[int, tuple[Any, Any]], depth: int) -> Any:
    """`seen`: id -> (object, what was made of it)."""
    if depth > _MAX_NESTING:
        raise ValueError("nested too deeply")
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, _Dtype):
        return value.dtype
    if not isinstance(value, (dict, list, tuple, argparse.Namespace, types.SimpleNamespace)):
        return value
    if id(value) in seen:  # a file may hold a thing twice, or within itself
        return seen[id(value)][1]
    seen[id(value)] = (value, value)  # kept, so that no other object gets its id
    if isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        for key, item in list(vars(value).items()):
            vars(value)[key] = _plain(item, seen, depth + 1)
    elif isinstance(value, list):
        value[:] = [_plain(item, seen, depth + 1) for item in value]
    elif isinstance(value, tuple) and type(value) is tuple:
        made = tuple(_plain(item, seen, depth + 1) for item in value)
        seen[id(value)] = (value, made)
        return made
    elif isinstance(value, dict):
        arrays = {key: item.value for key, item in value.items() if isinstance(item, _Array)}
        weights = arrays and all(isinstance(item, (Tensor, _Array)) for item in value.values())
        for key, item in list(value.items()):
            as_tensor = weights and key in arrays and arrays[key].dtype.kind in "biuf"
            made = _tensor(arrays[key]) if as_tensor else _plain(item, seen, depth + 1)
            dict.__setitem__(value, key, made)
    return value


def _tensor(array: np.ndarray) -> Tensor:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.ascontiguousarray(native).reshape(array.shape))

