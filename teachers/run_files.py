"""What a run has written, read: the files of a checkpoint, and the weights of a run that has ended or has not.

    step_0001234/
      manifest.json            what there is, see `Manifest`
      rank_00000.safetensors   `weight/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>`: runs of elements, float32, flat
                               (`ema/<name>` too in a run with `train.ema`)
      rank_00001.safetensors   ...
      state.safetensors        small whole tensors: frozen parameters and buffers, statistics of the teachers

Any number of ranks under any ZeRO stage reads what any other has written: a reader asks for a run of elements, and only
those bytes are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dune_fast.teachers.files import file_sha256

logger = logging.getLogger(__name__)

FORMAT = 1
AVERAGE = "ema"
"""Kind of the running average of the weights, float32, where the run keeps one (`train.ema`)."""
MANIFEST = "manifest.json"
STATE_FILE = "state.safetensors"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message says which and why."""


@dataclass
class FileInfo:
    """A file of the checkpoint."""

    sha256: str
    bytes: int


@dataclass
class Piece:
    """A run of elements of one flattened parameter, in one file under the parameter's name."""

    file: str
    start: int
    numel: int


@dataclass
class Manifest:
    """What a checkpoint holds."""

    step: int
    updates: int
    """Updates that the optimizer has made: the steps, less those skipped."""
    world_size: int
    zero_stage: int
    config_hash: str
    config: dict[str, Any]
    shapes: dict[str, list[int]]
    """Of the trained parameters."""
    run: dict[str, Any] = field(default_factory=dict)
    """Small state of the run beside tensors."""

    @property
    def averaged(self) -> bool:
        """Whether it has an average of the weights; one that is older than these has none."""
        return bool(self.run.get("averaged", False))

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    """Parameter -> the runs of elements that make it up."""
    files: dict[str, FileInfo] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """As JSON, with a checksum of its own."""
        values = dataclasses.asdict(self)
        return json.dumps(values | {"sha256": _checksum(values)}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a checkpoint's folder; CheckpointError if it is missing or damaged."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise CheckpointError(f"{path} is of format {values['format']}, this version reads {FORMAT}")
            if (given := values.pop("sha256", None)) is not None and given != _checksum(values):
                raise CheckpointError(f"{path} is damaged (its checksum does not match)")
            values["pieces"] = {name: [Piece(**p) for p in pieces] for name, pieces in values["pieces"].items()}
            values["files"] = {name: FileInfo(**info) for name, info in values["files"].items()}
            return cls(**values)
        except CheckpointError:
            raise
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({str(error) or repr(error)})") from None


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _file_fault(path: Path, info: FileInfo) -> str:
    try:
        if (size := path.stat().st_size) != info.bytes:
            return f"{path.name} has {size} bytes instead of {info.bytes}"
        return "" if file_sha256(path) == info.sha256 else f"the checksum of {path.name} does not match"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error})"


def find_fault(folder: Path) -> str:
    """What is wrong with a checkpoint, by sizes and checksums of its files; empty if nothing is."""
    try:
        manifest = Manifest.read(folder)
    except CheckpointError as error:
        return str(error)
    with ThreadPoolExecutor(8) as pool:  # hashing runs without the interpreter's lock
        faults = pool.map(lambda item: _file_fault(folder / item[0], item[1]), manifest.files.items())
        return "; ".join(fault for fault in faults if fault)


class Reader:
    """Reads runs of elements from a checkpoint that `find_fault` has passed."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._files: dict[str, Any] = {}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements start .. start + numel of a flattened parameter, or of its moment `kind`; float32 [numel].

        CheckpointError if the checkpoint does not have all of them.
        """
        out, found = torch.empty(numel), 0
        for piece in self.manifest.pieces.get(name, ()):
            low, high = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if low < high:
                values = self._open(piece.file).get_slice(f"{kind}/{name}")[low - piece.start : high - piece.start]
                out[low - start : high - start] = values
                found += high - low
        if found != numel:
            raise CheckpointError(f"{self.folder} has {found} of {numel} elements of {kind}/{name}: it is damaged")
        return out

    def state(self) -> dict[str, Tensor]:
        """The small whole tensors."""
        return load_file(self.folder / STATE_FILE)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / file} cannot be read: {error}") from None
        return self._files[file]


def folder(run: Path) -> Path:
    """Where a run's checkpoints are."""
    return run / "checkpoints"


def tag(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"step_{step:07d}"


def complete_steps(run: Path) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    found = (re.fullmatch(r"step_(\d+)", path.name) for path in folder(run).glob("step_*"))
    return sorted(int(match[1]) for match in found if match)


def newest_good(run: Path) -> int | None:
    """The newest checkpoint that is whole by its checksums, None if the run has none at all; warns of broken ones.

    CheckpointError if there are checkpoints, and every one of them is broken.
    """
    faults = []
    for step in reversed(complete_steps(run)):
        fault = find_fault(folder(run) / tag(step))
        if not fault:
            return step
        faults.append(f"{tag(step)}: {fault}")
        logger.warning("checkpoint %s is broken (%s): going back to the one before", tag(step), fault)
    if faults:
        raise CheckpointError(
            f"none of the checkpoints in {folder(run)} can be used ({'; '.join(faults)}); start anew with "
            "train.overwrite=true, or choose another name=..."
        )
    return None


def is_checkpoint(path: Path) -> bool:
    """Whether a path is the folder of a checkpoint."""
    return (path / MANIFEST).is_file()


def weights_in(path: Path, *names: str) -> Path | None:
    """Where the weights of a run's or a checkpoint's folder are: a finished run's first file of `names`, or the folder
    of a checkpoint; None if there are none.

    CheckpointError if the run has not ended and all of its checkpoints are broken.
    """
    if is_checkpoint(path):
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    if (step := newest_good(path)) is None:
        return None
    logger.warning("%s has not ended: the weights are those of its newest checkpoint, %s", path, tag(step))
    return folder(path) / tag(step)


def checkpoint_state(path: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """A checkpoint's manifest and weights, by the names of a finished run's `student.safetensors`, and like there the
    average of the weights where there is one.

    CheckpointError if it is damaged.
    """
    if fault := find_fault(path):
        raise CheckpointError(f"the checkpoint {path} cannot be used: {fault}")
    manifest = Manifest.read(path)
    reader = Reader(path, manifest)
    kind = AVERAGE if manifest.averaged else "weight"
    state = {
        name: reader.read(kind, name, 0, math.prod(shape)).view(shape) for name, shape in manifest.shapes.items()
    }
    for key, value in reader.state().items():
        kind, _, name = key.partition("/")
        if kind in ("student", "statistics"):
            state[name if kind == "student" else f"teacher_norms.{name}"] = value
    return manifest, state
