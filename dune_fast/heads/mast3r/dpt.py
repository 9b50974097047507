"""The dense prediction head of MASt3R: decoder tokens of four depths to one map, from coarse to fine.

Ranftl et al., "Vision Transformers for Dense Prediction", ICCV 2021. For tokens on a grid h x w of patches of p pixels:

    four token maps -> 4h x 4w, 2h x 2w, h x w, ceil(h/2) x ceil(w/2) -> refinenet4 .. refinenet1 -> 8h x 8w -> ph x pw

Names of parameters are those of the releases, which also hold a first unit of refinenet4 that nothing uses, and the
four tensors of `layer_rn` a second time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def hooks(depth: int) -> tuple[int, int, int, int]:
    """Which of the decoder's depth + 1 outputs of a view the head reads."""
    return 0, depth // 2, depth * 3 // 4, depth


class ResidualConvUnit(nn.Module):
    """x + conv2(relu(conv1(relu(x)))), 3 x 3. x: [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Adds a finer map and gives twice the resolution: [B, C, H, W] -> [B, C, 2H, 2W]."""

    def __init__(self, channels: int, two_inputs: bool = True) -> None:
        super().__init__()
        if two_inputs:
            self.resConfUnit1 = ResidualConvUnit(channels)
        self.resConfUnit2 = ResidualConvUnit(channels)
        self.out_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:
        """`finer`: of the same shape as x."""
        if finer is not None:
            x = x + self.resConfUnit1(finer)
        x = self.resConfUnit2(x)
        size = (2 * x.shape[-2], 2 * x.shape[-1])
        return self.out_conv(F.interpolate(x, size, mode="bilinear", align_corners=True))


class Scratch(nn.Module):
    """The four maps to a common number of channels, and their fusion."""

    def __init__(self, layer_dims: Sequence[int], channels: int) -> None:
        super().__init__()
        self.layer_rn = nn.ModuleList(nn.Conv2d(dim, channels, 3, padding=1, bias=False) for dim in layer_dims)
        self.refinenet1, self.refinenet2, self.refinenet3 = (Fusion(channels) for _ in range(3))
        self.refinenet4 = Fusion(channels, two_inputs=False)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps from fine to coarse, see the top of this file -> [B, channels, 8h, 8w]."""
        r0, r1, r2, r3 = (conv(x) for conv, x in zip(self.layer_rn, maps, strict=True))
        x = self.refinenet4(r3)[..., : r2.shape[-2], : r2.shape[-1]]  # an odd grid has been rounded up
        x = self.refinenet3(x, r2)
        x = self.refinenet2(x, r1)
        return self.refinenet1(x, r0)


class Interpolate(nn.Module):
    """Bilinear, corners on corners: [B, C, 8h, 8w] -> [B, C, ph, pw]."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        size = [side // 8 * self.patch_size for side in x.shape[-2:]]
        return F.interpolate(x, size, mode="bilinear", align_corners=True)


class DPT(nn.Module):
    """Tokens of the encoder and of three depths of the decoder to a map of the image's size.

    Args:
        widths: channels of the four token sequences, the encoder's first.
        patch_size: p, in pixels.
        out_channels: of the map.
        layer_dims: channels of the four maps before they are fused.
        feature_dim: channels while they are fused.
        last_dim: channels of the last hidden map.
    """

    def __init__(
        self, widths: Sequence[int], patch_size: int, out_channels: int = 4,
        layer_dims: Sequence[int] = (96, 192, 384, 768), feature_dim: int = 256, last_dim: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        d0, d1, _, d3 = layer_dims
        first = [nn.Conv2d(width, dim, 1) for width, dim in zip(widths, layer_dims, strict=True)]
        second = (
            [nn.ConvTranspose2d(d0, d0, 4, stride=4)], [nn.ConvTranspose2d(d1, d1, 2, stride=2)], [],
            [nn.Conv2d(d3, d3, 3, stride=2, padding=1)],
        )  # fmt: skip
        self.act_postprocess = nn.ModuleList(nn.Sequential(a, *b) for a, b in zip(first, second, strict=True))
        self.scratch = Scratch(layer_dims, feature_dim)
        self.head = nn.Sequential(
            nn.Conv2d(feature_dim, last_dim, 3, padding=1),
            Interpolate(patch_size),
            nn.Conv2d(last_dim, last_dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(last_dim, out_channels, 1),
        )

    def forward(self, tokens: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """The four sequences [B, h * w, width], row-major on `grid` = (h, w) -> [B, out_channels, ph, pw]."""
        maps = [x.transpose(1, 2).unflatten(2, grid) for x in tokens]
        return self.head(self.scratch([layer(x) for layer, x in zip(self.act_postprocess, maps, strict=True)]))
