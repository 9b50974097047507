"""`--to dune`: the container of DUNE's published checkpoints: encoder, projectors and teachers' statistics."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.export.check import ExportError, Reader, encoder_outputs
from dune_fast.export.to_safetensors import PLAIN
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.load import DistilledModel
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.projectors.transformer import TransformerProjector
from dune_fast.released import load_released
from dune_fast.student import Student
from dune_fast.teachers.containers import read_container
from dune_fast.teachers.dune import ARCHITECTURES, ENCODER_OPTIONS, PROJECTOR_OPTIONS
from dune_fast.teachers.weights import check_fit, compare

FILE = "dune.pth"

NAMES = {sizes: name for name, sizes in ARCHITECTURES.items()}
TEACHERS = ("dino2reg_vitlarge_14", "mast3r_vitlarge_16", "multihmr_vitlarge_14_672")
"""Teachers that the published loader knows; whole models of others it reads once they are added to its list."""


def published_state(model: DistilledModel) -> dict[str, Tensor]:
    """All tensors by their published names: a chunk index 0 before the encoder's block index, a mask token of zeros."""
    encoder = {key.replace("blocks.", "blocks.0."): value for key, value in model.encoder.state_dict().items()}
    encoder["mask_token"] = torch.zeros_like(encoder["cls_token"][0])
    parts = {
        "encoder": encoder,
        "projectors": model.student.projectors.state_dict(),
        "teacher_norms": model.statistics.state_dict(),
    }
    named = {f"{part}.{key}": value.detach() for part, state in parts.items() for key, value in state.items()}
    return {key: value if value.is_meta else value.cpu() for key, value in named.items()}


def _refuse_unlike(model: DistilledModel) -> None:
    """ExportError if the container cannot say this model, or its published loader would read another one."""
    cfg, projectors = model.encoder.cfg, list(model.student.projectors.values())
    transformers = all(isinstance(p, TransformerProjector) for p in projectors)
    blocks = [block for p in projectors for block in p.blocks] if transformers else []
    demands = {
        "features standardized per channel (standardization.convention=dune or unic)":
            len(model.statistics.of_convention("dune", "unic")) == len(model.statistics.items()),
        f"one of the encoders {', '.join(ARCHITECTURES)} (this one has {cfg.embed_dim} channels, {cfg.depth} blocks, "
        f"{cfg.num_heads} heads)":
            (cfg.embed_dim, cfg.depth, cfg.num_heads) in NAMES,
        "GELU's MLP of ratio 4":
            cfg.mlp_ratio == 4 and all(hasattr(block.mlp, "fc1") for block in model.encoder.blocks),
        "LayerScale":
            cfg.layer_scale is not None,
        "a cls token, a learned position table and a final norm":
            cfg.cls_token and cfg.pos_embed == "learned" and cfg.final_norm,
        "positions interpolated with the offset 0.1, without antialias":
            cfg.interpolate_offset == 0.1 and not cfg.interpolate_antialias,
        "transformer projectors (projector=tp)":
            transformers,
        "projectors of blocks with LayerScale and an MLP of ratio 4":
            all(hasattr(block.ls1, "gamma") and block.mlp.fc1.out_features == 4 * cfg.embed_dim for block in blocks),
        f"projectors with as many attention heads as the encoder ({cfg.num_heads}), which its loader takes for granted "
        "(projector.num_heads: null)":
            all(block.attn.num_heads == cfg.num_heads for block in blocks),
    }  # fmt: skip
    for what, given in demands.items():
        if not given:
            raise ExportError(f"DUNE's published container needs {what}: export this run to safetensors instead")


def write(model: DistilledModel, folder: Path, step: int = 0, about: Mapping[str, str] = PLAIN) -> None:
    """Writes `dune.pth`: {"model", "args", "iter", "preprocessing"} and `about`; its only type besides torch's is a
    Namespace.

    The published loader builds encoder and projectors from `args` alone, so they hold every option.
    """
    _refuse_unlike(model)
    cfg = model.encoder.cfg
    (blocks,) = {len(p.blocks) for p in model.student.projectors.values()}
    layers = {"layerscale_init": cfg.layer_scale, "qkv_bias": True, "ln_affine": True}
    args = argparse.Namespace(
        image_size=cfg.image_size,
        enc_args={
            "arch": NAMES[cfg.embed_dim, cfg.depth, cfg.num_heads], "patch_size": cfg.patch_size,
            "num_register_tokens": cfg.num_registers, **layers,
        },
        proj_args={"num_blocks": blocks, "num_heads": cfg.num_heads, "scale": 1.0, **layers},
        teachers=model.teachers,
        dune_args="{'last_enc_norm': False}",
    )  # fmt: skip
    preprocessing = asdict(model.encoder.transform)
    content = {"model": published_state(model), "args": args, "iter": step, "preprocessing": preprocessing, **about}
    torch.save(content, folder / FILE)


def built_by_its_loader(args: argparse.Namespace, widths: Mapping[str, tuple[int, Sequence[str]]]) -> dict[str, Tensor]:
    """Names and shapes of the model that the published loader builds for a container, from its arguments alone.

    `widths`, teacher -> (channels, token types), the loader has in a list of its own.
    """
    encoder = {**ENCODER_OPTIONS, **args.enc_args, "image_size": args.image_size}
    projector = {**PROJECTOR_OPTIONS, **args.proj_args}
    channels, depth, heads = ARCHITECTURES[encoder["arch"]]
    cfg = ViTConfig(
        image_size=encoder["image_size"], patch_size=encoder["patch_size"], embed_dim=channels, depth=depth,
        num_heads=heads, num_registers=encoder["num_register_tokens"], layer_scale=encoder["layerscale_init"],
    )  # fmt: skip
    kind = ProjectorConfig(num_blocks=projector["num_blocks"], layer_scale=projector["layerscale_init"])
    with torch.device("meta"):
        student = Student(cfg, kind, {name: widths[name] for name in args.teachers})
        return published_state(DistilledModel(student, TeacherStatistics(dict(widths))))


def dune_outputs(model: DistilledModel) -> Reader:
    """All tokens, every teacher's projections in the teacher's own scale (so with the statistics)."""

    def run(images: Tensor) -> dict[str, Tensor]:
        projections = model.projections(images, standardized=False)
        named = {f"{name}.{token}": x for name, tokens in projections.items() for token, x in tokens.items()}
        return {**encoder_outputs(model.encoder, images), **named}

    return run


def read(folder: Path) -> Reader:
    """The container, read as any published one, once the model that its loader would build takes every tensor."""
    path = folder / FILE
    content, model = read_container(path), DistilledModel(*load_released(path)).eval()
    widths: dict[str, tuple[int, list[str]]] = {}
    for name, token, normalizer in model.statistics.items():
        widths.setdefault(name, (normalizer.mean.numel(), []))[1].append(token)
    check_fit(compare(built_by_its_loader(content["args"], widths), content["model"]), "the published model", path)
    return dune_outputs(model)
