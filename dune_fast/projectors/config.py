"""What the run's configuration says about the projectors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

HEAD_VERSIONS = ("v1", "v2", "attn")
TRANSLATORS = ("lconv", "conv", "mlp", "transformer")


@dataclass
class HeadShape:
    """One head of the kind "heads", see `dune_fast.projectors.heads`."""

    version: str = "v2"
    """"v1" (Linear LN ReLU, plain inner layers), "v2" (residual inner layers, GELU) or "attn" (two transformer blocks,
    then v2)."""
    hidden_dim: int = 1024
    """Hidden channels; times `upsample`, up to `upsample_rank`."""
    num_inner: int = 2
    """Inner layers."""
    prenorm: bool = False
    """v2: LayerNorm and GELU before the first linear layer."""
    bias: bool = True
    """v2: whether its first and last linear layers have a bias; EUPE's have none."""
    upsample: int = 1
    """v2, patches: the head gives so many rows and columns of tokens for each patch."""
    upsample_rank: int = 0
    """The most hidden channels that `upsample` may ask for; 0 for no limit."""

    def __post_init__(self) -> None:
        if self.version not in HEAD_VERSIONS:
            raise ValueError(f"a head's version is {self.version!r}; choose one of {', '.join(HEAD_VERSIONS)}")
        if self.upsample > 1 and self.version == "v1":
            raise ValueError(f"a head of version v1 with upsample={self.upsample}: choose v2 or attn")


@dataclass
class ProjectorConfig:
    """Which projector stands between the student and every teacher."""

    kind: str = "tp"
    """One of `dune_fast.projectors.base.KINDS`: "tp", "lp", "sp", "heads", "sak", "theia"."""
    num_blocks: int = 1
    """TP: transformer blocks before the linear layer."""
    num_heads: int | None = None
    """TP: attention heads; as many as the student's by default."""
    mlp_ratio: float = 4.0
    """TP: hidden channels of the block's MLP over the student's channels."""
    layer_scale: float | None = 1e-4
    """TP: initial LayerScale."""
    which_blocks: list[int] = field(default_factory=list)
    """LP: encoder blocks that carry a projector, from 0; empty for all. SAK: those that the teachers of one source
    belong to, in their order."""
    hidden_dim: int = 768
    """LP and SP: hidden channels (LP: of every block but the last). Theia: of what its translators share."""
    last_hidden_dim: int = 3072
    """LP: hidden channels at the encoder's last block."""
    prenorm: bool = False
    """LP: LayerNorm before the first linear layer."""
    midnorm: bool = False
    """LP: LayerNorm after the first linear layer."""
    version: int = 2
    """SP: 1 = Linear LN ReLU [Linear LN ReLU] x num_inner Linear; 2 = Linear, residual [LN GELU Linear] x num_inner,
    LN GELU Linear."""
    num_inner: int = 0
    """SP: inner layers."""
    down_ratio: int = 4
    """SAK: the student's channels over the adapters' hidden ones."""
    cls_head: HeadShape = field(default_factory=HeadShape)
    """Heads: of the cls token."""
    patch_head: HeadShape = field(default_factory=HeadShape)
    """Heads: of the patches."""
    translator: str = "lconv"
    """Theia: one of `TRANSLATORS`, see `dune_fast.projectors.theia`."""
    hidden_factor: float = 1.0
    """Theia, lconv: channels of the convolutions over the student's."""
    source_grid: int = 0
    """Theia: rows of patches of the run's images; 0 for those of `student.image_size`."""
    translator_layers: int = 2
    """Theia, transformer: layers of the decoder."""
    translator_heads: int = 8
    """Theia, transformer: attention heads of the decoder."""
    teachers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """teacher -> fields that differ for its projector, e.g. {sam: {patch_head: {upsample: 2}}}; not `kind` or
    `which_blocks`, which all projectors share."""

    def __post_init__(self) -> None:
        if self.translator not in TRANSLATORS:
            raise ValueError(
                f"projector.translator is {self.translator!r}; choose one of {', '.join(TRANSLATORS)}"
            )

    def of(self, teacher: str) -> ProjectorConfig:
        """The configuration of one teacher's projector. ValueError for a field that there is not."""
        return _replaced(self, self.teachers.get(teacher, {}), f"projector.teachers.{teacher}")


def _alike(value: Any, own: Any) -> bool:
    """Whether a value can stand for another: true or false, text, a whole number, or any number; None is a number's."""
    if isinstance(own, bool) or isinstance(value, bool) or isinstance(own, str):
        return type(value) is type(own)
    return isinstance(value, int if isinstance(own, int) else int | float | None)


def _replaced(cfg: Any, values: dict[str, Any], where: str) -> Any:
    """A dataclass with other values, those of dataclasses inside it included."""
    known = {f.name for f in dataclasses.fields(cfg)} - {"kind", "which_blocks", "teachers"}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where} has {', '.join(unknown)}; it may have {', '.join(sorted(known))}")
    found = {}
    for name, value in values.items():
        own = getattr(cfg, name)
        nested = dataclasses.is_dataclass(own)
        if nested != isinstance(value, dict):
            raise ValueError(f"{where}.{name} is {value!r}; {'give fields of it' if nested else 'give one value'}")
        if not nested and not _alike(value, own):
            raise ValueError(f"{where}.{name} is {value!r}; give a value like {own!r}")
        found[name] = _replaced(own, value, f"{where}.{name}") if nested else value
    return dataclasses.replace(cfg, **found)
