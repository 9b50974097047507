"""One encoder, many tasks: the encoder runs once for all its heads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dune_fast.heads.files import load_head
from dune_fast.heads.head import Head, HeadError, check_encoder
from dune_fast.heads.tokens import EncoderTokens, encode
from dune_fast.kernels.nn.vit import VisionTransformer


class EncoderWithHeads(nn.Module):
    """A frozen encoder and heads by name.

        model = EncoderWithHeads.from_files(dune_fast.load_encoder("runs/demo"), {"depth": "depth.safetensors"})
        depth = model(images)["depth"]

    Args:
        encoder: see `dune_fast.load_encoder`.
        heads: name -> head. Every head must have been trained on this encoder.

    Raises:
        HeadError: no head, one for an encoder of another width or patch, or a name that torch does not take.
    """

    def __init__(self, encoder: VisionTransformer, heads: Mapping[str, Head]) -> None:
        super().__init__()
        if not heads:
            raise HeadError("no head is given: name one at least")
        for name, head in heads.items():
            try:
                check_encoder(head, encoder)
            except HeadError as error:
                raise HeadError(f"{name}: {error}") from error
        try:
            self.encoder, self.heads = encoder, nn.ModuleDict(heads)
        except (KeyError, TypeError) as error:  # a dot, or a method of modules, such as "train"
            raise HeadError(f"a head's name is none for torch ({error.args[0]}): call it something else") from error
        depth = len(encoder.blocks)
        self._blocks = sorted({block for head in heads.values() for block in head.blocks(depth)})

    @classmethod
    def from_files(
        cls,
        encoder: VisionTransformer,
        heads: Mapping[str, str | os.PathLike],
        device: torch.device | str = "cpu",
    ) -> EncoderWithHeads:
        """As the constructor, the heads being files of `dune_fast.load_head`. All goes to `device`."""
        return cls(encoder, {name: load_head(path) for name, path in heads.items()}).to(device)

    def encode(self, images: Tensor) -> EncoderTokens:
        """The tokens that all heads read of images [B, 3, H, W], as `encoder.transform` makes them; one pass."""
        return encode(self.encoder, images, self._blocks)

    def decode(self, tokens: EncoderTokens, name: str, **given: Any) -> Any:
        """What the head of this name makes of tokens of `encode`; see `forward`."""
        if name not in self.heads:
            raise HeadError(f"there is no head {name!r}; the heads are {', '.join(self.heads)}")
        head, count = self.heads[name], len(tokens.patch)
        if head.views == 1:
            return head(_of_blocks(tokens, head.blocks(len(self.encoder.blocks))), **given)
        if count % 2:
            raise HeadError(f"the head {name} reads pairs of images, and {count} are given: give an even number")
        return head(tokens.images(slice(0, None, 2)), tokens.images(slice(1, None, 2)), **given)

    def forward(
        self, images: Tensor, names: Sequence[str] = (), given: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Runs the encoder once, then the heads.

        Args:
            images: [B, 3, H, W], normalised as `encoder.transform` does; sides are multiples of the patch. A head of
                pairs takes images 0 and 1, 2 and 3, and so on, as first and second view.
            names: of the heads that are run; all of them by default.
            given: name of a head -> further arguments of its `forward`, such as `intrinsics`.

        Returns:
            Name -> what the head gives.

        Raises:
            HeadError: a name that no head has, or an odd number of images for a head of pairs.
            ValueError: sides that are no multiple of the patch.
        """
        tokens, given = self.encode(images), given or {}
        if unknown := [name for name in given if name not in self.heads]:
            raise HeadError(f"there is no head {unknown[0]!r}; the heads are {', '.join(self.heads)}")
        return {name: self.decode(tokens, name, **given.get(name, {})) for name in names or self.heads}


def _of_blocks(tokens: EncoderTokens, blocks: Sequence[int]) -> EncoderTokens:
    """The same with the blocks of one head alone, in its order."""
    return tokens._replace(blocks={i: tokens.blocks[i] for i in blocks})
