"""Weight files of every kind, read without running anything in them.

`torch.save` archives go through `torch.load(weights_only=True)` with the allow-list of `teachers.safe_types`; a file
that needs another type is refused by name. Before a byte is unpacked, an archive's members, their names and their
unpacked size are checked. Every way in which a file can be wrong ends in one sentence.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dune_fast.teachers.files import member_fault
from dune_fast.teachers.run_files import CheckpointError, checkpoint_state, is_checkpoint
from dune_fast.teachers.safe_types import ALLOWED, UnreadTypeError, plain

STATE_ENTRIES = (
    "model", "model_state_dict", "state_dict_ema", "state_dict", "teacher", "student", "encoder", "module", "backbone",
    "network", "net",
)  # fmt: skip
"""Entries that a container keeps its state dict under, in the order in which they are looked for. Of timm's and RADIO's
pair the average comes first, as their own loaders take it."""

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module", "_forward_module")
"""What torch.compile, activation checkpointing, FSDP and Lightning put into names, anywhere in them."""

CURE = "get the file again, or correct the teacher's `weights` and `family`"
"""What a user can do about a file that does not fit."""

_ZIP_MAGIC = b"PK\x03\x04"
_UNPACKED_FACTOR = 4  # torch.save does not compress; trained weights compress to about nine tenths
_UNPACKED_FLOOR = 1 << 20  # bytes; small archives hold small pickles, which compress well


class TeacherWeightsError(ValueError):
    """A teacher's weights are missing, damaged, unsafe, or those of another model."""


def damaged(path: Path, reason: Exception | str) -> TeacherWeightsError:
    """The error for a file that is not what its format's reader expects."""
    text = next(iter(str(reason).splitlines()), "") or reason.__class__.__name__
    return TeacherWeightsError(f"{path} cannot be read: truncated, damaged or of another format ({text}); {CURE}")


def read_container(path: Path) -> dict[str, Any]:
    """A published checkpoint: `{'model': state dict, 'args': Namespace, ...}` or a bare state dict.

    Args:
        path: a `torch.save` archive, a safetensors file or the folder of a run's checkpoint; the last two are bare.

    Raises:
        TeacherWeightsError: missing, damaged, or in need of a type that is not allowed (named in the message).
    """
    path = Path(path)
    if is_checkpoint(path):
        try:
            return dict(checkpoint_state(path)[1])
        except CheckpointError as error:
            raise TeacherWeightsError(str(error)) from error
    if not path.is_file():
        raise TeacherWeightsError(f"there is no checkpoint {path}; correct the path, or put the file there")
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path))
    check_archive(path)
    try:
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols, which the error below names
            content = plain(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise _unsafe(path, str(error)) from error
    except UnreadTypeError as error:
        raise TeacherWeightsError(f"{path}: {error}") from error
    except Exception as error:  # a hostile pickle can make the reader fail in any way
        if "TorchScript" in str(error):
            raise TeacherWeightsError(
                f"{path} is a TorchScript archive, which is a program; where it was made, save the weights alone: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
            ) from error
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise TeacherWeightsError(f"{path} holds a {type(content).__name__}, not a checkpoint's dictionary")
    return content


def _unsafe(path: Path, reason: str) -> TeacherWeightsError:
    """Torch's refusal in our words: its own end in the advice to switch the check off."""
    if wanted := re.search(r"GLOBAL (\S+)", reason):
        return TeacherWeightsError(
            f"{path} asks for the type {wanted[1]} and is not loaded, since that could run code. Where the file was "
            "made, save the weights alone: torch.save(model.state_dict(), 'weights.pth')"
        )
    if "Unsupported operand" in reason:
        return TeacherWeightsError(
            f"{path} was saved with another pickle protocol than torch.save's own, 2, or is damaged; where it was "
            "made, save it again without `pickle_protocol`"
        )
    found = re.search(r"WeightsUnpickler error: ([^\n]*)", reason)
    return damaged(path, found[1].rstrip() if found else "its pickle is not that of plain data")


def check_archive(path: Path) -> None:
    """TeacherWeightsError for what is no sound `torch.save` archive; nothing is unpacked.

    That is another magic, a truncated file, members outside the archive's folder, links, encrypted or doubled members,
    or more bytes unpacked than weights of this file's size can have.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            magic = handle.read(4)
            members = zipfile.ZipFile(handle).infolist() if magic == _ZIP_MAGIC else []
    except (OSError, zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as error:
        raise damaged(path, error) from error
    if magic[:1] == b"\x80":
        raise TeacherWeightsError(
            f"{path} is a bare pickle, as torch.save wrote before version 1.6, and cannot be checked before it is "
            "read; load it where you trust it and save it again with a newer torch"
        )
    if magic != _ZIP_MAGIC:
        raise damaged(path, "it does not begin like an archive of torch.save")
    if fault := member_fault(members):
        raise TeacherWeightsError(f"{path} has {fault}; it is not read")
    unpacked, limit = sum(member.file_size for member in members), max(_UNPACKED_FACTOR * size, _UNPACKED_FLOOR)
    if unpacked > limit:
        raise TeacherWeightsError(
            f"{path} has {size} bytes that are said to unpack to {unpacked}, which no saved weights do; it is not read"
        )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; TeacherWeightsError if it is damaged or its header claims the impossible."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, MemoryError, OverflowError, KeyError) as error:
        raise damaged(path, error) from error


def is_state(value: Any) -> bool:
    """Whether this is a state dict: names to tensors, at least one."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def state_entry(content: Mapping[str, Any], path: Path) -> str | None:
    """The entry of a container that holds its state dict, None if it is one itself; TeacherWeightsError without any."""
    if is_state(content):
        return None
    for entry in STATE_ENTRIES:
        if is_state(content.get(entry)):
            return entry
    if any(isinstance(value, Tensor) and "." in str(key) for key, value in content.items()):
        return None  # weights with a few other values between them
    raise TeacherWeightsError(
        f"{path} has no state dict: neither is it one nor is there one under {', '.join(STATE_ENTRIES)}; {CURE}"
    )


def container_state(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The state dict of a container, whichever entry holds it, without the names that wrappers add."""
    entry = state_entry(content, path)
    found = content if entry is None else content[entry]
    state = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
    check_storage(state, path)
    return strip_wrappers(state, path)


def check_storage(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuses tensors that claim more values than the file holds: a view may repeat one value without end."""
    for key, value in state.items():
        if value.layout != torch.strided or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            shape = list(value.shape)
            raise TeacherWeightsError(f"{path}: {key} claims more values than the file holds, {shape}; {CURE}")


def strip_wrappers(state: Mapping[str, Tensor], path: Path | str = "") -> dict[str, Tensor]:
    """Takes wrappers out of names: `WRAPPERS` anywhere, DistributedDataParallel's `module.` in front.

    TeacherWeightsError if two tensors then have the same name.
    """
    stripped: dict[str, Tensor] = {}
    for key, value in state.items():
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if name in stripped:
            raise TeacherWeightsError(f"{path} has two tensors {name}, wrapped and not; save the wanted one alone")
        stripped[name] = value
    return stripped


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state dict under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
