"""A head and its encoder, from their files to a device."""

from __future__ import annotations

from pathlib import Path

import torch

from dune_fast.engine.devices import autocast_dtype
from dune_fast.evaluate.ranks import open_ranks
from dune_fast.heads.files import load_head
from dune_fast.heads.head import Head, HeadError, check_encoder
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.load import load_encoder

COMMANDS = {"linear_seg": "seg", "linear_depth": "depth", "mast3r": "mast3r", "multihmr": "multihmr"}
"""Kind of a head -> `dune-fast infer ...`."""


def open_device(device: str | None = None) -> torch.device:
    """"cpu", "cuda" or "cuda:1"; the first GPU by default. ValueError for one that is not there."""
    with open_ranks(device) as ranks:
        return ranks.device


def open_head(path: Path, kind: str, device: str | None = None) -> Head:
    """A head of one kind on a device, see `open_device`. HeadError for a file or kind that is not wanted."""
    head = load_head(path, open_device(device))
    if head.kind != kind:
        raise HeadError(
            f"{path} holds a {head.kind} head, and a {kind} head is needed: give another one, or use this one by "
            f"`dune-fast infer {COMMANDS[head.kind]}`"
        )
    return head


def open_encoder(name: str, head: Head, precision: str = "auto") -> VisionTransformer:
    """The encoder of a head, on the head's device.

    Args:
        name: see `dune_fast.load_encoder`.
        precision: of its products, see `TrainConfig.precision`; heads compute in float32.

    Raises:
        HeadError: it is not of the head's width and patch.
        ValueError: a file that cannot be used.
    """
    device = next(head.parameters()).device
    encoder = load_encoder(name, device)
    check_encoder(head, encoder)
    encoder.autocast_dtype = autocast_dtype(precision, device)
    return encoder
