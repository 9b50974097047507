"""The encoders that a student may have: a table of families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from typing import Any

import torch

from dune_fast.kernels.nn.radio_options import RADIOOptions
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig, plain

ENCODERS = {
    "vit": "dune_fast.kernels.nn.vit:VisionTransformer",
    "radio": "dune_fast.kernels.nn.radio:RADIOViT",
    "theia": "dune_fast.kernels.nn.theia:TheiaViT",
}
"""Family -> module and class, imported when asked for. Its `for_student(cfg, num_cls)` builds one with drawn weights'
shapes; `num_cls`: cls tokens that the student has."""


@dataclass
class EncoderConfig(ViTConfig):
    """An encoder of any family."""

    family: str = "vit"
    """One of `ENCODERS`: "vit" (DUNE's and UNIC's), "radio", "theia" (Hugging Face's ViT)."""
    radio: RADIOOptions = field(default_factory=RADIOOptions)
    """Family "radio"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.family not in ENCODERS:
            raise ValueError(f"student.family is {self.family!r}; choose one of {', '.join(ENCODERS)}")


def encoder_class(family: str) -> type[VisionTransformer]:
    """The class of a family of `ENCODERS`, its module imported."""
    module, _, name = ENCODERS[family].partition(":")
    return getattr(import_module(module), name)


def build_encoder(cfg: EncoderConfig, num_cls: int) -> VisionTransformer:
    """The encoder of a student. ValueError where its family has not so many cls tokens."""
    return encoder_class(cfg.family).for_student(cfg, num_cls)


def family_of(cfg: ViTConfig) -> str:
    """The family whose class a configuration belongs to, by its type: "vit" for a plain one."""
    return getattr(type(cfg), "network_family", "vit")


def network(cfg: ViTConfig) -> type[VisionTransformer]:
    """The class that `cfg` is the architecture of."""
    return encoder_class(family_of(cfg))


def as_stored(cfg: ViTConfig) -> dict[str, Any]:
    """An architecture as plain values, for a file's metadata; `from_stored` reads it."""
    family = family_of(cfg)
    return asdict(plain(cfg)) if family == "vit" else {"family": family, **asdict(cfg)}


def from_stored(values: Mapping[str, Any]) -> ViTConfig:
    """The architecture that `as_stored` wrote. TypeError, ValueError where it is senseless."""
    if not isinstance(values, Mapping):
        raise TypeError(f"it is {values!r}")
    values = dict(values)
    family = values.pop("family", "vit")
    if family not in ENCODERS:
        raise ValueError(f"family is {family!r}; known are {', '.join(ENCODERS)}")
    return encoder_class(family).config_class(**values)


def encoder_config(values: Mapping[str, Any]) -> EncoderConfig:
    """The encoder's part of the section `student` of a run. TypeError, ValueError where it is senseless."""
    known = {f.name for f in fields(EncoderConfig)}
    given = {key: value for key, value in values.items() if key in known}
    if isinstance(given.get("radio"), Mapping):
        given["radio"] = RADIOOptions(**given["radio"])
    return EncoderConfig(**given)


def architecture(cfg: EncoderConfig, num_cls: int) -> ViTConfig:
    """The architecture of a student's encoder with so many cls tokens."""
    with torch.device("meta"):
        return build_encoder(cfg, num_cls).cfg
