"""A teacher of two layers, for tests and synthetic benchmarks, by the family "module".

    hidden = GELU(Conv(images)),  patch = Linear(hidden),  cls = mean of the patches

with a convolution whose kernel and stride are the patch size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.teachers.config import TOKEN_TYPES, TeacherConfig


class ConvPatchify(nn.Module):
    """Images [B, 3, H, W] -> {"cls": [B, C], "patch": [B, H/p * W/p, C]}, row-major."""

    def __init__(self, patch_size: int, num_features: int, hidden_dim: int) -> None:
        super().__init__()
        self.patch_size, self.num_features = patch_size, num_features
        self.proj = nn.Conv2d(3, hidden_dim, kernel_size=patch_size, stride=patch_size)
        self.lin = nn.Linear(hidden_dim, num_features)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = F.gelu(self.proj(images)).flatten(2).transpose(1, 2)  # [B, N, hidden]
        patch = self.lin(hidden)
        return {"cls": patch.mean(dim=1), "patch": patch}


def conv_patchify(patch_size: int, num_features: int, hidden_dim: int = 64) -> ConvPatchify:
    """The network with weights that keep the variance, drawn from torch's own generator."""
    state = {
        "proj.weight": torch.randn(hidden_dim, 3, patch_size, patch_size) / math.sqrt(3 * patch_size**2),
        "proj.bias": torch.randn(hidden_dim) * 0.1,
        "lin.weight": torch.randn(num_features, hidden_dim) / math.sqrt(hidden_dim),
        "lin.bias": torch.randn(num_features) * 0.1,
    }
    with torch.device("meta"):
        network = ConvPatchify(patch_size, num_features, hidden_dim)
    network.load_state_dict(state, assign=True)
    return network


def toy_teacher(
    weights: str = "random:1", patch_size: int = 14, num_features: int = 24, token_types: Sequence[str] = TOKEN_TYPES,
    hidden_dim: int = 64, **fields: Any,
) -> TeacherConfig:  # fmt: skip
    """The configuration of such a teacher; `fields` are further ones of it, or other values of its own."""
    sizes = {"patch_size": patch_size, "num_features": num_features}
    own = {"family": "module", "weights": weights, "token_types": list(token_types), **sizes}
    own |= {"model": "bench.toy.conv_patchify:conv_patchify", "model_args": {**sizes, "hidden_dim": hidden_dim}}
    return TeacherConfig(**own | fields)
