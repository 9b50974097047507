"""A batch of pairs through a frozen encoder and the head, as it is trained: every pair in both orders."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dune_fast.heads.tokens import EncoderTokens, joined
from dune_fast.kernels.augment import augment_colour
from dune_fast.kernels.colour_params import ColourParams

Outputs = tuple[dict[str, Tensor], dict[str, Tensor]]
"""What `Mast3rHead.forward` gives."""


class KeptTokens:
    """An encoder of views whose image is always the same: each view is encoded when it is first asked for, and kept.

    A view is encoded alone, so that its tokens do not depend on the order in which views come.
    """

    def __init__(self) -> None:
        self._of: dict[Hashable, EncoderTokens] = {}

    def __call__(
        self, encoder: Callable[[Tensor], EncoderTokens], images: Tensor, views: Sequence[Hashable]
    ) -> EncoderTokens:
        """Tokens of images [B, 3, H, W], of the views of these names."""
        for image, view in zip(images, views, strict=True):
            if view not in self._of:
                self._of[view] = encoder(image[None])
        return joined([self._of[view] for view in views])


def coloured(view: Mapping[str, Tensor]) -> Tensor:
    """The images of a view with their colours jittered, normalised as ImageNet's: [B, 3, H, W]."""
    return augment_colour(view["image"], ColourParams.unpack(view["colours"]))


def both_orders_outputs(
    head: Callable[[EncoderTokens, EncoderTokens], Outputs],
    encoder: Callable[[Tensor, Sequence[Hashable]], EncoderTokens],
    images1: Tensor, images2: Tensor, groups: list[tuple[bool, bool, int, int]],
    views: Sequence[tuple[Hashable, Hashable]],
) -> Outputs:  # fmt: skip
    """Outputs of B pairs, then of the same pairs with the views swapped: 2B, as `truth` has them.

    The encoder runs once for each image, and the head once for pairs that stand alike; nothing waits for the device.

    Args:
        head: of a pair's tokens.
        encoder: of images and their names, each a view's and whether it is turned; its tokens come without gradient.
        images1, images2: normalised [B, 3, H, W], stored landscape.
        groups: of `pairs.collate`: (portrait 1, portrait 2, first, last + 1).
        views: names of both views of each pair.

    Returns:
        See `Mast3rHead.forward`; maps as they are stored.
    """
    orders: tuple[list[Outputs], list[Outputs]] = ([], [])
    for portrait1, portrait2, first, last in groups:
        count = last - first
        one, two = _turned(images1[first:last], portrait1, (2, 3)), _turned(images2[first:last], portrait2, (2, 3))
        names1, names2 = (
            [(pair[v], turned) for pair in views[first:last]] for v, turned in enumerate((portrait1, portrait2))
        )
        if portrait1 == portrait2:
            tokens = encoder(torch.cat([one, two]), [*names1, *names2])
            swapped = torch.arange(2 * count, device=one.device).roll(count)
            results = [_split(part, count) for part in head(tokens, tokens.images(swapped))]
            found = [(results[0][i], results[1][i]) for i in (0, 1)]
        else:
            tokens1, tokens2 = encoder(one, names1), encoder(two, names2)
            found = [head(tokens1, tokens2), head(tokens2, tokens1)]
        for order, outputs in enumerate(found):
            turned = (portrait2, portrait1) if order else (portrait1, portrait2)
            orders[order].append(
                tuple({name: _turned(x, t, (1, 2)) for name, x in output.items()}
                      for output, t in zip(outputs, turned, strict=True))
            )  # fmt: skip
    every = [*orders[0], *orders[1]]
    return tuple({name: torch.cat([outputs[v][name] for outputs in every]) for name in every[0][v]} for v in (0, 1))


def _split(outputs: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    return [{name: x[part] for name, x in outputs.items()} for part in (slice(count), slice(count, None))]


def _turned(x: Tensor, turned: bool, dims: tuple[int, int]) -> Tensor:
    return x.transpose(*dims) if turned else x


def truth(batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the losses need of a batch of `pairs.collate`, in both orders."""
    names = ("pts3d", "valid_mask", "sky_mask", "camera_pose", "is_metric_scale", "corres", "valid_corres")
    views = [{name: batch[view][name] for name in names} for view in ("view1", "view2")]
    return tuple(
        {name: torch.cat([first[name], second[name]]) for name in names} for first, second in (views, views[::-1])
    )
