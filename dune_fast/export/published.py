"""DUNE's published container: encoder, projectors and teachers' statistics as its own code and users read them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from dune_fast.export.check import ExportError, Reader, encoder_outputs
from dune_fast.load import DistilledModel
from dune_fast.nn.projectors import TransformerProjector
from dune_fast.released import load_released

FILE = "dune.pth"

ARCHITECTURES = {
    (192, 12, 3): "vit_tiny",
    (384, 12, 6): "vit_small",
    (768, 12, 12): "vit_base",
    (1024, 24, 16): "vit_large",
}
"""(channels, blocks, heads) -> name; the container gives the name alone."""


def published_state(model: DistilledModel) -> dict[str, Tensor]:
    """All tensors by their published names: a chunk index 0 before the encoder's block index, a mask token of zeros."""
    encoder = {key.replace("blocks.", "blocks.0."): value for key, value in model.encoder.state_dict().items()}
    encoder["mask_token"] = torch.zeros(1, model.encoder.cfg.embed_dim)
    parts = {
        "encoder": encoder,
        "projectors": model.student.projectors.state_dict(),
        "teacher_norms": model.statistics.state_dict(),
    }
    return {f"{part}.{key}": value.detach().cpu() for part, state in parts.items() for key, value in state.items()}


def _architecture(model: DistilledModel) -> tuple[str, int]:
    """The encoder's published name and the projectors' heads; ExportError if the container cannot say this model."""
    cfg = model.encoder.cfg
    sizes = cfg.embed_dim, cfg.depth, cfg.num_heads
    demands = {
        "features standardized per channel (standardization.convention=dune or unic)": model.statistics.convention
        != "phi_s",
        f"one of the encoders {', '.join(ARCHITECTURES.values())} (this one has {cfg.embed_dim} channels, {cfg.depth} "
        f"blocks, {cfg.num_heads} heads)": sizes in ARCHITECTURES,
        "GELU's MLP of ratio 4": cfg.mlp_ratio == 4
        and all(hasattr(block.mlp, "fc1") for block in model.encoder.blocks),
        "LayerScale": cfg.layer_scale is not None,
        "a cls token, a learned position table and a final norm": cfg.cls_token
        and cfg.pos_embed == "learned"
        and cfg.final_norm,
        "positions interpolated with the offset 0.1, without antialias": cfg.interpolate_offset == 0.1
        and not cfg.interpolate_antialias,
        "transformer projectors of one block with LayerScale (projector=tp)": all(
            isinstance(p, TransformerProjector) and len(p.blocks) == 1 and hasattr(p.blocks[0].ls1, "gamma")
            for p in model.student.projectors.values()
        ),
    }
    for what, given in demands.items():
        if not given:
            raise ExportError(f"DUNE's published container needs {what}: export this run to safetensors instead")
    (heads,) = {p.blocks[0].attn.num_heads for p in model.student.projectors.values()}
    return ARCHITECTURES[sizes], heads


def write_dune(model: DistilledModel, folder: Path, step: int = 0) -> None:
    """Writes `dune.pth`: {"model", "args", "iter"}; its only type besides torch's is argparse.Namespace."""
    name, heads = _architecture(model)
    args = argparse.Namespace(
        image_size=model.encoder.cfg.image_size,
        enc_args={"arch": name},
        proj_args={"num_heads": heads},
        teachers=model.teachers,
        dune_args="{'last_enc_norm': False}",
    )
    torch.save({"model": published_state(model), "args": args, "iter": step}, folder / FILE)


def dune_outputs(model: DistilledModel) -> Reader:
    """All tokens, every teacher's projections in the teacher's own scale (so with the statistics)."""

    def run(images: Tensor) -> dict[str, Tensor]:
        projections = model.projections(images, standardized=False)
        named = {f"{name}.{token}": x for name, tokens in projections.items() for token, x in tokens.items()}
        return {**encoder_outputs(model.encoder, images), **named}

    return run


def read_dune(folder: Path) -> Reader:
    """The container, read as any published one."""
    return dune_outputs(DistilledModel(*load_released(folder / FILE)).eval())
