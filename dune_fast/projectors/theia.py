"""Theia's translators (Shang et al., Theia, CoRL 2024): from the student's patches to a teacher's map on its own grid.

    lconv        LN, two convolutions with ReLU and LN, Linear; the paper's, and of all released models
    conv         a shared adapter of the tokens, then as lconv, with a convolution in place of Linear
    mlp          the shared adapter, the nearest tokens of the teacher's grid, then an MLP
    transformer  the shared adapter, a shared decoder whose queries say which teacher is wanted, then an MLP

Between grids of s x s and t x t patches, by convolutions of these strides:

    14 -> 16 first, transposed, where the teacher's grid is larger (conv: always)
    s = t    1, 1          16 -> 64   2, 2, transposed          64 -> 16   2, 2          14 -> 7   2

Every LayerNorm of a map is over all its numbers [C, H, W] with weights for each, so a translator is for one size of
images. Weights start as PyTorch's layers do. Parameter names behind `patch.` are those of the releases.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRANSLATORS = ("lconv", "conv", "mlp", "transformer")
UPSCALED = {14: 16}
"""Grids that a transposed convolution enlarges before the others."""


class ToMap(nn.Module):
    """Tokens [B, side^2, C], row-major, to a map [B, C, side, side]."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, (self.side, self.side))


class ToTokens(nn.Module):
    """A map [B, C, H, W] to tokens [B, H * W, C], row-major."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


def convolutions(channels: int, hidden: int, source: int, target: int) -> list[tuple[nn.Module, int]] | None:
    """The convolutions from a grid to another, each with the side of its map; None where there are none."""
    if source == target:
        return [(nn.Conv2d(c, hidden, 3, padding=1), source) for c in (channels, hidden)]
    if (source, target) == (16, 64):
        first = nn.ConvTranspose2d(channels, hidden, 3, stride=2, padding=1)
        return [(first, 31), (nn.ConvTranspose2d(hidden, hidden, 3, stride=2, output_padding=1), 64)]
    if (source, target) == (64, 16):
        return [(nn.Conv2d(c, hidden, 3, stride=2, padding=1), side) for c, side in ((channels, 32), (hidden, 16))]
    if (source, target) == (14, 7):
        return [(nn.Conv2d(channels, hidden, 4, stride=2, padding=1), 7)]
    return None


class ConvHead(nn.Module):
    """Patches [B, s^2, D] to [B, t^2, C] by convolutions; the last layer is linear, or a convolution of the map.

    ValueError for a pair of grids that there are no convolutions for.
    """

    def __init__(
        self, input_dim: int, hidden: int, output_dim: int, source: int, target: int, linear: bool = True
    ) -> None:
        super().__init__()
        enlarged = UPSCALED.get(source, source)
        pads = enlarged != source and (target >= enlarged or not linear)
        side = enlarged if pads else source
        layers = convolutions(input_dim, hidden, side, target)
        if layers is None or (source < 16 and not linear and not pads):
            raise ValueError(
                f"projector.translator={'lconv' if linear else 'conv'} has no convolutions from {source} x {source} "
                f"patches to {target} x {target}: "
                + ("from 14 they go to 7, 16 and 64, and " if linear else "from 14 they go to 16 and 64, and ")
                + "from 16 to 64, from 64 to 16, and between equal grids"
                + (". " if linear else " of at least 16. ")
                + "Choose student.image_size and the teacher's grid for one of these, or projector.translator=mlp, "
                "which takes any"
            )
        self.pad = nn.Sequential(ToMap(source))
        if pads:
            self.pad.append(nn.ConvTranspose2d(input_dim, input_dim, 3))
        self.adapter = nn.Sequential(nn.LayerNorm((input_dim, side, side)))
        for layer, out in layers:
            self.adapter.extend([layer, nn.ReLU(), nn.LayerNorm((hidden, out, out))])
        if linear:
            self.adapter.extend([ToTokens(), nn.Linear(hidden, output_dim)])
        else:
            last = nn.ConvTranspose2d if target > side else nn.Conv2d
            self.adapter.extend([last(hidden, output_dim, 3, padding=1), ToTokens()])

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(self.pad(x))


class MLPHead(nn.Module):
    """Patches [B, s^2, D], the nearest ones of a t x t grid, through linear layers with ReLU to [B, t^2, C]."""

    def __init__(self, input_dim: int, output_dim: int, source: int, target: int, num_layers: int = 3) -> None:
        super().__init__()
        self.source, self.target = source, target
        sizes = [input_dim, *[2 * input_dim] * (num_layers - 1), output_dim]
        self.adapter = nn.Sequential()
        for i, (into, out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            self.adapter.extend([nn.ReLU(), nn.Linear(into, out)] if i else [nn.Linear(into, out)])

    def forward(self, x: Tensor) -> Tensor:
        if self.source != self.target:
            x = F.interpolate(ToMap(self.source)(x), size=(self.target, self.target), mode="nearest")
            x = ToTokens()(x)
        return self.adapter(x)


class SharedAdapter(nn.Module):
    """What `conv` and `mlp` have once for all teachers: LN, Linear. [B, N, D] -> [B, N, hidden]."""

    def __init__(self, input_dim: int, hidden: int) -> None:
        super().__init__()
        self.backbone_adapter = nn.Sequential(nn.LayerNorm(input_dim), nn.Linear(input_dim, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone_adapter(x)


class SharedDecoder(SharedAdapter):
    """What `transformer` has once for all teachers: the adapter, and a decoder without final norm.

    Args:
        input_dim, hidden: channels of the student, and of the decoder.
        source: side of the student's grid.
        num_layers, num_heads: of the decoder.
        dropout: in its layers, while it trains.
    """

    def __init__(
        self, input_dim: int, hidden: int, source: int, num_layers: int = 2, num_heads: int = 8, dropout: float = 0.0
    ) -> None:
        super().__init__(input_dim, hidden)
        self.decode_tokens = nn.Parameter(torch.randn(1, source * source, hidden))
        layer = nn.TransformerDecoderLayer(
            hidden, num_heads, 2 * hidden, dropout, activation=F.gelu, batch_first=True, norm_first=True
        )
        self.translator_stem = nn.TransformerDecoder(layer, num_layers)

    def decode(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Patches [B, N, D] as the teacher of `embedding` [1, 1, hidden] wants them, [B, N, hidden]."""
        queries = torch.cat([self.decode_tokens, embedding], dim=1).expand(len(x), -1, -1)
        return self.translator_stem(queries, self(x))[:, 1:]  # as published: the first goes, the embedding's row stays


class TransformerHead(nn.Module):
    """A teacher's part of `transformer`: its embedding, and an MLP of two layers. [B, s^2, D] -> [B, t^2, C]."""

    def __init__(self, hidden: int, output_dim: int, source: int, target: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(1, 1, hidden))
        self.head = MLPHead(hidden, output_dim, source, target, num_layers=2)


def square_side(tokens: int) -> int:
    """The side of a square grid of so many patches; ValueError for another."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"Theia's translators take square grids of patches, not {tokens} patches: use square images")
    return side
