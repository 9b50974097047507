"""What both linear heads have in common: which tokens they read, as maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from dune_fast.heads.head import Head, HeadError
from dune_fast.heads.tokens import EncoderTokens

Layer = tuple[Tensor, Tensor | None]
"""Tokens of one block: patches [B, C, h, w] and cls [B, C], None where the network has none."""

_FOUR_BLOCKS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23)}
"""Depth -> blocks that DINOv2's heads of four layers read; other depths take the ends of their quarters."""


def blocks_read(depth: int, layers: int, last: bool = False) -> tuple[int, ...]:
    """Indices, from 0, of the blocks that a head of 1 or 4 layers reads of an encoder of `depth` blocks.

    Four are evenly spread, or the `last` ones. HeadError if there are not enough of them.
    """
    if layers == 1:
        return (depth - 1,)
    even = _FOUR_BLOCKS.get(depth, tuple(round(depth * i / 4) - 1 for i in (1, 2, 3, 4)))
    blocks = tuple(range(depth - 4, depth)) if last else even
    if len(set(blocks)) != 4 or min(blocks) < 0:
        raise HeadError(f"4 layers of an encoder that has {depth} blocks alone: read the last one")
    return blocks


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, no aligned corners. [B, C, h, w] -> [B, C, *size]."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def check_whole(**values: Any) -> None:
    """HeadError unless all are whole numbers above 0."""
    for name, value in values.items():
        if type(value) is not int or value < 1:
            raise HeadError(f"{name} is {value!r}: give a whole number above 0")


class LinearHead(Head):
    """A head on the tokens of 1 block or 4. Parameters have the names of DINOv2's files, without `decode_head`."""

    normalised: ClassVar[bool]
    """Whether it reads tokens after the encoder's final norm."""
    last_blocks: bool = False
    """Whether four layers are the last four blocks, instead of evenly spread ones."""

    def __init__(self, width: int, patch_size: int, layers: int, cls_width: int, projector: str) -> None:
        super().__init__()
        if layers not in (1, 4):
            raise HeadError(f"layers is {layers!r}: a linear head reads 1 block (the last) or 4")
        check_whole(width=width, patch_size=patch_size)
        if not isinstance(projector, str):
            raise HeadError(f"projector is {projector!r}: give a teacher's name")
        self.width, self.patch_size, self.layers = width, patch_size, layers
        self.cls_width, self.projector = cls_width, projector

    def options(self) -> dict[str, Any]:
        return {
            "width": self.width, "patch_size": self.patch_size, "layers": self.layers, "projector": self.projector
        }  # fmt: skip

    def blocks(self, depth: int) -> tuple[int, ...]:
        return blocks_read(depth, self.layers, self.last_blocks) if self.layers > 1 else ()

    def forward(self, tokens: EncoderTokens) -> Tensor:
        """Tokens of images of one size -> what `from_layers` gives."""
        found = 0 if tokens.cls is None else tokens.cls.shape[-1]
        if self.cls_width not in (0, found):
            raise HeadError(
                f"the {self.kind} head reads a cls token of {self.cls_width} channels, which the encoder has not "
                f"({found or 'it has none'})"
            )
        parts = list(tokens.blocks.values()) if self.layers > 1 else [tokens.last]
        if len(parts) != self.layers:
            raise HeadError(f"the {self.kind} head reads {self.layers} blocks: give encode(..., blocks=head.blocks)")
        maps = []
        for part in parts:
            patch = part.patch if self.normalised else part.raw_patch
            cls = part.cls if self.normalised else part.raw_cls
            maps.append((patch.float().transpose(1, 2).unflatten(2, tokens.grid), None if cls is None else cls.float()))
        return self.from_layers(maps)

    def from_layers(self, layers: Sequence[Layer]) -> Tensor:
        """The output for the maps of each block that the head reads."""
        raise NotImplementedError
