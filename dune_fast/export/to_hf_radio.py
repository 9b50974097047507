"""`--to hf` of a student of RADIO's family: a folder for transformers' `RadioModel`, which has the backbone alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dune_fast.export.check import ExportError, Outputs, Reader
from dune_fast.export.dinov2_alike import CONFIG, WEIGHTS
from dune_fast.export.to_safetensors import PLAIN, save
from dune_fast.kernels.nn.block import LAYER_NORM_EPS
from dune_fast.kernels.nn.radio import CLIP_MEAN, CLIP_STD, RADIOViT

PREPROCESSOR = "preprocessor_config.json"
_NAMES = {
    "attn.proj": "attention.o_proj", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w3": "mlp.down_proj",
}  # fmt: skip
"""Parts of our names -> transformers'."""
_PACKED = {"attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
           "mlp.w12": ("mlp.gate_proj", "mlp.up_proj")}  # fmt: skip


def statistics(encoder: RADIOViT) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the network's weights want pixels to be normalised by."""
    return (CLIP_MEAN, CLIP_STD) if encoder.cfg.radio.conditioner else (tuple(encoder.mean), tuple(encoder.std))


def has_bias(encoder: RADIOViT) -> bool:
    """Whether the patch projection adds something."""
    bias = encoder.patch_embed.proj.bias
    return bias is not None and bool(bias.any())


def radio_state(encoder: RADIOViT) -> dict[str, Tensor]:
    """The encoder's tensors by transformers' names; LayerScale of 1 where there is none."""
    cfg = encoder.cfg
    mean, std = statistics(encoder)
    state = {
        "embeddings.position_embedding": encoder.pos_embed, "embeddings.cls_register_token": encoder.prefix_tokens[0],
        "embeddings.patch_projection.weight": encoder.patch_embed.proj.weight.flatten(1),
        "input_conditioner.norm_mean": torch.tensor(mean).view(3, 1, 1),
        "input_conditioner.norm_std": torch.tensor(std).view(3, 1, 1),
        "summary_idxs": torch.tensor(cfg.summaries),
    }  # fmt: skip
    for i, block in enumerate(encoder.blocks):
        own = {f"layer_scale{n}.lambda1": torch.ones(cfg.embed_dim) for n in (1, 2)}
        for key, value in block.state_dict().items():
            name, _, kind = key.rpartition(".")
            if name in _PACKED:
                parts = _PACKED[name]
                own |= {f"{part}.{kind}": rows for part, rows in zip(parts, value.chunk(len(parts)), strict=True)}
            else:
                for ours, theirs in _NAMES.items():
                    key = key.replace(ours, theirs)
                own[key] = value
        state |= {f"encoder.layer.{i}.{key}": value for key, value in own.items()}
    return state


def write(encoder: RADIOViT, folder: Path, about: Mapping[str, str] = PLAIN) -> None:
    """Writes both configurations and `model.safetensors`; `about` is metadata of the latter.

    ExportError for what `RadioModel` has not.
    """
    cfg = encoder.cfg
    missing = {
        "final norm (student.final_norm)": cfg.final_norm,
        "bias of the patch projection (student.radio.patch_bias)": has_bias(encoder),
        "standardized features": cfg.normalized,
        "positions without cropping: set student.radio.cpe_max_size": not cfg.cropped,
    }
    for what, given in missing.items():
        if given:
            raise ExportError(f"transformers' RadioModel has no {what}; export it to safetensors instead")
    mean, std = statistics(encoder)
    config = {
        "architectures": ["RadioModel"], "model_type": "radio", "hidden_size": cfg.embed_dim,
        "num_hidden_layers": cfg.depth, "num_attention_heads": cfg.num_heads, "mlp_ratio": float(cfg.mlp_ratio),
        "use_swiglu_ffn": cfg.mlp == "swiglu", "layer_norm_eps": LAYER_NORM_EPS, "patch_size": cfg.patch_size,
        "image_size": cfg.image_size, "max_img_size": cfg.table_side * cfg.patch_size, "num_cls_tokens": cfg.num_cls,
        "num_registers": cfg.num_registers, "summary_idxs": list(cfg.summaries), "norm_mean": list(mean),
        "norm_std": list(std), "torch_dtype": "float32",
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    processor = encoder.transform.transformers() | {"do_normalize": False}  # the model does
    (folder / PREPROCESSOR).write_text(json.dumps(processor, indent=2) + "\n")
    save(folder / WEIGHTS, radio_state(encoder), {"format": "pt", **about})


def is_radio(folder: Path) -> bool:
    """Whether a folder for transformers has a `RadioModel`."""
    return json.loads((folder / CONFIG).read_text())["model_type"] == "radio"


def require_model() -> None:
    """ExportError where the installed transformers is too old for RADIO."""
    import transformers

    if not hasattr(transformers, "RadioModel"):
        raise ExportError(
            f"transformers {transformers.__version__} has no RadioModel, which the hf export of RADIO's family is "
            "compared with: pip install -U transformers, or export to radio"
        )


def reader(model: torch.nn.Module, folder: Path) -> Reader:
    """transformers' summary and features of images that are normalised as our encoder wants them."""
    processor = json.loads((folder / PREPROCESSOR).read_text())
    mean, std = (torch.tensor(processor[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))

    def run(images: Tensor) -> Outputs:
        found = model(pixel_values=images * std + mean)
        return {"x_norm_clstoken": found.summary, "x_norm_patchtokens": found.features}

    return run
