"""What is trained: the encoder and one projector a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dune_fast.nn.block import Block
from dune_fast.nn.patches import SharedPatches
from dune_fast.nn.projectors import Projection, ProjectorConfig, Projectors
from dune_fast.nn.routing import Routes
from dune_fast.nn.vit import VisionTransformer, ViTConfig


class Student(nn.Module):
    """Encoder and projectors. images [B, 3, H, W] -> teacher -> token type -> [B, C] or [B, N, C].

    The projectors take un-normalised [cls, patches] without the registers, so no loss reaches the encoder's final norm:
    it is frozen at gamma = 1, beta = 0.

    `autocast_dtype` is the type of its matrix products; weights, norms and residuals stay float32. It lives here, not
    around the call: DeepSpeed's engine switches an outer autocast off. None: float32 throughout.
    """

    autocast_dtype: torch.dtype | None = None

    def compute_in(self, autocast_dtype: torch.dtype | None, stream: str = "fp32") -> None:
        """Sets the types: of products, and of tokens between blocks, "fp32" or "bf16" (where products are bf16)."""
        self.autocast_dtype = autocast_dtype
        bf16 = stream == "bf16" and autocast_dtype is torch.bfloat16
        self.encoder.stream_dtype = torch.bfloat16 if bf16 else None

    def __init__(
        self, encoder: ViTConfig, projector: ProjectorConfig, teachers: Mapping[str, tuple[int, Sequence[str]]]
    ) -> None:
        super().__init__()
        if not encoder.cls_token:
            raise ValueError("the student needs a cls token: the projectors' input is [cls, patches]")
        self.encoder = VisionTransformer(encoder)
        self.encoder.norm.requires_grad_(False)
        self.projectors = Projectors(projector, encoder.embed_dim, encoder.depth, encoder.num_heads, teachers)

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile of every transformer block on its own, in place: state and parameters keep their names.

        Args:
            options: of `torch.compile`.
        """
        for module in self.modules():
            if isinstance(module, Block):
                module.compile(**{"dynamic": False, **options})

    def tokens(self, images: Tensor, patches: SharedPatches | None = None) -> dict[int, Tensor]:
        """[cls, patches] after the blocks that the projectors read: block -> un-normalised [B, 1 + N, D]."""
        outputs = self.encoder.block_outputs(images, self.projectors.blocks, patches)
        prefix = self.encoder.num_prefix_tokens
        if prefix == 1:
            return outputs
        return {i: torch.cat([x[:, :1], x[:, prefix:]], dim=1) for i, x in outputs.items()}

    def forward(
        self, images: Tensor, routes: Routes | None = None, patches: SharedPatches | None = None
    ) -> dict[str, Projection]:
        """`routes`: which n of the images each teacher's projector gets, all by default; `patches`: the step's."""
        with torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self.projectors(self.tokens(images, patches), routes)


def build_student(
    encoder: ViTConfig, projector: ProjectorConfig, teachers: Mapping[str, tuple[int, Sequence[str]]], seed: int = 0
) -> Student:
    """A student with initial weights that are a function of the configuration and `seed` alone.

    Args:
        encoder: the encoder's architecture.
        projector: kind and sizes of the projectors.
        teachers: name -> (channels, token types) of each teacher's features.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        student = Student(encoder, projector, teachers)
        student.encoder.init_weights()
    return student
