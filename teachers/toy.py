"""A teacher of two layers, for tests and synthetic benchmarks.

    hidden = GELU(Conv(images)),  patch = Linear(hidden),  cls = mean of the patches

with a convolution whose kernel and stride are the patch size. Weights come from a safetensors file, or from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.teachers.containers import read_safetensors
from dune_fast.teachers.protocol import Teacher, Trunk, map_tokens
from dune_fast.teachers.registry import register
from dune_fast.teachers.weights import build_loaded, random_seed, weights_path

HIDDEN_DIM = 64
"""Hidden channels of a teacher made from a seed."""


class ConvPatchify(Trunk):
    """images [B, 3, H, W] -> patch tokens [B, H/p * W/p, C], row-major."""

    def __init__(self, patch_size: int, hidden_dim: int, num_features: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_features = num_features
        self.proj = nn.Conv2d(3, hidden_dim, kernel_size=patch_size, stride=patch_size)
        self.lin = nn.Linear(hidden_dim, num_features)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.gelu(self.proj(images))  # [B, hidden, H/p, W/p]
        return self.lin(map_tokens(hidden))


def random_state(patch_size: int, num_features: int, seed: int) -> dict[str, Tensor]:
    """Weights that keep the variance, from a generator of their own."""
    draw = torch.Generator().manual_seed(seed)
    fan_in = 3 * patch_size**2
    return {
        "proj.weight": torch.randn(HIDDEN_DIM, 3, patch_size, patch_size, generator=draw) / math.sqrt(fan_in),
        "proj.bias": torch.randn(HIDDEN_DIM, generator=draw) * 0.1,
        "lin.weight": torch.randn(num_features, HIDDEN_DIM, generator=draw) / math.sqrt(HIDDEN_DIM),
        "lin.bias": torch.randn(num_features, generator=draw) * 0.1,
    }


@register("conv_patchify")
class ConvPatchifyTeacher(Teacher):
    """`weights` is the path of a safetensors file with `proj.*` and `lin.*`, or "random:SEED"."""

    @property
    def trunk_key(self) -> Hashable:
        return (*super().trunk_key, self.config.patch_size, self.config.num_features)

    def build_trunk(self) -> Trunk:
        cfg = self.config
        seed = random_seed(self.name, cfg.weights)
        if seed is None:
            state = read_safetensors(weights_path(cfg.weights))
        else:
            state = random_state(cfg.patch_size, cfg.num_features, seed)
        hidden_dim = state["proj.bias"].numel() if "proj.bias" in state else HIDDEN_DIM
        return build_loaded(lambda: ConvPatchify(cfg.patch_size, hidden_dim, cfg.num_features), state, cfg.weights)

    def tokens(self, features: Tensor) -> dict[str, Tensor]:
        return {"cls": features.mean(dim=1), "patch": features}
