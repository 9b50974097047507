"""What every export must pass: read back independently, it computes what ours does, at every size it promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dune_fast.kernels.nn.vit import VisionTransformer

LIMIT = 1e-4
"""Largest difference over the largest value, per output. float32 in another order of summation differs by about 1e-6;
a wrong mapping by more than 1e-2."""

Outputs = Mapping[str, Tensor]
Reader = Callable[[Tensor], Outputs]
"""images [B, 3, H, W] -> name -> tensor."""


class ExportError(ValueError):
    """The model cannot be exported to this format, or the export does not compute what the model does."""


def random_images(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Normal noise, [batch, 3, height, width], as ImageNet-normalised images are about."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def sizes(encoder: VisionTransformer, native_only: bool) -> list[tuple[int, int, int]]:
    """(batch, height, width) to compare at: the native size, then a larger and a smaller grid of other shapes."""
    side, patch = encoder.cfg.image_size, encoder.cfg.patch_size
    native = [(2, side, side), (1, side, side)]
    others = [(1, side + patch, side), (3, max(patch, side // patch // 2 * patch), side)]
    return native if native_only else native + others


def encoder_outputs(encoder: VisionTransformer, images: Tensor) -> dict[str, Tensor]:
    """Ours: `VisionTransformer.forward` and, under "tokens", all normed tokens [B, P + N, D] in their order."""
    features = encoder(images)
    return {**features, "tokens": encoder.norm(features["x_prenorm"])}


def compare(reader: Reader, reference: Reader, shapes: list[tuple[int, int, int]], what: str) -> float:
    """Runs an export that was read back, and ours, on random images of these shapes (batch, height, width).

    Returns:
        The largest difference over the largest value of its output. `reference` may have more outputs than `reader`.

    Raises:
        ExportError: above LIMIT, another shape, or not a number; `what` names the export.
    """
    worst = 0.0
    for i, shape in enumerate(shapes):
        images = random_images(*shape, seed=i)
        with torch.no_grad():
            theirs, ours = reader(images), reference(images)
        for name, value in theirs.items():
            if value.shape != ours[name].shape:
                raise ExportError(
                    f"the {what} export is wrong and was removed: {name} has shape {list(value.shape)} where ours has "
                    f"{list(ours[name].shape)}, on images {list(images.shape)}"
                )
            if not value.numel():  # registers of an encoder without any
                continue
            wanted = ours[name].double()
            difference = float((value.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
            if not difference <= LIMIT:  # NaN is not below it either
                raise ExportError(
                    f"the {what} export is wrong and was removed: read back, {name} differs by {difference:.1e} of its "
                    f"largest value on images {list(images.shape)}; at most {LIMIT:.0e} is allowed"
                )
            worst = max(worst, difference)
    return worst
