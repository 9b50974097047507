"""`--to onnx`: the encoder as an ONNX graph of standard operators, for any batch, height and width.

The graph is written node by node rather than traced: a tracer would freeze the image size into the position table's
interpolation. ONNX's Resize takes the scale factor (n + offset) / M as the published student does, and factor 1 where
the grid is the table's own, so every size is computed as by `dune_fast.kernels.nn.vit`.

Input: `images` [batch, 3, height, width], float32, ImageNet-normalised, height and width multiples of the patch size.
Outputs: `x_norm_clstoken` [batch, D], `x_norm_regtokens` [batch, R, D] (if there are registers), `x_norm_patchtokens`
[batch, N, D], `x_prenorm` [batch, 1 + R + N, D].
Metadata (`metadata_props`): `preprocessing`, how images become the input, and `vit_config`, both JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dune_fast.export.check import ExportError, Reader
from dune_fast.export.to_safetensors import PLAIN
from dune_fast.kernels.nn.block import LAYER_NORM_EPS, Block
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.teachers.architecture import ARCHITECTURE, PREPROCESSING

FILE = "encoder.onnx"
OPSET = 20  # the first with Gelu; onnxruntime has it since 1.17
IR_VERSION = 9  # the one that came with that opset: newer ones are refused by older runtimes
_SIZE_LIMIT = 2**31 - 2**20  # bytes of weights; a protobuf file has no more than 2 GiB

_CUBIC, _CUBIC_ANTIALIAS = -0.75, -0.5
"""torch's coefficients of bicubic interpolation; the second is PIL's, which it uses with antialias."""


class Graph:
    """Nodes and constants under construction; every method returns the name of a tensor."""

    def __init__(self, onnx: ModuleType) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """One node with one output."""
        name = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def split(self, x: str, parts: int) -> list[str]:
        """x [..., parts * C] -> parts times [..., C]."""
        names = [f"Split_{len(self.nodes)}_{i}" for i in range(parts)]
        self.nodes.append(self.onnx.helper.make_node("Split", [x], names, axis=-1, num_outputs=parts))
        return names

    def constant(self, value: Tensor | np.ndarray | list[int], name: str | None = None) -> str:
        """A tensor of weights, or a list of integers."""
        if isinstance(value, Tensor):
            value = value.detach().cpu().float().numpy()
        elif isinstance(value, list):
            value = np.array(value, np.int64)
        name = name or f"constant_{len(self.constants)}"
        self.constants[name] = np.ascontiguousarray(value)
        return name

    def linear(self, x: str, layer: torch.nn.Linear, name: str) -> str:
        """x [..., C] -> [..., out]."""
        product = self.op("MatMul", x, self.constant(layer.weight.t(), f"{name}.weight"))
        return self.op("Add", product, self.constant(layer.bias, f"{name}.bias"))

    def norm(self, x: str, layer: torch.nn.LayerNorm, name: str) -> str:
        """LayerNorm over the last dimension."""
        parameters = self.constant(layer.weight, f"{name}.weight"), self.constant(layer.bias, f"{name}.bias")
        return self.op("LayerNormalization", x, *parameters, axis=-1, epsilon=LAYER_NORM_EPS)

    def branch(self, x: str, y: str, scale: torch.nn.Module, name: str) -> str:
        """x + gamma * y."""
        gamma = getattr(scale, "gamma", None)
        if gamma is not None:
            y = self.op("Mul", y, self.constant(gamma, f"{name}.gamma"))
        return self.op("Add", x, y)


def _positions(g: Graph, grid: str, encoder: VisionTransformer) -> str:
    """The table's patch positions for a grid ([rows, columns], int64), [1, N, D]."""
    cfg, dim = encoder.cfg, encoder.cfg.embed_dim
    side = cfg.image_size // cfg.patch_size
    table = encoder.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    table_name = g.constant(table, "pos_embed")
    how = {
        "mode": "cubic", "coordinate_transformation_mode": "half_pixel", "antialias": int(cfg.interpolate_antialias),
        "exclude_outside": int(cfg.interpolate_antialias),  # torch then leaves out what lies beyond the border
        "cubic_coeff_a": _CUBIC_ANTIALIAS if cfg.interpolate_antialias else _CUBIC,
    }  # fmt: skip
    if cfg.interpolate_offset:
        factor = g.op("Cast", grid, to=g.onnx.TensorProto.FLOAT)
        factor = g.op("Add", factor, g.constant(np.full(2, cfg.interpolate_offset, np.float32)))
        factor = g.op("Div", factor, g.constant(np.full(2, side, np.float32)))
        same = g.op("Cast", g.op("Equal", grid, g.constant([side, side])), to=g.onnx.TensorProto.INT32)
        native = g.op("Cast", g.op("ReduceMin", same, keepdims=1), to=g.onnx.TensorProto.BOOL)
        one = g.constant(np.ones(2, np.float32))
        scales = g.op("Concat", one, g.op("Where", native, one, factor), axis=0)
        resized = g.op("Resize", table_name, "", scales, **how)
    else:
        target = g.op("Concat", g.constant([1, dim]), grid, axis=0)
        resized = g.op("Resize", table_name, "", "", target, **how)
    return g.op("Transpose", g.op("Reshape", resized, g.constant([1, dim, -1])), perm=[0, 2, 1])


