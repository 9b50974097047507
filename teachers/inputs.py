"""A teacher's own input: images at a size of its own, whole or several on one canvas, and its tokens back again.

    own size   the longer side becomes so many pixels; what is left of the square on the right and below is zeros
    mosaic     k x k images on a canvas of c x c pixels, each at the top left of its tile, zeros between them:
               k = (c / p) // (o / p),   tile = c // k, down to whole patches       o: side of an image, p: of a patch

A mosaic lets a network that is made for large images look at several small ones in one pass (RADIOv2.5: 432 px, 2 x 2
of them on SAM's 1024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width of an image of `size` (h, w) whose longer side becomes `side` pixels."""
    scale = side / max(size)
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def fit_longest(images: Tensor, side: int, antialias: bool = False) -> Tensor:
    """Images [B, 3, H, W] as a square of `side` pixels: resized (bicubic), zeros on the right and below.

    Zeros are the padding of images that are normalised already.
    """
    size = fitted((images.shape[-2], images.shape[-1]), side)
    if size != tuple(images.shape[-2:]):
        images = F.interpolate(images, size=size, mode="bicubic", antialias=antialias)
    return F.pad(images, (0, side - size[1], 0, side - size[0])) if size != (side, side) else images


class Mosaic(NamedTuple):
    """How images of `image` pixels a side lie on canvases of `canvas` pixels, for a network of patches of `patch`."""

    image: int
    canvas: int
    patch: int

    @property
    def per_side(self) -> int:
        """Images in a row of a canvas, and in a column; 0 where not even one fits."""
        return (self.canvas // self.patch) // (self.image // self.patch)

    @property
    def tile(self) -> int:
        """Side of an image's place in pixels, whole patches."""
        return self.canvas // self.per_side // self.patch * self.patch

    def canvases(self, images: int) -> int:
        """How many canvases so many images take."""
        return -(-images // self.per_side**2)

    def pack(self, images: Tensor) -> Tensor:
        """Images [B, 3, o, o] on canvases [ceil(B / k^2), 3, c, c]: image i on canvas i // k^2, tile by tile."""
        k, tile = self.per_side, self.tile
        count = self.canvases(len(images))
        padded = F.pad(images, (0, tile - self.image, 0, tile - self.image, 0, 0, 0, count * k * k - len(images)))
        rows = padded.unflatten(0, (count, k, k)).permute(0, 3, 1, 4, 2, 5)  # [n, 3, k, tile, k, tile]
        rest = self.canvas - k * tile
        return F.pad(rows.flatten(4, 5).flatten(2, 3), (0, rest, 0, rest))

    def unpack(self, features: Tensor, images: int) -> Tensor:
        """Maps [n, C, c / p, c / p] of canvases as those of B images, [B, C, o / p, o / p]."""
        k, cells, own = self.per_side, self.tile // self.patch, self.image // self.patch
        tiles = features[:, :, : k * cells, : k * cells].unflatten(3, (k, cells)).unflatten(2, (k, cells))
        return tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)[:images, :, :own, :own]

    def repeat(self, summary: Tensor, images: int) -> Tensor:
        """What the network says of whole canvases, [n, C], for each of their images, [B, C]."""
        return summary.repeat_interleave(self.per_side**2, dim=0)[:images]

    def __call__(self, tokens: dict[str, Tensor], images: int) -> dict[str, Tensor]:
        """{"cls": [n, C], "patch": [n, N, C]} of canvases as those of B images."""
        found = {}
        for kind, x in tokens.items():
            if kind == "cls":
                found[kind] = self.repeat(x, images)
            else:
                side = self.canvas // self.patch
                planes = self.unpack(x.transpose(1, 2).unflatten(2, (side, side)), images)
                found[kind] = planes.flatten(2).transpose(1, 2).contiguous()
        return found


def on_grid(patch: Tensor, grid: tuple[int, int], shown: tuple[float, float], wanted: tuple[int, int]) -> Tensor:
    """Patch tokens of a grid h x w bilinearly on another one, cells over cells.

    Args:
        patch: [n, h w, C].
        grid: (h, w).
        shown: the rows and columns of it, from the top left, that show the image: what the other grid is laid over.
        wanted: (h', w').

    Returns:
        [n, h' w', C], contiguous.
    """
    planes = patch.transpose(1, 2).unflatten(2, grid)  # [n, C, h, w], channels last
    if shown == grid:
        found = F.interpolate(planes, size=wanted, mode="bilinear", align_corners=False)
    else:
        y, x = (
            ((torch.arange(n, device=patch.device) + 0.5) / n * part).clamp_max(math.ceil(part) - 0.5) / whole * 2 - 1
            for n, part, whole in zip(wanted, shown, grid, strict=True)
        )
        at = torch.stack([x.expand(wanted), y[:, None].expand(wanted)], dim=-1).to(planes.dtype)
        at = at.expand(len(planes), -1, -1, -1)
        found = F.grid_sample(planes, at, mode="bilinear", padding_mode="border", align_corners=False)
    return found.flatten(2).transpose(1, 2).contiguous()


class Layout(NamedTuple):
    """How a teacher's tokens lie over an image."""

    grid: tuple[int, int]
    """Rows and columns of an image's tokens."""
    shown: tuple[float, float]
    """Of these, from the top left, those that show the picture; less where it does not fill the image."""
    mosaic: Mosaic | None = None
    """Where several images go into the network as one."""

    @property
    def network_grid(self) -> tuple[int, int]:
        """Rows and columns of what the network gives."""
        return self.grid if self.mosaic is None else (self.mosaic.canvas // self.mosaic.patch,) * 2

    def of_images(self, tokens: dict[str, Tensor], images: int) -> dict[str, Tensor]:
        """The network's tokens as those of so many images."""
        return tokens if self.mosaic is None else self.mosaic(tokens, images)

    def laid(self, tokens: Mapping[str, Tensor], wanted: tuple[int, int]) -> dict[str, Tensor]:
        """Patch tokens on another grid over the picture; cls tokens as they are."""
        if "patch" not in tokens or self.grid == self.shown == wanted:
            return dict(tokens)
        return {**tokens, "patch": on_grid(tokens["patch"], self.grid, self.shown, wanted)}
