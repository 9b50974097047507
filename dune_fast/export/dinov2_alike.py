"""What exports to timm and transformers share: both know DINOv2 with a GELU MLP.

Both resize the position table by size and with antialias. A student whose `interpolate_offset` is above 0 (DUNE's 0.1)
gives the same features there at its native image size only.
"""

from __future__ import annotations

from dune_fast.export.check import ExportError
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def resizes_alike(cfg: ViTConfig) -> bool:
    """Whether timm and transformers resize the position table as this encoder does, so that every size agrees."""
    return cfg.interpolate_offset == 0 and cfg.interpolate_antialias


def refuse_unlike(encoder: VisionTransformer, library: str) -> None:
    """ExportError for an encoder that the library's DINOv2 cannot be."""
    cfg = encoder.cfg
    missing = {
        "family of encoders like this one (student.family)": type(encoder) is not VisionTransformer,
        "gated MLPs (mlp: swiglu) in this form": not all(hasattr(block.mlp, "fc1") for block in encoder.blocks),
        "rotary positions (pos_embed: rope2d)": cfg.pos_embed != "learned",
        "encoders without a cls token": not cfg.cls_token,
        "encoders without a final norm": not cfg.final_norm,
        "registers with positions of their own": hasattr(encoder, "register_positions"),
    }
    for what, given in missing.items():
        if given:
            raise ExportError(f"{library}'s DINOv2 has no {what}: export it to safetensors instead")