def _embedding(g: Graph, encoder: VisionTransformer) -> str:
    """images -> tokens before the first block, [B, 1 + R + N, D]."""
    cfg, dim = encoder.cfg, encoder.cfg.embed_dim
    proj, patch = encoder.patch_embed.proj, [cfg.patch_size] * 2
    weights = g.constant(proj.weight, "patch_embed.weight"), g.constant(proj.bias, "patch_embed.bias")
    patches = g.op("Conv", "images", *weights, kernel_shape=patch, strides=patch)
    batch = g.op("Shape", patches, start=0, end=1)
    grid = g.op("Shape", patches, start=2, end=4)
    flat = g.op("Transpose", g.op("Reshape", patches, g.constant([0, 0, -1])), perm=[0, 2, 1])
    tokens = g.op("Add", flat, _positions(g, grid, encoder))
    prefix = [encoder.cls_token + encoder.pos_embed[:, :1]]  # registers have no position
    prefix += [encoder.register_tokens] if cfg.num_registers else []
    shape = g.op("Concat", batch, g.constant([encoder.num_prefix_tokens, dim]), axis=0)
    leading = g.op("Expand", g.constant(torch.cat(prefix, dim=1), "prefix_tokens"), shape)
    return g.op("Concat", leading, tokens, axis=1)


def _block(g: Graph, x: str, block: Block, name: str) -> str:
    """One pre-norm block, [B, N, D] -> [B, N, D]."""
    heads, dim = block.attn.num_heads, block.attn.proj.in_features
    split_heads = g.constant([0, 0, heads, dim // heads])
    parts = g.split(g.linear(g.norm(x, block.norm1, f"{name}.norm1"), block.attn.qkv, f"{name}.attn.qkv"), 3)
    query, key, value = (g.op("Reshape", part, split_heads) for part in parts)
    query = g.op("Mul", query, g.constant(np.array([math.sqrt(heads / dim)], np.float32)))
    query = g.op("Transpose", query, perm=[0, 2, 1, 3])
    key = g.op("Transpose", key, perm=[0, 2, 3, 1])
    weights = g.op("Softmax", g.op("MatMul", query, key), axis=-1)
    out = g.op("MatMul", weights, g.op("Transpose", value, perm=[0, 2, 1, 3]))
    out = g.op("Reshape", g.op("Transpose", out, perm=[0, 2, 1, 3]), g.constant([0, 0, dim]))
    x = g.branch(x, g.linear(out, block.attn.proj, f"{name}.attn.proj"), block.ls1, f"{name}.ls1")
    hidden = g.linear(g.norm(x, block.norm2, f"{name}.norm2"), block.mlp.fc1, f"{name}.mlp.fc1")
    out = g.linear(g.op("Gelu", hidden, approximate="none"), block.mlp.fc2, f"{name}.mlp.fc2")
    return g.branch(x, out, block.ls2, f"{name}.ls2")


def build_graph(encoder: VisionTransformer, about: Mapping[str, str] = PLAIN) -> Any:
    """The whole model as a `ModelProto`, checked; `about` is further metadata.

    Raises:
        ExportError: the package onnx is missing, or the encoder is none that this writer knows.
    """
    try:
        import onnx
    except ImportError as error:
        raise ExportError(f"the onnx export needs the package onnx ({error}): pip install onnx") from error
    cfg = encoder.cfg
    _refuse(encoder)
    g = Graph(onnx)
    x = _embedding(g, encoder)
    for i, block in enumerate(encoder.blocks):
        x = _block(g, x, block, f"blocks.{i}")
    prenorm = g.op("Identity", x, name="x_prenorm")
    normed = g.norm(prenorm, encoder.norm, "norm") if cfg.final_norm else prenorm
    prefix, last = encoder.num_prefix_tokens, np.iinfo(np.int64).max
    spans = {"x_norm_regtokens": (1, prefix), "x_norm_patchtokens": (prefix, last)}
    first = g.op("Slice", normed, g.constant([0]), g.constant([1]), g.constant([1]))
    g.op("Squeeze", first, g.constant([1]), name="x_norm_clstoken")
    shapes: dict[str, list] = {"x_norm_clstoken": ["batch", cfg.embed_dim]}
    for name, (start, end) in spans.items():
        if end > start:
            g.op("Slice", normed, g.constant([start]), g.constant([end]), g.constant([1]), name=name)
            shapes[name] = ["batch", end - start if end != last else "patches", cfg.embed_dim]
    shapes["x_prenorm"] = ["batch", "tokens", cfg.embed_dim]
    info, real = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        g.nodes, "encoder",
        [info("images", real, ["batch", 3, "height", "width"])],
        [info(name, real, shape) for name, shape in shapes.items()],
        [onnx.numpy_helper.from_array(value, name) for name, value in g.constants.items()],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="dune_fast")
    properties = {ARCHITECTURE: json.dumps(asdict(cfg)), PREPROCESSING: encoder.transform.as_json()}
    onnx.helper.set_model_props(model, properties | about)
    onnx.checker.check_model(model, full_check=True)
    return model


def _refuse(encoder: VisionTransformer) -> None:
    cfg = encoder.cfg
    plain = type(encoder) is VisionTransformer and cfg.pos_embed == "learned" and cfg.cls_token
    if not plain or not all(hasattr(block.mlp, "fc1") for block in encoder.blocks):
        raise ExportError(
            "the onnx export knows encoders of the family vit with a cls token, a learned position table and GELU's "
            "MLP alone: export this one to safetensors instead"
        )
    size = sum(p.numel() * 4 for p in encoder.parameters())
    if size > _SIZE_LIMIT:
        raise ExportError(f"an ONNX file holds at most 2 GiB and this encoder has {size / 2**30:.1f} GiB of weights")


def write(encoder: VisionTransformer, folder: Path, about: Mapping[str, str] = PLAIN) -> None:
    """Writes `encoder.onnx`; `about` is further metadata."""
    (folder / FILE).write_bytes(build_graph(encoder, about).SerializeToString())


def read(folder: Path) -> Reader:
    """onnxruntime's session on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            f"the onnx export is compared with the package onnxruntime ({error}): pip install onnxruntime"
        ) from error
    session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        values = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return run
