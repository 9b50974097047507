"""What the run's configuration says about one teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD

TOKEN_TYPES = ("cls", "patch")
PRECISIONS = ("auto", "bf16", "fp8", "fp32")
STREAMS = ("fp32", "bf16")
ACTIVATIONS = ("", "gelu", "quick_gelu")
GRIDS = ("student", "own")
RANDOM = "random:"
"""Weights called "random:SEED" are drawn, not read: for tests and benchmarks of the full size."""


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
    source: str = ""
    """Name of the model that it is read from, where several entries of `teachers` are: they share one cls token of a
    student with `cls_per_teacher`. Empty for the entry's own name."""
    grid_multiple: int = 1
    """Rows and columns of the patch grid must be multiples of this."""
    scale: float = 1.0
    """Below 1 the teacher sees its images smaller: rows and columns of its grid over the student's, rounded to what
    `grid_multiple` allows. Its patch tokens are interpolated to the student's grid. Departs from the papers."""
    input_size: int | None = None
    """Side in pixels of the images that the teacher runs on, whatever the student's: a multiple of `patch_size`. The
    student's images are resized to it (longer side, bicubic; the rest of the square is zeros); with
    `data.teacher_views` it is the size of the teacher's own crop. Null: as many patches as the student has."""
    input_sizes: list[int] = field(default_factory=list)
    """Sides of which each training step draws one, with equal chances, whatever the student's (EUPE). `input_size` is
    the largest of them: that of evaluations and estimates."""
    mosaic: int = 0
    """Side in pixels of a canvas that several of the teacher's images are packed on, for a network that is made for
    large images: `teachers.inputs.Mosaic`. 0 for one image at a time."""
    grid: str = "student"
    """Where its patch tokens are laid: "student" (bilinearly on the student's grid) or "own" (as many as it gives: the
    loss aligns them, or the projector gives that grid)."""
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
    activation: str = ""
    """CLIP, OpenCLIP: "gelu" or "quick_gelu", which the tensors do not show; empty for the family's own."""
    projected: bool = False
    """Whether tokens pass the layer that the family has behind its blocks, after which they have other channels
    (`num_features`): CLIP's projection of cls into the space of texts, SAM's neck."""
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


_READING = (
    "token_types", "source", "mean", "std", "groups", "grid_multiple", "scale", "input_size", "input_sizes", "mosaic",
    "grid", "layer",
    "norm", "projected", "force_precision", "url", "bytes", "sha256",
)  # fmt: skip
"""Fields that say what the network sees and what is read from it, or are bookkeeping."""


def network_key(cfg: TeacherConfig) -> str:
    """Equal for teachers whose networks are the same and compute in the same way."""
    network = {name: value for name, value in asdict(cfg).items() if name not in _READING}
    if not cfg.weights.startswith(RANDOM):  # the weights say it, and cls may have other channels than patches
        del network["num_features"]
    return json.dumps(network, sort_keys=True, default=repr)


def input_key(cfg: TeacherConfig) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Equal for teachers that see the same pixels of an image."""
    size = (cfg.patch_size, cfg.scale, cfg.input_size or 0, cfg.mosaic, *cfg.input_sizes)
    return size, tuple(cfg.mean), tuple(cfg.std)


def teachers_by_trunk(teachers: Mapping[str, TeacherConfig]) -> list[list[str]]:
    """Names of teachers, those that share a network and its input together."""
    shared: dict[tuple, list[str]] = {}
    for name, cfg in teachers.items():
        shared.setdefault((network_key(cfg), input_key(cfg)), []).append(name)
    return list(shared.values())


def scaled_grid(patches: int, scale: float, multiple: int = 1) -> int:
    """Rows or columns of a teacher's grid where the student's has `patches`: the nearest multiple to the scale's."""
    return patches if scale == 1 else max(1, round(patches * scale / multiple)) * multiple


def teachers_by_input(teachers: Mapping[str, TeacherConfig]) -> list[list[str]]:
    """Names of teachers, those of one file that see the same pixels together: all that might share a trunk's pass."""
    shared: dict[tuple, list[str]] = {}
    for name, cfg in teachers.items():
        shared.setdefault((cfg.family, cfg.weights, cfg.model, input_key(cfg)), []).append(name)
    return list(shared.values())


