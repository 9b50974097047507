"""The type in which a frozen teacher computes, and how its weights get there.

    fp32   float32 weights, no autocast (convolutions as `torch.backends.cudnn.allow_tf32` says)
    bf16   matrix products and convolutions in bfloat16, their weights kept in it; the stream of tokens between blocks,
           norms, positions and gains stay float32, unless `stream` and `epilogue_gelu` say otherwise
    fp8    as bf16, and the linear layers of every block but the first and the last that run in float8 (e4m3) with
           row-wise scales, see `kernels.fp8`: with patch embedding and final norm these are where quantization hurts

fp8 needs the ViT of `kernels/nn` and NVIDIA's compute capability 8.9, or a CPU, for tests. What a precision does to
the features is measured by `teachers.drift`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from dune_fast.kernels.attention import attention, resolve_backend
from dune_fast.kernels.nn.block import MLP, Block, SelfAttention
from dune_fast.teachers.config import TeacherConfig, check_config
from dune_fast.teachers.protocol import Trunk
from dune_fast.teachers.registry import check_family, family_class
from dune_fast.teachers.vit import ViTTeacher, ViTTrunk

FP8_CAPABILITY = (8, 9)
"""NVIDIA's compute capability from which the matrix units take float8."""


def resolve_precision(
    name: str, cfg: TeacherConfig, autocast_dtype: torch.dtype | None, device: torch.device
) -> TeacherConfig:
    """The configuration with "auto" decided: bf16 where the run's `autocast_dtype` is torch.bfloat16, fp32 for None.

    ValueError for what is not to be had with this family or on this device.
    """
    check_family(name, cfg.family)
    check_config(name, cfg)
    if autocast_dtype not in (None, torch.bfloat16):
        raise ValueError(f"teachers compute in float32 or torch.bfloat16 by default, not in {autocast_dtype}")
    if not issubclass(family_class(cfg.family), ViTTeacher):
        _refuse_foreign(name, cfg)
    if cfg.precision == "fp8" and device.type != "cpu" and not _has_fp8(device):
        needed, found = ".".join(map(str, FP8_CAPABILITY)), torch.cuda.get_device_name(device)
        raise ValueError(
            f"teachers.{name}.precision is fp8, which needs NVIDIA's compute capability {needed} or newer; "
            f"{device} is {found}; choose bf16"
        )
    if cfg.precision != "auto":
        return cfg
    if autocast_dtype is None:  # what belongs to bf16 goes with it
        return replace(cfg, precision="fp32", stream="fp32", epilogue_gelu=False)
    return replace(cfg, precision="bf16")


def _refuse_foreign(name: str, cfg: TeacherConfig) -> None:
    """ValueError if something is asked for that only the blocks of `kernels.nn` have."""
    if cfg.precision == "fp8":
        raise ValueError(
            f"teachers.{name}.precision is fp8, but only ViTs of this project's own blocks can be quantized, not the "
            f"family {cfg.family!r}; choose bf16"
        )
    if cfg.stream != "fp32" or cfg.epilogue_gelu:
        raise ValueError(
            f"teachers.{name}.stream and epilogue_gelu are for ViTs of this project's own blocks, not for the family "
            f"{cfg.family!r}; leave them at fp32 and false"
        )
    if cfg.attention != "auto":
        raise ValueError(
            f"teachers.{name}.attention is {cfg.attention!r}, but the family {cfg.family!r} brings its own attention; "
            "leave it at auto"
        )


def _has_fp8(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a trunk of this precision runs and is read; an outer autocast has no influence inside."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32")


def prepare(name: str, cfg: TeacherConfig, trunk: Trunk, device: torch.device) -> None:
    """Gives a trunk, all of whose readers are built, its precision and attention, and moves it to the device.

    `cfg` is that of a teacher that reads the trunk, its precision resolved. Weights come in float32 on the CPU and are
    cast there: the device never holds a teacher in float32 that runs in less. ValueError for a network that fp8 or the
    attention backend does not take.
    """
    if isinstance(trunk, ViTTrunk):
        trunk.drop_unread()
        if cfg.precision == "fp8":
            _quantize(name, trunk)
    if cfg.precision != "fp32":
        for module in trunk.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):  # what autocast would cast at every call
                module.to(torch.bfloat16)
    for module in trunk.modules():
        if isinstance(module, SelfAttention):
            module.backend = cfg.attention
        if cfg.epilogue_gelu and isinstance(module, Block):
            if not isinstance(module.mlp, MLP) or module.mlp.activation != "gelu":
                found = "SwiGLU" if not isinstance(module.mlp, MLP) else module.mlp.activation
                raise ValueError(f"teachers.{name}.epilogue_gelu is true, but its blocks have {found}; set it to false")
            module.mlp.epilogue_gelu = True
    if isinstance(trunk, ViTTrunk) and cfg.precision != "fp32":
        # said outright: where no position table is added, the embedding is bf16, and the stream would be too
        trunk.vit.stream_dtype = torch.bfloat16 if cfg.stream == "bf16" else torch.float32
    if cfg.attention != "auto":
        _try_attention(name, cfg, trunk, device)
    trunk.to(device)


def _quantize(name: str, trunk: ViTTrunk) -> None:
    inner = trunk.vit.blocks[1:-1]
    if not inner:
        raise ValueError(
            f"teachers.{name}.precision is fp8, but of {len(trunk.vit.blocks)} blocks that run none is left between "
            "the first and the last, which stay in bf16; choose bf16"
        )
    for block in inner:
        try:
            block.quantize()
        except ValueError as error:
            raise ValueError(f"teachers.{name}.precision is fp8: {error}; choose bf16") from error


def _try_attention(name: str, cfg: TeacherConfig, trunk: Trunk, device: torch.device) -> None:
    """One small call, so that a backend which is not to be had here is said now and not in the first step."""
    dtype = torch.float32 if cfg.precision == "fp32" else torch.bfloat16
    layer = next((module for module in trunk.modules() if isinstance(module, SelfAttention)), None)
    if layer is None:
        raise ValueError(
            f"teachers.{name}.attention is {cfg.attention!r}, but the family {cfg.family!r} adds positions to its "
            "scores, which these backends do not take; leave it at auto"
        )
    head_dim = layer.proj.in_features // layer.num_heads
    qkv = torch.zeros(1, 16, 3, layer.num_heads, head_dim, dtype=dtype, device=device)
    try:
        resolve_backend(cfg.attention, qkv)
        with torch.no_grad():
            attention(qkv, cfg.attention)
    except (ValueError, RuntimeError) as error:  # torch's own say which of its backends is not viable
        raise ValueError(
            f"teachers.{name}.attention is {cfg.attention!r}, which cannot compute {cfg.precision} with {head_dim} "
            f"channels a head on {device}: {str(error).splitlines()[0]}; auto takes the fastest that can"
        ) from error
