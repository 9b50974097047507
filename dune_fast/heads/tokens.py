"""What heads read of an encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from dune_fast.kernels.nn.vit import VisionTransformer


class BlockTokens(NamedTuple):
    """What a block of the encoder puts out, for B images of N patches."""

    cls: Tensor | None
    """[B, C], after the encoder's final norm; None where the encoder has none."""
    patch: Tensor
    """[B, N, C], after the final norm."""
    raw_cls: Tensor | None
    """[B, C], before the final norm."""
    raw_patch: Tensor
    """[B, N, C], before the final norm."""


class EncoderTokens(NamedTuple):
    """Of B images; N = rows x columns patches, row-major. The first four fields are those of the last block."""

    cls: Tensor | None
    """[B, C], after the final norm; None where the encoder has none."""
    patch: Tensor
    """[B, N, C], after the final norm."""
    raw_cls: Tensor | None
    """[B, C], before the final norm."""
    raw_patch: Tensor
    """[B, N, C], before the final norm."""
    grid: tuple[int, int]
    """(rows, columns)."""
    blocks: Mapping[int, BlockTokens] = MappingProxyType({})
    """Index of a block, from 0 -> its tokens; of the blocks that `encode` was asked for."""

    @property
    def last(self) -> BlockTokens:
        """The last block's."""
        return BlockTokens(*self[:4])

    def images(self, chosen: slice | Tensor) -> EncoderTokens:
        """The tokens of some of the images, such as `slice(0, None, 2)`."""

        def cut(part: BlockTokens) -> BlockTokens:
            return BlockTokens(*(None if x is None else x[chosen] for x in part))

        return EncoderTokens(*cut(self.last), self.grid, {i: cut(part) for i, part in self.blocks.items()})


def joined(parts: Sequence[EncoderTokens]) -> EncoderTokens:
    """The tokens of all images of several batches on one grid; those of the last block."""
    columns = zip(*(part.last for part in parts), strict=True)
    return EncoderTokens(*(None if column[0] is None else torch.cat(column) for column in columns), parts[0].grid)


@torch.no_grad()
def encode(encoder: VisionTransformer, images: Tensor, blocks: Collection[int] = ()) -> EncoderTokens:
    """One pass of the frozen encoder; its tokens in float32. Products are of `encoder.autocast_dtype` if that is set.

    Args:
        encoder: in evaluation mode.
        images: [B, 3, H, W], normalised as `encoder.transform` does; sides are multiples of the patch.
        blocks: indices, from 0, of blocks whose tokens are wanted beside the last one's.

    Raises:
        ValueError: sides that are no multiple of the patch, or a block that the encoder has not.
    """
    last, dtype = len(encoder.blocks) - 1, encoder.autocast_dtype

    def split(block: int, tokens: Tensor) -> BlockTokens:
        cls, _, patch = encoder.normed_parts(tokens, block)
        raw_cls, _, raw_patch = encoder.split(tokens)
        return BlockTokens(*(None if x is None else x.float() for x in (cls, patch, raw_cls, raw_patch)))

    with contextlib.nullcontext() if dtype is None else torch.autocast(images.device.type, dtype):
        found = {i: split(i, x) for i, x in encoder.block_outputs(images, sorted({*blocks, last})).items()}
    return EncoderTokens(*found[last], encoder.grid(images), {i: found[i] for i in blocks})
