"""DINOv2's ViT-S, B, L and g, with and without registers.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024; registers: Darcet et al.,
"Vision Transformers Need Registers", ICLR 2024. The release is a bare state dict whose names are those of
`dune_fast.kernels.nn.vit`; ViT-g's blocks have SwiGLU. timm's files of them are read too.
"""

from __future__ import annotations

from collections.abc import Collection

from dune_fast.teachers.vit import ViTTeacher


class DINOv2Teacher(ViTTeacher):
    """cls and patch tokens after the final norm; registers are computed and left out."""

    layer_scale = True

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        if "blocks.0.ls1.gamma" not in keys or "pos_embed" not in keys:
            return False
        # with registers and without a mask token it is a distilled student's, see `teachers.dune`
        return "register_tokens" not in keys or "mask_token" in keys

    @classmethod
    def published_interpolation(cls, registers: int) -> tuple[float, bool]:
        return (0.0, True) if registers else (0.1, False)
