"""What the run's configuration says about one teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "PRECISIONS", "STREAMS", "TOKEN_TYPES", "TeacherConfig", "check_config"]

TOKEN_TYPES = ("cls", "patch")
PRECISIONS = ("auto", "bf16", "fp8", "fp32")
STREAMS = ("fp32", "bf16")


@dataclass
class TeacherConfig:
    """One teacher. Two that name the same family, weights and way of computing share one forward pass."""

    family: str = "???"
    """Name in the registry, see `teachers.registry.families`: "dinov2", "mast3r", "timm", "module", ..."""
    weights: str = "???"
    """The path of a file, "asset:NAME" (fetched and verified, see `teachers.assets`), or, in most families,
    "random:SEED" for tests and benchmarks."""
    patch_size: int = 14
    """Pixels of the teacher's image, in each direction, that one patch token stands for."""
    num_features: int = 384
    """Channels of a token."""
    token_types: list[str] = field(default_factory=lambda: ["cls", "patch"])
    """Which tokens are distilled: "cls", "patch" or both."""
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    """The teacher takes (image - mean) / std of an RGB image in [0, 1]."""
    std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))
    """See `mean`."""
    groups: list[str] = field(default_factory=list)
    """Groups of datasets whose images count as the teacher's own, for data sharing."""
    grid_multiple: int = 1
    """Rows and columns of the patch grid must be multiples of this."""
    layer: int | None = None
    """ViT: read the tokens after this many blocks through a LayerNorm without weights; null reads the final norm."""
    norm: bool = True
    """ViT: whether the tokens pass the norm that `layer` names; false gives them as the blocks leave them."""
    precision: str = "auto"
    """See `teachers.precision`: "fp32" (weights too), "bf16", "fp8" (ViT alone, compute capability 8.9 or newer), or
    "auto": as the run's own matrix products."""
    force_precision: bool = False
    """Train with this precision even if it changes the features by more than `teachers.drift` allows."""
    stream: str = "fp32"
    """ViT in bf16 or fp8: type of the tokens between blocks, "fp32" or "bf16". bf16 moves two thirds of the bytes in
    every residual addition and norm, and drifts a little more."""
    epilogue_gelu: bool = False
    """ViT in bf16: bias and GELU (on a GPU in its tanh form, which is within bf16's rounding) come with the product
    before them, in one kernel of cuBLASLt, instead of a pass of their own."""
    attention: str = "auto"
    """ViT: backend of self-attention, one of `kernels.attention.BACKENDS`."""
    compile: bool = False
    """Compile the network with torch.compile, once for every shape of a batch it meets."""
    cuda_graph: bool = False
    """Replay the network as a CUDA graph, one for every shape; worth it where launches cost more than the products:
    few images a GPU. Costs the memory of one forward pass a shape."""
    image_size: int | None = None
    """Side in pixels of the square images its weights were made for. Other sizes are allowed: positions adapt."""
    num_heads: int | None = None
    """ViT: attention heads; null for what the file says, else channels / 64."""
    num_registers: int | None = None
    """ViT: register tokens that the weights must have; null for whatever they have."""
    interpolate_offset: float | None = None
    """ViT: 0 resizes the position table by size, above 0 by the factor (n + offset) / M; null for the family's own."""
    interpolate_antialias: bool | None = None
    """ViT: whether the position table is resized with antialias; null for the family's own."""
    model: str = ""
    """Family "timm": the model's name there. Family "module": import path of a factory, "package.module:factory"."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Families "timm" and "module": further arguments of the model's factory."""
    url: str = ""
    """Where its publisher offers the weights file, for `dune-fast teachers fetch`; empty if there is no such place."""
    bytes: int | None = None
    """Size of that file; null if not known."""
    sha256: str = ""
    """SHA-256 of that file in hexadecimal; empty if not known."""


def check_config(name: str, cfg: TeacherConfig) -> None:
    """Raise a ValueError that names the field if `cfg` cannot be right whatever the family."""

    def refuse(key: str, given: object, allowed: str) -> None:
        raise ValueError(f"teachers.{name}.{key} is {given!r}; {allowed}")

    for key in ("patch_size", "num_features", "grid_multiple"):
        if getattr(cfg, key) < 1:
            refuse(key, getattr(cfg, key), "it must be at least 1")
    tokens = list(cfg.token_types)
    if not tokens or len(set(tokens)) != len(tokens) or not set(tokens) <= set(TOKEN_TYPES):
        refuse("token_types", tokens, f"choose one or more of {', '.join(TOKEN_TYPES)}, each once")
    for key in ("mean", "std"):
        if len(getattr(cfg, key)) != 3:
            refuse(key, list(getattr(cfg, key)), "give three numbers: red, green, blue")
    if min(cfg.std) <= 0:
        refuse("std", list(cfg.std), "deviations must be above 0")
    for key in ("image_size", "num_heads"):
        if (value := getattr(cfg, key)) is not None and value < 1:
            refuse(key, value, "it must be at least 1, or null")
    if cfg.interpolate_offset is not None and not 0 <= cfg.interpolate_offset < 1:
        refuse("interpolate_offset", cfg.interpolate_offset, "give 0 (by size) up to below 1, e.g. 0.1, or null")
    if cfg.precision not in PRECISIONS:
        refuse("precision", cfg.precision, f"choose one of {', '.join(PRECISIONS)}")
    if cfg.stream not in STREAMS:
        refuse("stream", cfg.stream, f"choose one of {', '.join(STREAMS)}")
    if cfg.precision == "fp32" and (cfg.stream != "fp32" or cfg.epilogue_gelu):
        refuse("precision", cfg.precision, "stream=bf16 and epilogue_gelu are for bf16 and fp8")
    if cfg.layer is not None and cfg.layer < 1:
        refuse("layer", cfg.layer, "count blocks from 1, or give null for the final norm")
