"""The files of a checkpoint: safetensors with a checksum, written here, read by `teachers.run_files`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dune_fast.teachers.run_files import (
    MANIFEST,
    STATE_FILE,
    CheckpointError,
    FileInfo,
    Manifest,
    Piece,
    Reader,
    find_fault,
)

__all__ = [
    "MANIFEST", "STATE_FILE", "CheckpointError", "FileInfo", "Manifest", "Piece", "Reader", "find_fault",
    "write_tensors",
]  # fmt: skip

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> FileInfo:
    """Writes a safetensors file and makes it durable; returns its checksum.

    Own code rather than the library's: that one copies every tensor and holds the interpreter's lock while it writes,
    which would stop the training thread, and its errors are not OSErrors. Here writing and hashing run without it.

    Args:
        path: the file.
        tensors: contiguous, on the CPU.
        metadata: of the file.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        assert tensor.is_contiguous() and tensor.device.type == "cpu", name
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for data in (len(encoded).to_bytes(8, "little"), encoded, *map(_bytes, tensors.values())):
            view = memoryview(data)
            while view:  # a raw write may be a short one
                written = file.write(view)
                digest.update(view[:written])
                view, size = view[written:], size + written
        os.fsync(file.fileno())
    return FileInfo(digest.hexdigest(), size)


def _bytes(tensor: Tensor) -> memoryview | bytes:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
