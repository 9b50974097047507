"""The encoders that a student may have: a table of families."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig

ENCODERS = {
    "vit": "dune_fast.kernels.nn.vit:VisionTransformer",
    "theia": "dune_fast.kernels.nn.theia:TheiaViT",
}
"""Family -> module and class, imported when asked for. Its `for_student(cfg, num_cls)` builds one with drawn weights'
shapes; `num_cls`: cls tokens that the student has."""


@dataclass
class EncoderConfig(ViTConfig):
    """An encoder of any family."""

    family: str = "vit"
    """One of `ENCODERS`: "vit" (DUNE's and UNIC's), "theia" (Hugging Face's ViT)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.family not in ENCODERS:
            raise ValueError(f"student.family is {self.family!r}; choose one of {', '.join(ENCODERS)}")


def build_encoder(cfg: EncoderConfig, num_cls: int) -> VisionTransformer:
    """The encoder of a student. ValueError where its family has not so many cls tokens."""
    return encoder_class(cfg.family).for_student(cfg, num_cls)


def encoder_class(family: str) -> type[VisionTransformer]:
    """The network of a family of `ENCODERS`."""
    module, _, name = ENCODERS[family].partition(":")
    return getattr(import_module(module), name)
