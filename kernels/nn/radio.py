"""RADIO's ViT: several summary tokens, a position table larger than the image (CPE), attention in windows.

Positions are added to the patches alone (`radio_positions`); summary and register tokens come in front, without
positions. As a student it may be trained with windows (`windows`) and spectral reparametrisation (`spectral`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.nn.draws import StepDraws
from dune_fast.kernels.nn.patches import PatchEmbed, SharedPatches
from dune_fast.kernels.nn.radio_options import RADIOOptions
from dune_fast.kernels.nn.radio_positions import cropped_positions, training_positions, whole_positions
from dune_fast.kernels.nn.spectral import fold, iterate_once, original_weight, reparametrize, start_spectral
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig, plain
from dune_fast.kernels.nn.windows import drawn_window, window_period, windowed_outputs

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""What RADIO's images are normalised by."""


@dataclass
class RADIOConfig(ViTConfig):
    """Architecture of a `RADIOViT`; `cls_token` is true: there is at least one."""

    num_cls: int = 1
    """Summary tokens, one for each of its own teachers with another name."""
    summaries: tuple[int, ...] = (0,)
    """Indices of those that together are the summary."""
    normalized: bool = False
    """Whether the patches are standardized by a matrix that the weights bring, after the last block."""
    cropped: bool = True
    """CPE: whether the table is for larger images than those of `image_size`."""
    radio: RADIOOptions = field(default_factory=lambda: RADIOOptions(conditioner="", patch_bias=True))
    """What a student may have besides; a release is read as it stands."""

    network_family: ClassVar[str] = "radio"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.radio, dict):  # of a file's metadata
            self.radio = RADIOOptions(**self.radio)
        if not isinstance(self.radio, RADIOOptions) or type(self.num_cls) is not int or not 0 < self.num_cls <= 1000:
            raise ValueError(f"num_cls is {self.num_cls!r}, radio is {self.radio!r}")
        self.summaries = tuple(self.summaries)
        if not self.summaries or any(type(i) is not int or not 0 <= i < self.num_cls for i in self.summaries):
            raise ValueError(f"summaries {self.summaries} of {self.num_cls} summary tokens")

    def made_for(self, size: int) -> RADIOConfig:
        """The same network with another nominal input, in pixels; its position table stays."""
        table = self.table_side * self.patch_size
        return replace(self, image_size=size, radio=replace(self.radio, cpe_max_size=table))

    @property
    def table_side(self) -> int:
        """Patches along a side of the position table."""
        return max(1, round((self.radio.cpe_max_size or self.image_size) / self.patch_size))


def check_options(cfg: ViTConfig) -> None:
    """ValueError where a student's options, `cfg` with its entry `radio`, do not go with each other."""
    radio: RADIOOptions = cfg.radio  # type: ignore[attr-defined]
    if cfg.pos_embed != "learned" or not cfg.cls_token:
        raise ValueError(
            "student.family=radio has summary tokens and a learned position table: set student.cls_token=true and "
            "student.pos_embed=learned"
        )
    if 0 < radio.cpe_max_size < cfg.image_size:
        raise ValueError(
            f"student.radio.cpe_max_size={radio.cpe_max_size} is below student.image_size={cfg.image_size}: give the "
            "largest image that the student is for, or 0"
        )
    if radio.window_sizes:
        window_period(cfg.depth, radio.num_windowed, radio.num_global)  # refuses what windows nothing


class ConditionedPatchEmbed(PatchEmbed):
    """A patch embedding whose weights want CLIP's statistics, on images normalised by ImageNet's."""

    def projection(self) -> tuple[Tensor, Tensor | None]:
        """x' = scale x + shift per colour, inside the product: W' = W scale, bias' = bias + sum of W shift."""
        kernels, bias = [], self.proj.bias
        statistics = zip(IMAGENET_MEAN, IMAGENET_STD, CLIP_MEAN, CLIP_STD, strict=True)
        for kernel, (mean, std, clip_mean, clip_std) in zip(self.proj.weight.unbind(1), statistics, strict=True):
            kernels.append(kernel * (std / clip_std))
            shift = kernel.sum((1, 2)) * ((mean - clip_mean) / clip_std)
            bias = shift if bias is None else bias + shift
        return torch.stack(kernels, dim=1), bias


