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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.kernels.nn.routing import select
from dune_fast.projectors.base import Projector, SeparateTokens, StudentShape, TeacherFeatures
from dune_fast.projectors.config import ProjectorConfig

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

    Its layers have no dropout, where the published ones have 0.1: what is random in a step of ours is a function of
    seed and step alone.
    """

    def __init__(self, input_dim: int, hidden: int, source: int, num_layers: int = 2, num_heads: int = 8) -> None:
        super().__init__(input_dim, hidden)
        if hidden % num_heads:
            raise ValueError(f"projector.translator_heads={num_heads} do not divide projector.hidden_dim={hidden}")
        self.decode_tokens = nn.Parameter(torch.randn(1, source * source, hidden))
        layer = nn.TransformerDecoderLayer(
            hidden, num_heads, 2 * hidden, 0.0, activation=F.gelu, batch_first=True, norm_first=True
        )
        self.translator_stem = nn.TransformerDecoder(layer, num_layers)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Patches [B, N, D] as the teacher of `embedding` [1, 1, hidden] wants them, [B, N, hidden]."""
        queries = torch.cat([self.decode_tokens, embedding], dim=1).expand(len(x), -1, -1)
        memory = self.backbone_adapter(x)
        return self.translator_stem(queries, memory)[:, 1:]  # as published: the first goes, the embedding's row stays


class Translator(SeparateTokens):
    """One teacher's translator: `patch`, and for its cls token a linear layer, `cls`.

    ValueError for grids that its convolutions do not lead to, a translator that does not exist, or cls tokens of
    another one than lconv.
    """

    reads_all_tokens = True

    def __init__(self, cfg: ProjectorConfig, student: StudentShape, teacher: TeacherFeatures) -> None:
        super().__init__(student, teacher)
        kind, dim, channels = cfg.translator, student.embed_dim, teacher.channels
        self.source = cfg.source_grid or student.grid
        self.target = teacher.grid or self.source
        if "cls" in self.token_types:
            if kind != "lconv":
                raise ValueError(
                    f"projector.translator={kind} has no cls tokens: choose lconv, or teachers.NAME.token_types=[patch]"
                )
            self.cls = nn.Linear(dim, channels)
        if "patch" not in self.token_types:
            return
        hidden, grids = cfg.hidden_dim, (self.source, self.target)
        if kind == "lconv":
            self.patch: nn.Module = ConvHead(dim, int(dim * cfg.hidden_factor), channels, *grids)
            return
        if kind == "transformer":
            self.shared: nn.Module = SharedDecoder(
                dim, hidden, self.source, cfg.translator_layers, cfg.translator_heads
            )  # fmt: skip
            self.embedding = nn.Parameter(torch.randn(1, 1, hidden))
            self.patch = MLPHead(hidden, channels, *grids, num_layers=2)
            return
        self.shared = SharedAdapter(dim, hidden)
        conv = kind == "conv"
        self.patch = (
            ConvHead(hidden, 2 * hidden, channels, *grids, linear=False) if conv else MLPHead(hidden, channels, *grids)
        )

    def share(self, first: Projector) -> None:
        """Takes what is shared of the first teacher's, which alone has it as a part."""
        if self is first or not hasattr(self, "shared"):
            return
        own, theirs = ({key: x.shape for key, x in module.shared.state_dict().items()} for module in (self, first))
        if own != theirs:
            raise ValueError(
                "projector.teachers gives teachers translators of different hidden_dim, translator_layers or "
                "translator_heads, which they share: leave these fields to projector itself"
            )
        del self.shared
        self._of_first = (first.shared,)  # in a tuple: no part of this module

    def patches(self, x: Tensor, kept: Tensor | None, grid: tuple[int, int] | None) -> Tensor:
        """[B, s^2, D] -> [B, t^2, C], or of the tokens `kept`."""
        if x.shape[1] != self.source**2 or (grid is not None and grid != (self.source, self.source)):
            got = f"{x.shape[1]} patches" if grid is None else f"{grid[0]} x {grid[1]} patches"
            raise ValueError(
                f"Theia's translators are for {self.source} x {self.source} patches, and got {got}: train and use "
                "them with square images of that many, or set projector.source_grid"
            )
        if kept is not None and self.source != self.target:
            raise ValueError("a subset of patches is one of the student's grid: set objective.patch_share to 1")
        if (shared := self._shared()) is not None:
            x = shared(x, *([self.embedding] if hasattr(self, "embedding") else []))
        return select(self.patch(x), kept)

    def _shared(self) -> nn.Module | None:
        return getattr(self, "_of_first", (getattr(self, "shared", None),))[0]

    def last_layers(self) -> dict[str, nn.Linear]:
        layers = {token: self.cls if token == "cls" else self.patch.adapter[-1] for token in self.token_types}
        if not all(isinstance(layer, nn.Linear) for layer in layers.values()):
            raise ValueError(
                "start.fit_projectors fits linear layers, and projector.translator=conv ends with a convolution: set "
                "it to false"
            )
        return layers


def theia_translator(cfg: ProjectorConfig, student: StudentShape, teacher: TeacherFeatures) -> Projector:
    """See `projectors.base.KINDS`."""
    return Translator(cfg, student, teacher)
