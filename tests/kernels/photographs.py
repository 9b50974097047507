"""Random images and parameters for the tests of the colour augmentation."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dune_fast.kernels.augment import ColourParams

ORDERS = torch.tensor(list(itertools.permutations(range(4))))


def random_images(batch: int, height: int, width: int, dtype=torch.uint8, device="cpu") -> Tensor:
    """uint8 [B, H, W, 3] or float [B, 3, H, W]; the first begins with gray, black, white and saturated pixels."""
    images = torch.randint(0, 256, (batch, height, width, 3), generator=torch.Generator().manual_seed(batch))
    if batch:
        colours = [[128, 128, 128], [0, 0, 0], [255, 255, 255], [255, 0, 255], [7, 7, 8]]
        images[0, 0, :5] = torch.tensor(colours)
    if dtype == torch.uint8:
        return images.to(device, dtype)
    return (images.permute(0, 3, 1, 2) / 255).contiguous().to(device, dtype)


def random_params(batch: int, device="cpu", blur: list[bool] | None = None) -> ColourParams:
    """Of every kind; the first image is left alone, `blur` says who is blurred."""
    g = torch.Generator().manual_seed(batch)

    def u(low, high):
        return torch.empty(batch).uniform_(low, high, generator=g)

    blurred = (u(0, 1) < 0.5) if blur is None else torch.tensor(blur)
    params = ColourParams(
        ORDERS[torch.arange(batch) % 24], u(0.6, 1.4), u(0.6, 1.4), u(0.0, 2.0), u(-0.5, 0.5),
        u(0, 1) < 0.2, blurred, u(0.1, 5.0), u(0, 1) < 0.5,
    )  # fmt: skip
    packed = params.pack()
    packed[:1] = ColourParams.identity(1).pack()
    return ColourParams.unpack(packed).to(torch.device(device))
