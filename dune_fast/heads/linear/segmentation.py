"""Linear segmentation, the recipe of DINOv2 and DUNE: logits = conv1x1(BatchNorm(patch))."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.heads.head import HeadError
from dune_fast.heads.linear.layers import Layer, LinearHead, check_whole, resize

IGNORED = 255
"""Label of pixels that count neither in the loss nor in the metric."""


class SegmentationHead(LinearHead):
    """BatchNorm and a 1x1 convolution. Patch tokens after the final norm -> logits [B, classes, rows, columns].

    Args:
        width: channels of a token.
        classes: number of classes.
        patch_size: of the encoder.
        layers: 1 for the last block, 4 for DINOv2's four.
        names: of the classes, where they are known.
        window, stride: of the sliding windows that it was trained for, in pixels; the image's short side is a window.
        projector: the teacher whose projector's output it reads in place of the encoder's; "" for none.
        last_blocks: whether four layers are the last four blocks, as in DINOv2's multi-scale heads.

    Raises:
        HeadError: other `layers`, names that are not one a class, or a count that is not above 0.
    """

    kind = "linear_seg"
    normalised = True

    def __init__(
        self,
        width: int,
        classes: int,
        patch_size: int = 14,
        layers: int = 1,
        names: Sequence[str] = (),
        window: int = 512,
        stride: int = 341,
        projector: str = "",
        last_blocks: bool = False,
    ) -> None:
        super().__init__(width, patch_size, layers, 0, projector)
        check_whole(classes=classes, window=window, stride=stride)
        if names and len(names) != classes:
            raise HeadError(f"{len(names)} names for {classes} classes: give one each, in the order of the labels")
        self.last_blocks = bool(last_blocks)
        self.classes, self.names, self.window, self.stride = classes, tuple(map(str, names)), window, stride
        self.bn = nn.BatchNorm2d(width * layers, eps=1e-5, momentum=0.1)
        self.conv_seg = nn.Conv2d(width * layers, classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def options(self) -> dict[str, Any]:
        own = {"classes": self.classes, "names": list(self.names), "window": self.window, "stride": self.stride}
        return super().options() | own | ({"last_blocks": True} if self.last_blocks else {})

    def from_layers(self, layers: Sequence[Layer]) -> Tensor:
        """Logits [B, classes, h, w] of patch maps [B, C, h, w]."""
        return self.conv_seg(self.bn(torch.cat([patch for patch, _ in layers], 1)))


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits, resized to the labels; the mean is over all pixels, ignored ones contribute 0.

    Args:
        logits: [B, classes, h, w].
        labels: int64 [B, H, W].
    """
    resized = resize(logits, labels.shape[-2:])
    return F.cross_entropy(resized, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()
