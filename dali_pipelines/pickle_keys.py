"""Lists of images in pickles, without unpickling them: a pickle is a program, and none is ever run here.

Some datasets (UBody) publish the list of their images only as the keys of a pickle full of annotations; the code
published with DUNE reads pickled lists, and pairs of a folder and a list. The opcodes are walked with a stack of
stand-ins: strings stand for themselves, everything else for "an object", which remembers the keys and the elements
that it is given. What a pickle would import or call is never looked up.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from pathlib import Path

from dune_fast.dali_pipelines.errors import DataError

_MARK = object()


@dataclass(eq=False)
class _Thing:
    """Any object but a string."""

    keys: list[object] = field(default_factory=list)
    """Of a dictionary."""
    items: list[object] = field(default_factory=list)
    """Of a list or a tuple."""


def pickle_paths(path: str | Path) -> tuple[str, list[str]]:
    """The list of images that a pickle holds, and the folder that it says they are in, "" if it says none.

    The list is the keys of a dictionary, the elements of a list or a tuple, or the second element of a pair whose first
    is the folder. An element may be a tuple that begins with the path, as in torchvision's `ImageFolder.samples`.

    Raises:
        DataError: the file cannot be read, is no pickle, or holds no such list.
    """
    result = _load(path)
    folder = ""
    pair = result.items if isinstance(result, _Thing) and len(result.items) == 2 else (None, None)
    if isinstance(pair[0], str) and isinstance(pair[1], _Thing):
        folder, result = pair
    found = (result.keys or result.items) if isinstance(result, _Thing) else []
    found = [item.items[0] if isinstance(item, _Thing) and item.items else item for item in found]
    paths = [item for item in found if isinstance(item, str)]
    if not paths:
        raise DataError(
            f"{path} holds no list of images: neither a dictionary with paths as keys, nor a list of paths, nor a pair "
            "of a folder and such a list"
        )
    return folder, paths


def pickle_keys(path: str | Path) -> list[str]:
    """The string keys of the dictionary that a pickle holds, in their order.

    Raises:
        DataError: the file cannot be read, is no pickle, or what it holds has no string keys.
    """
    result = _load(path)
    keys = [key for key in result.keys if isinstance(key, str)] if isinstance(result, _Thing) else []
    if not keys:
        raise DataError(f"{path} does not hold a dictionary with strings as keys")
    return keys


def _load(path: str | Path) -> object:
    """The stand-in of what a pickle holds."""
    try:
        with open(path, "rb") as stream:
            return _walk(stream)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except (ValueError, LookupError, TypeError) as error:  # what walking nonsense ends in
        raise DataError(f"{path} is not a whole pickle: {error}") from error


def _walk(stream) -> object:
    """The stand-in of what the pickle's STOP leaves."""
    stack: list[object] = []
    memo: dict[int, object] = {}

    def pop_slice() -> list[object]:
        start = len(stack) - 1 - stack[::-1].index(_MARK)
        found = stack[start + 1 :]
        del stack[start:]
        return found

    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name == "STOP":
            return stack.pop()
        if name == "MARK":
            stack.append(_MARK)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("SETITEM", "SETITEMS"):
            items = pop_slice() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            if isinstance(stack[-1], _Thing):
                stack[-1].keys += items[::2]
        elif name == "DICT":
            stack.append(_Thing(pop_slice()[::2]))
        elif name in ("APPEND", "APPENDS"):
            items = pop_slice() if name == "APPENDS" else [stack.pop()]
            if isinstance(stack[-1], _Thing):
                stack[-1].items += items
        elif name in ("LIST", "TUPLE"):
            stack.append(_Thing(items=pop_slice()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            items = stack[-size:]
            del stack[-size:]
            stack.append(_Thing(items=items))
        elif name == "BUILD":  # gives an object its state
            stack.pop()
        else:  # nothing but its effect on the stack matters
            taken = list(opcode.stack_before)
            if pickletools.stackslice in taken:
                pop_slice()
                taken = taken[: taken.index(pickletools.markobject)]
            if taken:
                del stack[-len(taken) :]
            is_text = name.endswith(("STRING", "UNICODE", "UNICODE8"))
            stack += [argument if is_text else _Thing() for _ in opcode.stack_after]
    raise ValueError("it has no end")