class Seen(NamedTuple):
    """What a teacher's network gets where the student has a square grid."""

    side: int
    """Pixels of what goes in: an image, or a canvas."""
    images: int
    """In one such input; 0 where not even one fits on the canvas."""
    grid: int
    """Rows of an image's own patch tokens."""


def seen(cfg: TeacherConfig, patches: int) -> Seen:
    """A teacher's input where the student has `patches` rows of patches."""
    if cfg.input_size is None:
        grid = scaled_grid(patches, cfg.scale, 1 if cfg.mosaic else cfg.grid_multiple)
    else:
        grid = cfg.input_size // cfg.patch_size
    if not cfg.mosaic:
        return Seen(grid * cfg.patch_size, 1, grid)
    from dune_fast.teachers.inputs import Mosaic  # with torch, which the command line starts without

    return Seen(cfg.mosaic, Mosaic(grid * cfg.patch_size, cfg.mosaic, cfg.patch_size).per_side ** 2, grid)


def given_patches(cfg: TeacherConfig, patches: int) -> int:
    """How many patch tokens of an image a teacher's features have where the student has `patches` rows of them."""
    return seen(cfg, patches).grid ** 2 if cfg.grid == "own" else patches**2


def check_config(name: str, cfg: TeacherConfig) -> None:
    """Raise a ValueError that names the field if `cfg` cannot be right whatever the family.

    Not in `__post_init__`, which does not know what the run calls the teacher.
    """
    least, three = "it must be at least 1", "give three numbers: red, green, blue"
    tokens, offset = set(cfg.token_types), cfg.interpolate_offset
    step = max(1, cfg.patch_size * cfg.grid_multiple)
    own, own_step = cfg.input_size, max(1, cfg.patch_size) if cfg.mosaic else step
    lean = cfg.stream != "fp32" or cfg.epilogue_gelu
    faults = [
        *((key, getattr(cfg, key) < 1, least) for key in ("patch_size", "num_features", "grid_multiple")),
        ("token_types", not tokens or len(tokens) != len(cfg.token_types) or not tokens <= set(TOKEN_TYPES),
         f"choose one or more of {', '.join(TOKEN_TYPES)}, each once"),
        ("scale", not 0 < cfg.scale <= 1, "it must lie above 0, up to 1"),
        ("scale", cfg.scale != 1 and own is not None, "with input_size it has no meaning; leave one of them out"),
        ("input_size", own is not None and (own < 1 or own % own_step),
         f"give a multiple of {own_step} pixels (whole patches, as many as its grid allows), or null"),
        ("input_sizes", any(size < 1 or size % own_step for size in cfg.input_sizes),
         f"give multiples of {own_step} pixels, or none"),
        ("input_sizes", bool(cfg.input_sizes) and max(cfg.input_sizes) != own,
         f"the largest must be input_size, which is {own}"),
        ("mosaic", cfg.mosaic < 0 or cfg.mosaic % step or 0 < cfg.mosaic < (own or 0),
         f"give a multiple of {step} pixels that is not below input_size, or 0 for none"),
        ("grid", cfg.grid not in GRIDS, f"choose one of {', '.join(GRIDS)}"),
        ("mean", len(cfg.mean) != 3, three),
        ("std", len(cfg.std) != 3, three),
        ("std", min(cfg.std, default=0) <= 0, "deviations must be above 0"),
        *((key, (value := getattr(cfg, key)) is not None and value < 1, f"{least}, or null")
          for key in ("image_size", "num_heads")),
        ("interpolate_offset", offset is not None and not 0 <= offset < 1,
         "give 0 (by size) up to below 1, e.g. 0.1, or null"),
        ("precision", cfg.precision not in PRECISIONS, f"choose one of {', '.join(PRECISIONS)}"),
        ("stream", cfg.stream not in STREAMS, f"choose one of {', '.join(STREAMS)}"),
        ("activation", cfg.activation not in ACTIVATIONS, f"choose {' or '.join(ACTIVATIONS[1:])}, or leave it empty"),
        ("precision", cfg.precision == "fp32" and lean, "stream=bf16 and epilogue_gelu are for bf16 and fp8"),
        ("layer", cfg.layer is not None and cfg.layer < 1, "count blocks from 1, or give null for the final norm"),
    ]  # fmt: skip
    for key, wrong, allowed in faults:
        if wrong:
            raise ValueError(f"teachers.{name}.{key} is {getattr(cfg, key)!r}; {allowed}")
