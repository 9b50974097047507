"""`--to timm`: a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dune_fast.export.check import ExportError, Reader
from dune_fast.export.dinov2_alike import CONFIG, WEIGHTS, refuse_unlike
from dune_fast.export.to_safetensors import PLAIN, save
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.teachers.containers import read_safetensors
from dune_fast.teachers.timm_model import import_timm


def timm_state(encoder: VisionTransformer) -> dict[str, Tensor]:
    """The encoder's tensors by timm's names; the position of cls goes into the token, timm's table is [1, N, D]."""
    state = {key.replace("register_tokens", "reg_token"): value for key, value in encoder.state_dict().items()}
    table = state.pop("pos_embed")
    return {**state, "pos_embed": table[:, 1:], "cls_token": state["cls_token"] + table[:, :1]}


def timm_architecture(cfg: ViTConfig) -> tuple[str, dict]:
    """The name in timm of the nearest DINOv2 with registers, and the arguments that make it this encoder."""
    size = {768: "base", 1024: "large"}.get(cfg.embed_dim, "small")
    arguments = {
        "img_size": cfg.image_size, "patch_size": cfg.patch_size, "embed_dim": cfg.embed_dim, "depth": cfg.depth,
        "num_heads": cfg.num_heads, "mlp_ratio": cfg.mlp_ratio, "reg_tokens": cfg.num_registers,
        "init_values": cfg.layer_scale or 0.0,  # timm drops arguments that are None, and makes no LayerScale of 0
        "dynamic_img_size": True,
    }  # fmt: skip
    return f"vit_{size}_patch14_reg4_dinov2", arguments


def write(encoder: VisionTransformer, folder: Path, about: Mapping[str, str] = PLAIN) -> None:
    """Writes `config.json` and `model.safetensors`; `about` is metadata of the latter."""
    cfg = encoder.cfg
    refuse_unlike(encoder, "timm")
    name, arguments = timm_architecture(cfg)
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": cfg.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            **encoder.transform.timm(), "fixed_input_size": False, "num_classes": 0,
            "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save(folder / WEIGHTS, timm_state(encoder), {"format": "pt", **about})


def read(folder: Path) -> Reader:
    """timm's own model, built from the configuration, every tensor loaded strictly."""
    timm = import_timm()
    config = json.loads((folder / CONFIG).read_text())
    model = timm.create_model(config["architecture"], pretrained=False, num_classes=0, **config["model_args"]).eval()
    try:
        model.load_state_dict(read_safetensors(folder / WEIGHTS), strict=True)
    except RuntimeError as error:
        raise ExportError(f"timm does not take the weights that were written: {error}") from error
    return lambda images: {"tokens": model.forward_features(images)}
