"""Heads as files: ours, and the official containers of each kind.

Ours is a safetensors file of the head's tensors whose metadata say `dune_fast_head` (a key of `head.KINDS`) and
`options` (JSON): all that builds the head again. An official container is known by what is in it: every kind has a
module `official` beside its head, with `recognize` and `read`. Nothing in a file is run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.heads.head import KINDS, Head, HeadError, head_class
from dune_fast.teachers.containers import CURE, TeacherWeightsError, container_state, read_container
from dune_fast.teachers.local_paths import local_path
from dune_fast.teachers.weights import build_loaded

KIND, OPTIONS = "dune_fast_head", "options"
"""Entries of the metadata of our files."""
FILE = "head.safetensors"
"""What a folder that is given for a head holds."""
_MOST = 1 << 24  # of an option that counts something


def head_bytes(head: Head) -> bytes:
    """The head as a file."""
    state = {name: x.detach().cpu().contiguous() for name, x in head.state_dict().items()}
    return safetensors.torch.save(state, {"format": "pt", KIND: head.kind, OPTIONS: json.dumps(head.options())})


def save_head(head: Head, path: str | os.PathLike) -> None:
    """Writes a head, whole or not at all, so that `load_head` gives the same one.

    Args:
        head: of a kind of `KINDS`.
        path: ends in .safetensors; its folder is made.

    Raises:
        HeadError: another ending.
    """
    path = local_path(path, "the head")
    if path.suffix != ".safetensors":
        raise HeadError(f"{path}: heads are saved as safetensors; give a name that ends in .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, head_bytes(head))


def load_head(path: str | os.PathLike, device: torch.device | str = "cpu") -> Head:
    """A task head, float32, frozen, in evaluation mode.

    Args:
        path: a file of `save_head`, or of `dune-fast evaluate --task segmentation | depth`; or an official container of
            MASt3R, DUNE-MASt3R, Multi-HMR or DINOv2's linear heads. A folder stands for its `head.safetensors`.
        device: where it goes.

    Returns:
        A `heads.head.Head`; its `kind` says which, its `forward` what it reads and gives.

    Raises:
        HeadError: there is no such file, it is damaged, or it holds something else, such as an encoder.
    """
    path = local_path(path, "the head")
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        raise HeadError(f"there is no head {path}: give a file of `dune-fast evaluate` or `dune_fast.heads.files`, or "
                        "an official container")  # fmt: skip
    try:
        content = read_container(path)
        kind, options = _metadata(path)
        head = _ours(kind, options, content, path) if kind else _official(content, path)
    except TeacherWeightsError as error:
        raise HeadError(str(error).replace(CURE, "get the file again, or give another one")) from error
    return head.eval().requires_grad_(False).to(device)


def _metadata(path: Path) -> tuple[str, str]:
    """Kind and options of one of our files, "" for others."""
    if path.suffix != ".safetensors":
        return "", ""
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise HeadError(f"{path} cannot be read: truncated or damaged ({error})") from error
    return found.get(KIND, ""), found.get(OPTIONS, "")


def _ours(kind: str, text: str, state: Mapping[str, Any], path: Path) -> Head:
    """The head that metadata and tensors of one of our files make."""
    if kind not in KINDS:
        raise HeadError(f"{path} holds a head of the kind {kind!r}; this version knows {', '.join(KINDS)}: update it")
    try:
        options = json.loads(text)
        if not isinstance(options, dict) or any(isinstance(n, int) and abs(n) > _MOST for n in options.values()):
            raise ValueError("no sensible options")
        if any(options.get(name, 0) > len(state) for name in head_class(kind).repeated):
            raise ValueError("more parts than the file has tensors")
        with torch.device("meta"):
            head_class(kind)(**options)
    except (ValueError, TypeError, RuntimeError, OverflowError, ArithmeticError, RecursionError) as error:
        raise HeadError(f"{path}: its options do not make a {kind} head ({error}); get the file again") from error
    built = build_loaded(lambda: head_class(kind)(**options), state, path)
    assert isinstance(built, Head)
    return built


def _official(content: Mapping[str, Any], path: Path) -> Head:
    """The head of an official container."""
    for official in _official_modules():
        if official.recognize(content):
            return official.read(content, path)
    names = [name for name, value in container_state(content, path).items() if value.ndim]
    if any(name.endswith("patch_embed.proj.weight") for name in names):
        raise HeadError(
            f"{path} holds an encoder and no head: give it as the encoder, and the head's own file as the head"
        )
    raise HeadError(
        f"{path} holds no head that is known: neither one of ours nor of MASt3R, DUNE-MASt3R, Multi-HMR or DINOv2 "
        f"(its first tensors are {', '.join(names[:3])})"
    )


def _official_modules() -> Iterator[ModuleType]:
    """The module `official` of every kind, each once."""
    packages = dict.fromkeys(place.partition(":")[0].rpartition(".")[0] for place in KINDS.values())
    return (import_module(f"{package}.official") for package in packages)
