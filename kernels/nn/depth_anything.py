"""Depth Anything: DINOv2's ViT, and a dense prediction head (DPT) that reads four of its blocks.

    next_i = conv_i(resize_i(project_i(LN(x_i))))              at 4, 2, 1 and 1/2 times the grid of patches
    fused = project(resize(residual2(fused + residual1(next))))  from the coarsest to the finest, then twice that
    feature = conv2(resize(conv1(fused)))                       at the resolution of the image, before ReLU and depth

    residual(x) = x + conv(relu(conv(relu(x))));  resize is bilinear with aligned corners
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.kernels.nn.block import product_dtype
from dune_fast.kernels.nn.patches import SharedPatches
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig


@dataclass
class DepthAnythingConfig(ViTConfig):
    """Architecture of a `DepthAnything`."""

    outputs: tuple[int, ...] = (8, 9, 10, 11)
    """Indices from 0 of the four blocks that the head reads."""
    neck: tuple[int, ...] = (96, 192, 384, 768)
    """Channels of the four maps."""
    fusion: int = 128
    """Channels of the fused map."""
    hidden: int = 64
    """Channels between the head's two convolutions."""
    features: int = 32
    """Channels of the feature."""


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


class Reassemble(nn.Module):
    """A map of tokens [B, D, h, w] to another width and, by `factor`, another resolution."""

    def __init__(self, dim: int, channels: int, factor: float) -> None:
        super().__init__()
        self.projection = nn.Conv2d(dim, channels, 1)
        if factor > 1:
            self.resize = nn.ConvTranspose2d(channels, channels, int(factor), stride=int(factor))
        elif factor < 1:
            self.resize = nn.Conv2d(channels, channels, 3, stride=int(1 / factor), padding=1)
        else:
            self.resize = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(self.projection(x))


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))). [B, C, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.convolution2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution2(F.relu(self.convolution1(F.relu(x))))


class Fusion(nn.Module):
    """Adds a finer map to the fused one, which has its size, and brings both to the next size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.residual_layer1 = Residual(channels)
        self.residual_layer2 = Residual(channels)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, fused: Tensor | None, x: Tensor, size: Sequence[int]) -> Tensor:
        x = self.residual_layer2(x if fused is None else fused + self.residual_layer1(x))
        return self.projection(_resized(x, size))


class DepthAnything(VisionTransformer):
    """Images [B, 3, H, W] -> the head's feature [B, 32, H, W] (patches of 14: H and W are multiples of it)."""

    cfg: DepthAnythingConfig

    def __init__(self, cfg: DepthAnythingConfig) -> None:
        super().__init__(cfg)
        pairs = zip(cfg.neck, (4, 2, 1, 0.5), strict=True)
        self.reassemble = nn.ModuleList(Reassemble(cfg.embed_dim, channels, factor) for channels, factor in pairs)
        self.convs = nn.ModuleList(nn.Conv2d(c, cfg.fusion, 3, padding=1, bias=False) for c in cfg.neck)
        self.fusion = nn.ModuleList(Fusion(cfg.fusion) for _ in cfg.neck)
        self.head = nn.ModuleDict(
            {
                "conv1": nn.Conv2d(cfg.fusion, cfg.hidden, 3, padding=1),
                "conv2": nn.Conv2d(cfg.hidden, cfg.features, 3, padding=1),
            }
        )

    def block_outputs(
        self, images: Tensor, blocks: Sequence[int], patches: SharedPatches | None = None
    ) -> dict[int, Tensor]:
        """{last block: the head's feature}; `blocks` is that one alone."""
        grid = self.grid(images)
        tokens = super().block_outputs(images, self.cfg.outputs, patches)
        maps = []
        for i, reassemble, conv in zip(self.cfg.outputs, self.reassemble, self.convs, strict=True):
            x = self.norm(tokens[i], out_dtype=product_dtype(tokens[i]))[:, self.num_prefix_tokens :]
            maps.append(conv(reassemble(x.transpose(1, 2).unflatten(2, grid))))
        sizes = [x.shape[-2:] for x in maps]
        fused = None
        for i, fusion in zip((3, 2, 1, 0), self.fusion, strict=True):
            fused = fusion(fused, maps[i], sizes[i - 1] if i else [2 * side for side in sizes[0]])
        feature = self.head["conv2"](_resized(self.head["conv1"](fused), images.shape[-2:]))
        return dict.fromkeys(blocks, feature)

    def forward(self, images: Tensor) -> Tensor:
        """The head's feature [B, 32, H, W]."""
        return self.block_outputs(images, [0])[0]
