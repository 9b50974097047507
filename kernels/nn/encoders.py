"""The encoders that a student may have: a table of families."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig

ENCODERS = {"vit": "dune_fast.kernels.nn.vit:VisionTransformer"}
"""Family -> module and class, imported when asked for. Its `for_student(cfg, num_cls)` builds one with drawn weights'
shapes; `num_cls`: cls tokens that the student has."""


@dataclass
class EncoderConfig(ViTConfig):
    """An encoder of any family."""

    family: str = "vit"
    """One of `ENCODERS`: "vit" (DUNE's and UNIC's)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.family not in ENCODERS:
            raise ValueError(f"student.family is {self.family!r}; choose one of {', '.join(ENCODERS)}")


def build_encoder(cfg: EncoderConfig, num_cls: int) -> VisionTransformer:
    """The encoder of a student. ValueError where its family has not so many cls tokens."""
    module, _, name = ENCODERS[cfg.family].partition(":")
    return getattr(import_module(module), name).for_student(cfg, num_cls)
