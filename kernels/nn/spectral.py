"""Spectral reparametrisation: a linear layer's weight times a trained gain over its largest singular value.

Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", ICML 2023; as in RADIO:

    version 2    W (softplus(g) + 0.05) / (sigma + eps)
    version 1    W g / (sigma + eps)

sigma = u . W v comes from one step of power iteration a training step: u = W v / |W v|, then v = W^T u / |W^T u|; both
are buffers, so checkpoints have them. Queries, keys and values have gains of their own (three chunks of rows), as have
both halves of a gated MLP. Names are those of the releases: `weight` becomes `parametrizations.weight.original`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

SMALLEST_GAIN = 0.05
"""Added to softplus of the gain, in version 2."""
EPS = 1e-6
FIRST_ITERATIONS = 20
"""Power iterations at the start, where u and v are random."""


def spectral_weight(weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, version: int) -> Tensor:
    """The reparametrised weight, [M, K] like `weight`, in its type; gain [1, 1], u [M], v [K]."""
    with torch.autocast(weight.device.type, enabled=False):  # sigma is a sum of many products
        factor = F.softplus(gain) + SMALLEST_GAIN if version == 2 else gain
        return weight * (factor / (torch.dot(u, torch.mv(weight, v)) + EPS))


def power_iteration(weight: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The next (u, v) for a weight [M, K]."""
    with torch.autocast(weight.device.type, enabled=False):
        u = F.normalize(torch.mv(weight, v), dim=0)
        return u, F.normalize(torch.mv(weight.t(), u), dim=0)


class SpectralScale(nn.Module):
    """The reparametrisation of a whole weight [M, K]."""

    scale: nn.Parameter
    _u: Tensor
    _v: Tensor

    def __init__(self, rows: int, columns: int, version: int) -> None:
        super().__init__()
        self.version = version
        self.due = False
        """Whether the next forward pass is a training step's first, which iterates."""
        self.scale = nn.Parameter(torch.ones(1, 1))
        self.register_buffer("_u", F.normalize(torch.ones(rows), dim=0))
        self.register_buffer("_v", F.normalize(torch.ones(columns), dim=0))
        if version == 2:
            self.register_buffer("_sn_version", torch.tensor(version))

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Random u and v, the same ones every time, iterated; the gain that leaves the weight as it is."""
        v = torch.randn(len(self._v), generator=torch.Generator().manual_seed(0), device="cpu").to(weight.device)
        v = F.normalize(v, dim=0)
        for _ in range(FIRST_ITERATIONS):
            u, v = power_iteration(weight, v)
        self._u.copy_(u), self._v.copy_(v)
        gain = torch.dot(u, torch.mv(weight, v)) + EPS
        if self.version == 2:  # the inverse of softplus; a weight below the smallest gain cannot be kept
            gain = torch.log(torch.expm1((gain - SMALLEST_GAIN).clamp_min(EPS)))
        self.scale.fill_(gain)

    def forward(self, weight: Tensor) -> Tensor:
        if self.due:
            with torch.no_grad():
                u, v = power_iteration(weight.detach(), self._v)
                self._u.copy_(u), self._v.copy_(v)
            self.due = False
        return spectral_weight(weight, self.scale, self._u, self._v, self.version)


class SpectralChunks(nn.Module):
    """The reparametrisation of equal chunks of a weight's rows, each by itself: [M, K] -> [M, K]."""

    def __init__(self, count: int, rows: int, columns: int, version: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(SpectralScale(rows // count, columns, version) for _ in range(count))

    def start(self, weight: Tensor) -> None:
        for part, rows in zip(self.parts, weight.chunk(len(self.parts)), strict=True):
            part.start(rows)

    def forward(self, weight: Tensor) -> Tensor:
        chunks = zip(self.parts, weight.chunk(len(self.parts)), strict=True)
        return torch.cat([part(rows) for part, rows in chunks])


CHUNKS = {"qkv": 3, "w12": 2}
"""Layers of a block whose rows belong to several products, by name."""


def reparametrize(blocks: Iterable[nn.Module], version: int) -> None:
    """Every linear layer inside the blocks, in place."""
    for block in blocks:
        layers = [(name, layer) for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]
        for name, layer in layers:
            count = CHUNKS.get(name.rpartition(".")[2], 1)
            rows, columns = layer.weight.shape
            whole = count == 1
            scale = SpectralScale(rows, columns, version) if whole else SpectralChunks(count, rows, columns, version)
            parametrize.register_parametrization(layer, "weight", scale, unsafe=True)


def original_weight(layer: nn.Linear) -> Tensor:
    """What a layer trains: its weight, or what it makes its weight of."""
    reparametrized = parametrize.is_parametrized(layer, "weight")
    return layer.parametrizations.weight.original if reparametrized else layer.weight


def start_spectral(module: nn.Module) -> None:
    """Makes the weight of every reparametrised layer what its `original` is now; see `SpectralScale.start`."""
    for layer in module.modules():
        if parametrize.is_parametrized(layer, "weight"):
            layer.parametrizations.weight[0].start(original_weight(layer))


def iterate_once(module: nn.Module) -> None:
    """The next forward pass iterates; what is recomputed for the backward pass does not."""
    for part in module.modules():
        if isinstance(part, SpectralScale):
            part.due = True


def fold(module: nn.Module) -> None:
    """Makes every reparametrised weight a plain one, for good: what computes the same without training."""
    for layer in module.modules():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
