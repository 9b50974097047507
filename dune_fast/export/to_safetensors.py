"""`--to safetensors`: `encoder.safetensors` with its architecture and preprocessing, for `dune_fast.load_encoder`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from dune_fast.engine.checkpoints import write_tensors
from dune_fast.export.check import Reader, encoder_outputs
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.load import load_encoder
from dune_fast.teachers.architecture import PREPROCESSING, architecture_metadata

FILE = "encoder.safetensors"
PLAIN: Mapping[str, str] = MappingProxyType({})


def save(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors of any device and layout to a safetensors file."""
    write_tensors(path, {key: value.detach().cpu().contiguous() for key, value in state.items()}, metadata)


def write(encoder: VisionTransformer, folder: Path, about: Mapping[str, str] = PLAIN) -> None:
    """Writes `encoder.safetensors`; `about` is further metadata."""
    metadata = architecture_metadata(encoder.cfg) | {PREPROCESSING: encoder.transform.as_json()} | about
    save(folder / FILE, encoder.state_dict(), metadata)


def read(folder: Path) -> Reader:
    """The encoder, built from the file alone."""
    return partial(encoder_outputs, load_encoder(folder / FILE))
