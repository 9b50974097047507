"""timm's and transformers' Vision Transformers: names, configuration, and reading back by the library itself.

Both resize the position table by size and with antialias. A student whose `interpolate_offset` is above 0 (DUNE's 0.1)
gives the same features there at its native image size only.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
from torch import Tensor

from dune_fast.engine.checkpoints import write_tensors
from dune_fast.export.check import ExportError, Outputs, Reader
from dune_fast.kernels.nn.block import LAYER_NORM_EPS
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.teachers.containers import read_safetensors
from dune_fast.teachers.timm_model import import_timm

WEIGHTS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"


def resizes_alike(cfg: ViTConfig) -> bool:
    """Whether timm and transformers resize the position table as this encoder does, so that every size agrees."""
    return cfg.interpolate_offset == 0 and cfg.interpolate_antialias


def _refuse_unlike(encoder: VisionTransformer, library: str) -> None:
    """What neither library's DINOv2 with GELU has."""
    cfg = encoder.cfg
    missing = {
        "gated MLPs (mlp: swiglu) in this form": not all(hasattr(block.mlp, "fc1") for block in encoder.blocks),
        "rotary positions (pos_embed: rope2d)": cfg.pos_embed != "learned",
        "encoders without a cls token": not cfg.cls_token,
        "encoders without a final norm": not cfg.final_norm,
    }
    for what, given in missing.items():
        if given:
            raise ExportError(f"{library}'s DINOv2 has no {what}: export it to safetensors instead")


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


def write_timm(encoder: VisionTransformer, folder: Path) -> None:
    """A folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
    cfg = encoder.cfg
    _refuse_unlike(encoder, "timm")
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
    _save(timm_state(encoder), folder)


def read_timm(folder: Path) -> Reader:
    """timm's own model, built from the configuration, every tensor loaded strictly."""
    timm = import_timm()
    config = json.loads((folder / CONFIG).read_text())
    model = timm.create_model(config["architecture"], pretrained=False, num_classes=0, **config["model_args"]).eval()
    try:
        model.load_state_dict(read_safetensors(folder / WEIGHTS), strict=True)
    except RuntimeError as error:
        raise ExportError(f"timm does not take the weights that were written: {error}") from error
    return lambda images: {"tokens": model.forward_features(images)}


def hf_state(encoder: VisionTransformer) -> dict[str, Tensor]:
    """The encoder's tensors by the names of transformers' DINOv2: queries, keys and values apart."""
    ends = {
        "attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
    }  # fmt: skip
    starts = {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "register_tokens": "embeddings.register_tokens", "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm.": "layernorm.", "blocks.": "encoder.layer.",
    }  # fmt: skip
    state = {"embeddings.mask_token": torch.zeros(1, encoder.cfg.embed_dim)}
    for key, value in encoder.state_dict().items():
        for ours, theirs in starts.items():
            if key.startswith(ours):
                key = theirs + key.removeprefix(ours)
                break
        for ours, theirs in ends.items():
            key = key.replace(ours, theirs)
        if ".attn.qkv." in key:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[key.replace("attn.qkv", f"attention.attention.{part}")] = rows
        else:
            state[key] = value
    return state


def write_hf(encoder: VisionTransformer, folder: Path) -> None:
    """A folder for transformers' `AutoModel`, `AutoImageProcessor` and `pipeline`: Dinov2WithRegisters, or Dinov2."""
    cfg = encoder.cfg
    _refuse_unlike(encoder, "transformers")
    if cfg.layer_scale is None:
        raise ExportError(
            "transformers' DINOv2 always has LayerScale and this encoder has none (student.layer_scale: null): "
            "export it to timm, onnx or safetensors instead"
        )
    registers = cfg.num_registers > 0
    config = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": cfg.embed_dim, "num_hidden_layers": cfg.depth, "num_attention_heads": cfg.num_heads,
        "mlp_ratio": int(cfg.mlp_ratio) if cfg.mlp_ratio == int(cfg.mlp_ratio) else cfg.mlp_ratio,
        "hidden_act": "gelu", "layer_norm_eps": LAYER_NORM_EPS, "image_size": cfg.image_size,
        "patch_size": cfg.patch_size, "num_channels": 3, "qkv_bias": True, "layerscale_value": cfg.layer_scale,
        "drop_path_rate": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "use_swiglu_ffn": False, "torch_dtype": "float32",
    }  # fmt: skip
    if registers:
        config["num_register_tokens"] = cfg.num_registers
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (folder / PREPROCESSOR).write_text(json.dumps(encoder.transform.transformers(), indent=2) + "\n")
    _save(hf_state(encoder), folder)


def read_hf(folder: Path) -> Reader:
    """transformers' own model by `from_pretrained`; a name that it misses or does not know is an error."""
    import_timm()  # makes torchvision importable beside a CPU torch, which transformers wants too
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ExportError(
            f"the hf export is compared with the package transformers ({error}): pip install transformers"
        ) from error
    with _quiet():
        model, loading = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, loading.get(kind) or [])):
            shown = ", ".join(names[:4])
            raise ExportError(f"transformers does not take the weights that were written: {kind} {shown}")
    model = model.float().eval()

    def run(images: Tensor) -> Outputs:
        return {"tokens": model(pixel_values=images).last_hidden_state}

    return run


@contextlib.contextmanager
def _quiet():
    """Without transformers' progress bars and reports: what matters is in the loading information."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def _save(state: dict[str, Tensor], folder: Path) -> None:
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
