"""Linear depth, the recipe of DINOv2 and DUNE.

    p = relu(conv1x1(x4(concat(patch, cls)))) + 0.1,  depth = sum_k p_k bin_k / sum_k p_k
    bins: 256 equal steps from 0.001 to the largest depth
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dune_fast.heads.head import HeadError
from dune_fast.heads.linear.layers import Layer, LinearHead, resize

MIN_DEPTH = 0.001
"""Metres."""
DEPTH_BINS = 256
UPSAMPLING = 4
"""Of the token map, before the convolution."""
WARM_UP_STEPS = 100
"""Steps in which the loss leaves out its variance."""
_LOSS_EPS = 0.001
_STEPS = (1, 2, 4, 6)  # of the gradient loss


class DepthHead(LinearHead):
    """A 1x1 convolution to weights of depth bins. Tokens before the final norm -> [B, 1, 4 rows, 4 columns], metres.

    Args:
        width: channels of a token.
        patch_size: of the encoder.
        layers: 1 for the last block, 4 for DINOv2's four.
        with_cls: whether each patch token is concatenated with its block's cls token.
        max_depth: the last bin, metres.
        projector: the teacher whose projector's output it reads in place of the encoder's; "" for none.
        cls_width: channels of the cls token where it has not the patches', as RADIO's summaries.

    Raises:
        HeadError: other `layers`, or a `max_depth` that is not above 0.001 m.
    """

    kind = "linear_depth"
    normalised = False

    def __init__(
        self,
        width: int,
        patch_size: int = 14,
        layers: int = 1,
        with_cls: bool = True,
        max_depth: float = 10.0,
        projector: str = "",
        cls_width: int | None = None,
    ) -> None:
        super().__init__(width, patch_size, layers, (cls_width or width) if with_cls else 0, projector)
        if not MIN_DEPTH < max_depth < float("inf"):
            raise HeadError(f"max_depth is {max_depth}: give metres, above {MIN_DEPTH}")
        self.max_depth = max_depth
        self.conv_depth = nn.Conv2d((width + self.cls_width) * layers, DEPTH_BINS, 1)

    def options(self) -> dict[str, Any]:
        found = super().options() | {"with_cls": self.cls_width > 0, "max_depth": self.max_depth}
        return found | ({"cls_width": self.cls_width} if self.cls_width not in (0, self.width) else {})

    def from_layers(self, layers: Sequence[Layer]) -> Tensor:
        """Depth [B, 1, 4 h, 4 w] in metres of maps [B, C, h, w] and cls tokens [B, C']."""
        maps = []
        for patch, cls in layers:
            maps.append(patch)
            if self.cls_width and cls is not None:
                maps.append(cls[:, :, None, None].expand(-1, -1, *patch.shape[2:]))
        x = torch.cat(maps, 1)  # [B, layers * (C + C'), h, w]
        x = resize(x, (x.shape[2] * UPSAMPLING, x.shape[3] * UPSAMPLING))
        weights = self.conv_depth(x).relu() + 0.1
        weights = weights / weights.sum(1, keepdim=True)
        bins = torch.linspace(MIN_DEPTH, self.max_depth, DEPTH_BINS).to(x.device)  # the CPU's values on every device
        return torch.einsum("bkhw,k->bhw", weights, bins)[:, None]


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
