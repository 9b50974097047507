"""What all heads have in common."""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

from torch import nn

from dune_fast.kernels.nn.vit import VisionTransformer

KINDS = {
    "linear_seg": "dune_fast.heads.linear.segmentation:SegmentationHead",
    "linear_depth": "dune_fast.heads.linear.depth:DepthHead",
    "mast3r": "dune_fast.heads.mast3r.head:Mast3rHead",
    "multihmr": "dune_fast.heads.multihmr.head:MultiHmrHead",
}
"""Kind -> module and class, imported when asked for."""


class HeadError(ValueError):
    """A head that does not exist, or does not fit; the message says what to do."""


class Head(nn.Module):
    """A network on a frozen encoder's tokens. `type(head)(**head.options())` builds the same one."""

    kind: ClassVar[str]
    """A key of `KINDS`."""
    width: int
    """Channels of the encoder that it reads."""
    patch_size: int
    """Of that encoder, in pixels."""
    views: ClassVar[int] = 1
    """Images that belong together: 2 where `forward` takes the tokens of a first and of a second image."""
    repeated: ClassVar[tuple[str, ...]] = ()
    """Options that say how often a part is there; a file of fewer tensors is refused before anything is built."""
    projector: str = ""
    """The teacher whose projector's output it reads; "" for the encoder's own tokens."""

    def options(self) -> dict[str, Any]:
        """Plain JSON: the arguments that rebuild it."""
        raise NotImplementedError

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Blocks of an encoder of `depth` blocks that it reads beside the last one, as `tokens.encode` takes them."""
        return ()


def head_class(kind: str) -> type[Head]:
    """The class of a kind. HeadError if there is none."""
    if kind not in KINDS:
        raise HeadError(f"there is no head {kind!r}; the kinds are {', '.join(KINDS)}")
    module, _, name = KINDS[kind].partition(":")
    return getattr(import_module(module), name)


def check_encoder(head: Head, encoder: VisionTransformer) -> None:
    """HeadError if an encoder's tokens are not those that a head was trained on, by their channels and patches."""
    if head.projector:
        raise HeadError(
            f"the {head.kind} head reads the projector of {head.projector}, not the encoder: train one without "
            "--projector, or use it by `dune-fast infer`"
        )
    found, wanted = (encoder.cfg.embed_dim, encoder.cfg.patch_size), (head.width, head.patch_size)
    if found != wanted:
        raise HeadError(
            f"the {head.kind} head reads {wanted[0]} channels of {wanted[1]} x {wanted[1]} px patches, the encoder "
            f"gives {found[0]} of {found[1]} x {found[1]}: choose the encoder that the head was trained on"
        )
