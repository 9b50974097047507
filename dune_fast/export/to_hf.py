"""`--to hf`: a folder for transformers' `AutoModel`, `AutoImageProcessor` and `pipeline`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dune_fast.export import to_hf_radio
from dune_fast.export.check import ExportError, Outputs, Reader
from dune_fast.export.dinov2_alike import CONFIG, WEIGHTS, refuse_unlike
from dune_fast.export.to_safetensors import PLAIN, save
from dune_fast.kernels.nn.block import LAYER_NORM_EPS
from dune_fast.kernels.nn.radio import RADIOViT
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.teachers.timm_model import import_timm

_STARTS = {
    "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens", "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm.": "layernorm.", "blocks.": "encoder.layer.",
}  # fmt: skip
_ENDS = {
    "attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
}  # fmt: skip
"""Our names -> transformers'."""


def hf_state(encoder: VisionTransformer) -> dict[str, Tensor]:
    """The encoder's tensors by the names of transformers' DINOv2: queries, keys and values apart."""
    state = {"embeddings.mask_token": torch.zeros(1, encoder.cfg.embed_dim)}
    for key, value in encoder.state_dict().items():
        start = next((ours for ours in _STARTS if key.startswith(ours)), "")
        key = _STARTS.get(start, "") + key.removeprefix(start)
        for ours, theirs in _ENDS.items():
            key = key.replace(ours, theirs)
        if ".attn.qkv." in key:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[key.replace("attn.qkv", f"attention.attention.{part}")] = rows
        else:
            state[key] = value
    return state


def write(encoder: VisionTransformer, folder: Path, about: Mapping[str, str] = PLAIN) -> None:
    """Writes both configurations and `model.safetensors`, of a Dinov2WithRegisters, without registers a Dinov2, or
    of RADIO's family a RadioModel.

    `about` is metadata of the latter.
    """
    if isinstance(encoder, RADIOViT):
        to_hf_radio.write(encoder, folder, about)
        return
    cfg = encoder.cfg
    refuse_unlike(encoder, "transformers")
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
    (folder / "preprocessor_config.json").write_text(json.dumps(encoder.transform.transformers(), indent=2) + "\n")
    save(folder / WEIGHTS, hf_state(encoder), {"format": "pt", **about})


def read(folder: Path) -> Reader:
    """transformers' own model by `from_pretrained`; a name that it misses or does not know is an error."""
    import_timm()  # makes torchvision importable beside a CPU torch, which transformers wants too
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ExportError(
            f"the hf export is compared with the package transformers ({error}): pip install transformers"
        ) from error
    if to_hf_radio.is_radio(folder):
        to_hf_radio.require_model()
    with _quiet():
        model, loading = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, loading.get(kind) or [])):
            shown = ", ".join(names[:4])
            raise ExportError(f"transformers does not take the weights that were written: {kind} {shown}")
    model = model.float().eval()

    if to_hf_radio.is_radio(folder):
        return to_hf_radio.reader(model, folder)

    def run(images: Tensor) -> Outputs:
        return {"tokens": model(pixel_values=images).last_hidden_state}

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
