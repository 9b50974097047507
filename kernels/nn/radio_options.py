"""What a student of RADIO's family has beyond a plain ViT: `student.radio` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RADIOOptions:
    """Options of `student.family: radio`; the defaults are an ordinary ViT with a summary token."""

    cpe_max_size: int = 0
    """Pixels that the position table is made for, rounded to the patch; 0 for `student.image_size`. A larger one is
    cropped for every image (CPE)."""
    position_dropout: float = 0.0
    """Probability that an image is trained without positions; RADIO has 0.1."""
    register_multiple: int = 0
    """Summary tokens and registers together are the next multiple of this, with a register at least; 0 for
    `student.num_registers`."""
    conditioner: str = "clip"
    """"clip" brings images, normalised by ImageNet's statistics, to CLIP's, as the releases want them; it is folded
    into the patch projection. Empty for images as they come."""
    patch_bias: bool = False
    """Whether the patch projection has a bias; the releases of patch 16 have none."""
    window_sizes: list[int] = field(default_factory=list)
    """Sides of attention windows in patches, one of which a windowed step draws; empty for whole attention."""
    window_probability: float = 1.0
    """Probability that a step is windowed."""
    num_windowed: int = 0
    """Windowed blocks before each global one; 0 for a period of depth // `num_global`."""
    num_global: int = 4
    """Global blocks, where `num_windowed` is 0."""
    spectral: int = 0
    """Spectral reparametrisation of the blocks' linear weights: 0 for none, or its version, 1 or 2."""

    def __post_init__(self) -> None:
        if self.conditioner not in ("clip", ""):
            raise ValueError(f"student.radio.conditioner={self.conditioner!r}; choose 'clip' or ''")
        if self.spectral not in (0, 1, 2):
            raise ValueError(f"student.radio.spectral={self.spectral}; choose 0 (none), 1 or 2")
        for name in ("position_dropout", "window_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"student.radio.{name}={getattr(self, name):g}; give a probability from 0 to 1")
        for name in ("cpe_max_size", "register_multiple", "num_windowed"):
            if getattr(self, name) < 0:
                raise ValueError(f"student.radio.{name}={getattr(self, name)}; give 0 or more")
        if any(side < 1 for side in self.window_sizes):
            raise ValueError(f"student.radio.window_sizes={list(self.window_sizes)}; give sides of 1 patch or more")
        if self.num_global < 1:
            raise ValueError(f"student.radio.num_global={self.num_global}; give 1 or more")
