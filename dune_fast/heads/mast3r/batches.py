"""Batches of pairs through encoder and head: both orders of a pair, landscape and portrait images in one batch.

A batch's images have one size and are stored landscape; a portrait image is stored transposed (x and y swapped). It is
encoded and decoded upright, and its outputs are transposed again.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.heads.tokens import encode
from dune_fast.kernels.nn.vit import VisionTransformer

Results = tuple[dict[str, Tensor], dict[str, Tensor]]
"""What `Mast3rHead.forward` gives."""


def for_encoder(images: Tensor, encoder: VisionTransformer) -> Tensor:
    """Images with values in [-1, 1], [B, 3, H, W], as MASt3R's interface has them, normalised as the encoder wants."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (encoder.mean, encoder.std))
    return (images * 0.5 + 0.5 - mean) / std


def run_pairs(
    encoder: VisionTransformer, head: Mast3rHead, images1: Tensor, images2: Tensor,
    portrait1: Tensor | None = None, portrait2: Tensor | None = None, symmetric: bool = False,
) -> Results:  # fmt: skip
    """Outputs of B pairs of images of one stored size. The encoder is frozen and runs once for each image.

    Args:
        images1, images2: [B, 3, H, W], in [-1, 1].
        portrait1, portrait2: bool [B], whether the stored image is the transpose of the real one (true_shape has
            height > width); none by default.
        symmetric: whether every pair is taken in both orders, as in training: (a0, b0), (b0, a0), (a1, b1), ...

    Returns:
        See `Mast3rHead.forward`, of B pairs, or of 2B with `symmetric`; in the stored orientation.

    Raises:
        ValueError: sizes that are no multiples of the patch, see `VisionTransformer.grid`.
    """
    none = torch.zeros(len(images1), dtype=torch.bool, device=images1.device)
    portrait1, portrait2 = (none if p is None else p.bool() for p in (portrait1, portrait2))
    orders = (0, 1) if symmetric else (0,)
    results, rows = [], []
    for turned in itertools.product((False, True), repeat=2):
        chosen = ((portrait1 == turned[0]) & (portrait2 == turned[1])).nonzero().flatten()
        if not len(chosen):
            continue
        tokens = [
            encode(encoder, for_encoder(_turned(images[chosen], t, (2, 3)), encoder))
            for images, t in zip((images1, images2), turned, strict=True)
        ]
        for order in orders:
            views = (order, 1 - order)  # which image is view 1, which view 2
            outputs = head(*(tokens[i] for i in views))
            results.append([
                {name: _turned(x, turned[i], (1, 2)) for name, x in output.items()}
                for output, i in zip(outputs, views, strict=True)
            ])  # fmt: skip
            rows.append(chosen * len(orders) + order)
    back = torch.argsort(torch.cat(rows))
    view1, view2 = (
        {name: torch.cat([result[view][name] for result in results])[back] for name in results[0][view]}
        for view in (0, 1)
    )
    return view1, view2


def _turned(x: Tensor, turned: bool, dims: tuple[int, int]) -> Tensor:
    """Transposed where it is a portrait's."""
    return x.transpose(*dims) if turned else x
