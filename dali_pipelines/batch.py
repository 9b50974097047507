"""One rank's images of one step, as the loader gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ToDevice = Callable[[torch.device], tuple[dict[str, dict[str, Tensor]], Tensor | None]]
"""Features that were read, decoded on a device: `Batch.features` and `Batch.patches`."""


@dataclass(frozen=True)
class Batch:
    """One rank's images of one step; B of them; tensors are on the device."""

    images: Tensor
    """float32 [B, 3, S, S], augmented and normalised with ImageNet's mean and standard deviation."""
    positions: Tensor
    """int64 [B], global: the key of all randomness of an image. In validation: the index among all its images."""
    group: Tensor
    """int64 [B], index into the loader's `groups`."""
    dataset: Tensor
    """int64 [B], index into the loader's `dataset_names`."""
    paths: list[str]
    """Where each image came from, for messages."""
    step: int
    """Which step of training it belongs to; in validation the number of the batch."""
    group_on_host: np.ndarray | None = None
    """`group` where the host can look at it without waiting for the device."""
    views: np.ndarray | None = None
    """int64 [B], numbers of the images' fixed views, on the host; with `data.views`."""
    features: dict[str, dict[str, Tensor]] | None = None
    """teacher -> token type -> [B, ...] that a cache has of these views, on the device."""
    positions_on_host: np.ndarray | None = None
    """The same of `positions`."""
    patches: Tensor | None = None
    """int64 [B, n], the patches that `features` are of, where the cache has not kept all."""
    checksums: np.ndarray | None = None
    """int64 [B], `source.Encoded.checksum` of each image, on the host; with `data.views`."""

    teacher_views: dict[str, dict[str, Tensor]] | None = None
    """With `data.teacher_views`: crop -> "images", float32 [B, 3, T, T] like `images`, missing where no teacher looks
    at them; "transform", float32 [B, 3, 3], of the crop's points to the student's, see `kernels.nn.homography`;
    "valid", bool [B, T, T], where it shows the image. On the device."""
    part: int = 0
    """Which part of the step it is, where this rank works on several one after the other."""

    def __len__(self) -> int:
        return len(self.paths)