class RADIOViT(VisionTransformer):
    """Tokens in the order [summaries, registers, patches]."""

    cfg: RADIOConfig
    config_class = RADIOConfig
    undecayed = ("prefix_tokens", "pos_embed")
    """Parameters without weight decay."""
    window_size = 0
    """Side of windows in evaluation, in patches; summary tokens skip windowed blocks. 0 for whole attention."""

    def __init__(self, cfg: RADIOConfig) -> None:
        super().__init__(cfg)
        dim, radio = cfg.embed_dim, cfg.radio
        del self.cls_token
        if cfg.num_registers:
            del self.register_tokens
        if radio.conditioner:
            self.patch_embed = ConditionedPatchEmbed(cfg.patch_size, dim)
        if not radio.patch_bias:
            self.patch_embed.proj.bias = None
        self.prefix_tokens = nn.Parameter(torch.zeros(1, self.num_prefix_tokens, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.table_side**2, dim))
        if cfg.normalized:
            self.register_buffer("feature_mean", torch.zeros(dim))
            self.register_buffer("feature_matrix", torch.zeros(dim, dim))
        if radio.spectral:
            reparametrize(self.blocks, radio.spectral)
        self._iterated = -1

    @classmethod
    def for_student(cls, cfg: ViTConfig, num_cls: int) -> RADIOViT:
        """A student with so many summary tokens, by `student.*` and `student.radio.*`; ValueError if they do not fit.

        `cfg` is a `ViTConfig` with an entry `radio`.
        """
        check_options(cfg)
        radio: RADIOOptions = cfg.radio  # type: ignore[attr-defined]
        own = vars(plain(cfg))
        if radio.register_multiple:
            own["num_registers"] = radio.register_multiple - num_cls % radio.register_multiple
        cropped = radio.cpe_max_size > cfg.image_size
        return cls(RADIOConfig(**own, num_cls=num_cls, summaries=tuple(range(num_cls)), cropped=cropped, radio=radio))

    def init_weights(self) -> RADIOViT:
        """As the plain ViT's, but table and tokens are normal with deviation 1 / sqrt(D)."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(original_weight(layer), std=0.02)
                nn.init.zeros_(layer.bias)
        deviation = self.cfg.embed_dim**-0.5
        nn.init.normal_(self.pos_embed, std=deviation)
        nn.init.normal_(self.prefix_tokens, std=deviation)
        start_spectral(self)
        return self

    def plain(self) -> RADIOViT:
        """This network with plain weights instead of reparametrised ones, for good; it computes the same."""
        if self.cfg.radio.spectral:
            fold(self)
            self.cfg = replace(self.cfg, radio=replace(self.cfg.radio, spectral=0))
        return self

    def in_windows(self, size: int, num_windowed: int = 0, num_global: int = 4) -> RADIOViT:
        """Evaluates in windows of `size` x `size` patches from here on, 0 for whole attention; see `window_period`."""
        if size < 0:
            raise ValueError(f"windows of {size} x {size} patches: give a side of 1 patch or more, or 0 for none")
        if size:
            window_period(self.cfg.depth, num_windowed, num_global)  # refuses what windows nothing
        own = replace(self.cfg.radio, num_windowed=num_windowed, num_global=num_global)
        self.window_size, self.cfg = size, replace(self.cfg, radio=own)
        return self

    @property
    def num_cls(self) -> int:
        return self.cfg.num_cls

    def positions(self, height: int, width: int) -> Tensor:
        """In evaluation, for a grid of height x width patches: [1, height * width, D], float32."""
        return (cropped_positions if self.cfg.cropped else whole_positions)(self.pos_embed, height, width)

    def embed(self, images: Tensor, patches: SharedPatches | None = None, draws: StepDraws | None = None) -> Tensor:
        grid, dropout = self.grid(images), self.cfg.radio.position_dropout
        crops = self.cfg.cropped and grid != (self.cfg.table_side,) * 2
        if draws is None or not (crops or dropout):
            positions = self.positions(*grid)
        else:
            positions = training_positions(self.pos_embed, *grid, draws.for_positions(), dropout, crops)
        x = self.patch_embed(images, patches) + positions
        return torch.cat([self.prefix_tokens.to(x.dtype).expand(len(x), -1, -1), x], dim=1)

    def run(
        self, x: Tensor, blocks: Sequence[int], images: Tensor, draws: StepDraws | None = None
    ) -> dict[int, Tensor]:
        radio, grid = self.cfg.radio, self.grid(images)
        size = self.window_size
        if draws is not None:
            if radio.spectral and draws.step != self._iterated:
                iterate_once(self)
                self._iterated = draws.step
            numbers = draws.for_window() if radio.window_sizes else (0.0, 0.0)
            size = drawn_window(radio.window_sizes, grid, radio.window_probability, numbers)
        if not size:
            return super().run(x, blocks, images, draws)
        period = window_period(self.cfg.depth, radio.num_windowed, radio.num_global)
        return windowed_outputs(
            self.blocks, x, blocks, self.num_prefix_tokens, grid, size, period, self.cfg.depth, draws is not None,
            self.activation_checkpointing,
        )  # fmt: skip

    def without_registers(self, tokens: Tensor) -> Tensor:
        """[summaries, patches] of all tokens [B, P + N, D], as heads read them."""
        x = super().without_registers(tokens)
        if not self.cfg.normalized:
            return x
        return torch.cat([x[:, : self.num_cls], self.standardized(x[:, self.num_cls :])], dim=1)

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, P + N, D] into (summary [B, k D], registers [B, R, D], patches [B, N, D])."""
        summary = tokens[:, list(self.cfg.summaries)].flatten(1)
        prefix = self.num_prefix_tokens
        return summary, tokens[:, self.cfg.num_cls : prefix], tokens[:, prefix:]

    def forward(self, images: Tensor, apply_norm: bool = True) -> dict[str, Tensor]:
        """As a plain ViT's; `x_norm_clstoken` is the summary [B, k D]: k summary tokens, one behind the other."""
        features = super().forward(images, apply_norm)
        if apply_norm:
            features["x_norm_patchtokens"] = self.standardized(features["x_norm_patchtokens"])
        return features

    def standardized(self, patches: Tensor) -> Tensor:
        """Patches [B, N, D] as the release gives them."""
        if not self.cfg.normalized:
            return patches
        return F.linear(patches - self.feature_mean.to(patches.dtype), self.feature_matrix.to(patches.dtype))
