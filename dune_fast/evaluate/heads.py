"""Linear heads for segmentation and depth on frozen patch tokens, and their losses: the recipes of DINOv2 and DUNE.

    segmentation:  logits = conv1x1(BatchNorm(patch))                                   [B, classes, h, w]
    depth:         p = relu(conv1x1(x4(concat(patch, cls)))) + 0.1,  depth = sum_k p_k bin_k / sum_k p_k
                   bins: 256 equal steps from 0.001 to the largest depth

The names of the parameters are those of the published files, without `decode_head`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = 255
"""Label of pixels that count neither in the loss nor in the metric."""
MIN_DEPTH = 0.001
"""Metres."""
DEPTH_BINS = 256
UPSAMPLING = 4
"""Of the token map, before the depth head's convolution."""
WARM_UP_STEPS = 100
"""Steps in which the depth loss leaves out its variance."""
_LOSS_EPS = 0.001
_STEPS = (1, 2, 4, 6)  # of the gradient loss

Layer = tuple[Tensor, Tensor | None]
"""Tokens of one block: patches [B, C, h, w] and cls [B, C], None where the network has none."""


class LinearSegmentation(nn.Module):
    """BatchNorm and a 1x1 convolution. Patch tokens [B, C, h, w] -> logits [B, classes, h, w].

    Args:
        channels: C.
        classes: number of classes.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1)
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, layers: Sequence[Layer]) -> Tensor:
        return self.conv_seg(self.bn(torch.cat([patch for patch, _ in layers], 1)))


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits, resized to the labels; the mean is over all pixels, ignored ones contribute 0.

    Args:
        logits: [B, classes, h, w].
        labels: int64 [B, H, W].
    """
    resized = resize(logits, labels.shape[-2:])
    return F.cross_entropy(resized, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()


class LinearDepth(nn.Module):
    """A 1x1 convolution to weights of depth bins. One or several blocks' tokens -> depth [B, 1, 4 h, 4 w] in metres.

    Args:
        channels: C of a block's tokens.
        layers: how many blocks.
        with_cls: whether each patch token is concatenated with its block's cls token.
        max_depth: the last bin, metres.
    """

    def __init__(self, channels: int, layers: int = 1, with_cls: bool = True, max_depth: float = 10.0) -> None:
        super().__init__()
        self.max_depth = max_depth
        self.conv_depth = nn.Conv2d(channels * (1 + with_cls) * layers, DEPTH_BINS, 1)
        self.register_buffer("bins", torch.linspace(MIN_DEPTH, max_depth, DEPTH_BINS), persistent=False)

    def forward(self, layers: Sequence[Layer]) -> Tensor:
        maps = []
        for patch, cls in layers:
            maps.append(patch)
            if cls is not None:
                maps.append(cls[:, :, None, None].expand_as(patch))
        x = torch.cat(maps, 1)  # [B, layers * 2C, h, w]
        x = resize(x, (x.shape[2] * UPSAMPLING, x.shape[3] * UPSAMPLING))
        weights = self.conv_depth(x).relu() + 0.1
        weights = weights / weights.sum(1, keepdim=True)
        return torch.einsum("bkhw,k->bhw", weights, self.bins)[:, None]


def depth_loss(prediction: Tensor, truth: Tensor, warm_up: bool = False) -> Tensor:
    """sqrt(var(g) + 0.15 mean(g)^2), g = log(prediction + 0.001) - log(truth + 0.001) over pixels with a truth.

    Args:
        prediction: [B, 1, h, w], resized to the truth here.
        truth: [B, 1, H, W], metres; 0 where it is not known.
        warm_up: leave the variance out, as in the first `WARM_UP_STEPS` steps.
    """
    prediction, valid = resize(prediction, truth.shape[-2:]), truth > 0
    if valid.sum() < 2:  # no variance
        return 0 * prediction.sum()
    g = torch.log(prediction[valid] + _LOSS_EPS) - torch.log(truth[valid] + _LOSS_EPS)
    mean = 0.15 * g.mean().square()
    return torch.sqrt(mean if warm_up else g.var() + mean)


def depth_gradient_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    """Differences of the log error between pixels two apart, on four scales, of one map; the recipe's weight is 0.5.

    The published recipe has it, but its code gives 0 for at most two images a GPU, which is its setting; so the
    evaluation leaves it out.

    Args:
        prediction, truth: [H, W], metres; a truth of 0 is not known.
    """
    total = prediction.new_zeros(())
    for step in _STEPS:
        p, t = prediction[::step, ::step], truth[::step, ::step]
        valid = t > 0
        g = torch.where(valid, torch.log(p + _LOSS_EPS) - torch.log(torch.where(valid, t, 1) + _LOSS_EPS), 0)
        down = (g[:-2] - g[2:]).abs() * (valid[:-2] & valid[2:])
        right = (g[:, :-2] - g[:, 2:]).abs() * (valid[:, :-2] & valid[:, 2:])
        total = total + (down.sum() + right.sum()) / valid.sum()
    return total


def resize(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear, no aligned corners. [B, C, h, w] -> [B, C, *size]."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
