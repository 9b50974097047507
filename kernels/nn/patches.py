"""Patch embedding as one matrix product: every patch is a row of pixels, the convolution's weight a matrix.

    tokens[b, n] = W pixels[b, n] + bias,   pixels [B, N, K],   K = 3 p^2, on a GPU rounded up to a multiple of 16

For p = 14 a row has 588 pixels, and rows of bf16 begin on multiples of 8 bytes; with 592, the last four of them zeros,
a GPU loads 16 bytes at a time. The weight's gradient is a product too, without a convolution's atomic additions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.kernels.library import use_triton
from dune_fast.kernels.nn.block import product_dtype

_ALIGNMENT = 16
"""Values that a row of pixels is padded to a multiple of on a GPU."""


def unfold(images: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    """The pixels of every patch, in one pass over images [B, 3, H, W] of any strides: [B, H/p * W/p, K].

    H and W are multiples of p, the patch size in pixels. Patches are row-major, in each the pixels in the order of a
    convolution's kernel [3, p, p], then zeros.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    used = channels * patch_size**2
    padding = -used % _ALIGNMENT if use_triton(images) else 0
    pixels = images.new_empty(batch, rows, columns, used + padding, dtype=dtype)
    grid = images.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))  # [B, 3, rows, p, columns, p]
    kernel = (channels, patch_size, patch_size)
    pixels[..., :used].unflatten(-1, kernel).copy_(grid.permute(0, 2, 4, 1, 3, 5))
    if padding:
        pixels[..., used:] = 0
    return pixels.flatten(1, 2)


class SharedPatches:
    """Unfolds the images of one step once for all networks that see the same tensor with patches of the same size.

    It lives for one step: the images may not change meanwhile, and it keeps what it has unfolded.
    """

    def __init__(self) -> None:
        self._unfolded: list[tuple[Tensor, int, Tensor]] = []

    def __call__(self, images: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
        """`unfold(images, patch_size, dtype)`."""
        for seen, size, pixels in self._unfolded:
            if seen is images and size == patch_size and pixels.dtype == dtype:
                return pixels
        pixels = unfold(images, patch_size, dtype)
        self._unfolded.append((images, patch_size, pixels))
        return pixels


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each. images: [B, 3, H, W] -> [B, H/p * W/p, D], row-major.

    Weight and bias have a convolution's names and shapes, as in every release.
    """

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor, patches: SharedPatches | None = None) -> Tensor:
        """`patches`: where other networks of this step find the same pixels."""
        pixels = (patches or unfold)(images, self.patch_size, product_dtype(images))
        kernel, bias = self.projection()
        weight = kernel.flatten(1).to(pixels.dtype)
        if padding := pixels.shape[-1] - weight.shape[1]:
            weight = F.pad(weight, (0, padding))
        return F.linear(pixels, weight, bias)

    def projection(self) -> tuple[Tensor, Tensor | None]:
        """The kernel [D, 3, p, p] and the bias [D] that images of this call are multiplied by."""
        return self.proj.weight, self.proj.bias
