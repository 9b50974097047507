"""What one teacher's projector of any kind costs, counted on tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dune_fast.engine.fake_memory import by_value
from dune_fast.kernels.library import traced
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.base import StudentShape, TeacherFeatures, blocks_read, build_projector, shared_layers
from dune_fast.projectors.config import ProjectorConfig

KNOWN = ("tp", "sp", "lp")
"""Kinds for which there are formulas."""


class ProjectorCost(NamedTuple):
    """Of one image."""

    flops: int
    """Of the forward pass."""
    kept: int
    """Bytes that the forward pass keeps for the backward pass, its output included."""
    dtype: torch.dtype
    """Of its output."""


@by_value
def projector_cost(
    cfg: ProjectorConfig, student: ViTConfig, teacher: TeacherFeatures, grid: int, size: int = 4
) -> ProjectorCost:
    """One image of grid x grid patches.

    Args:
        cfg: of this teacher's projector.
        size: bytes of a value in matrix products: 2 under bf16 autocast, else 4.
    """
    cls = student.cls_token
    shape = StudentShape(student.embed_dim, student.depth, student.num_heads, cls, grid)
    with torch.device("meta"):  # initial weights of some kinds are drawn by values, which fake tensors have not
        projector = build_projector(cfg, shape, teacher)
        # what teachers of one source have in common is counted for the first of them
        shared = shared_layers(cfg, shape, ["first"] if teacher.place == 0 else [])
    with FakeTensorMode(allow_non_fake_inputs=True), traced():
        projector.to_empty(device="cpu")
        shared.to_empty(device="cpu")

        def run(images: int) -> dict[str, Tensor]:
            x = torch.empty(images, grid**2 + int(cls), student.embed_dim, requires_grad=torch.is_grad_enabled())
            tokens = dict.fromkeys(blocks_read(cfg, student.depth), x)
            for layers in shared.values():
                tokens = layers(tokens)
            return projector(tokens, None, (grid, grid))

        # attention's products are counted apart from its memory: a fused kernel keeps no scores
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            run(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=size == 2):
            kept = _kept(lambda: run(2)) - _kept(lambda: run(1))  # weights, and their copies in bf16, are in both
            dtype = max((x.dtype for x in run(1).values()), key=lambda dtype: dtype.itemsize)
    return ProjectorCost(counter.get_total_flops(), kept, dtype)


def _kept(run: Callable[[], dict[str, Tensor]]) -> int:
    """Bytes of the distinct tensors that a forward pass keeps, its outputs included."""
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for x in run().values():
            pack(x)
    return sum(x.untyped_storage().nbytes() for x in found.values())

