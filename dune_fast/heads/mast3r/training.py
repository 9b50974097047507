"""A batch of pairs through a frozen encoder and the head, as it is trained: every pair in both orders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dune_fast.heads.tokens import EncoderTokens
from dune_fast.kernels.augment import augment_colour
from dune_fast.kernels.colour_params import ColourParams

Outputs = tuple[dict[str, Tensor], dict[str, Tensor]]
"""What `Mast3rHead.forward` gives."""


def coloured(view: Mapping[str, Tensor]) -> Tensor:
    """The images of a view with their colours jittered, normalised as ImageNet's: [B, 3, H, W]."""
    return augment_colour(view["image"], ColourParams.unpack(view["colours"]))


def both_orders_outputs(
    head: Callable[[EncoderTokens, EncoderTokens], Outputs], encoder: Callable[[Tensor], EncoderTokens],
    images1: Tensor, images2: Tensor, groups: list[tuple[bool, bool, int, int]],
) -> Outputs:  # fmt: skip
    """Outputs of B pairs, then of the same pairs with the views swapped: 2B, as `truth` has them.

    The encoder runs once for each image, and the head once for pairs that stand alike; nothing waits for the device.

    Args:
        head, encoder: the encoder's tokens come without gradient.
        images1, images2: normalised [B, 3, H, W], stored landscape.
        groups: of `pairs.collate`: (portrait 1, portrait 2, first, last + 1).

    Returns:
        See `Mast3rHead.forward`; maps as they are stored.
    """
    orders: tuple[list[Outputs], list[Outputs]] = ([], [])
    for portrait1, portrait2, first, last in groups:
        count = last - first
        one, two = _turned(images1[first:last], portrait1, (2, 3)), _turned(images2[first:last], portrait2, (2, 3))
        if portrait1 == portrait2:
            tokens = encoder(torch.cat([one, two]))
            swapped = torch.arange(2 * count, device=one.device).roll(count)
            results = [_split(part, count) for part in head(tokens, tokens.images(swapped))]
            found = [(results[0][i], results[1][i]) for i in (0, 1)]
        else:
            tokens1, tokens2 = encoder(one), encoder(two)
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
