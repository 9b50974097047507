"""MASt3R's network behind a frozen encoder: two views' tokens to pointmaps, confidences and descriptors.

    encoder tokens -> norm (DUNE's version) -> decoder of two streams -> of a view: DPT, descriptor MLP -> activations

Leroy et al., "Grounding Image Matching in 3D with MASt3R", ECCV 2024. In DUNE's version (Sariyildiz et al., CVPR 2025)
the encoder is a distilled one whose final norm is left out; a LayerNorm that is trained with the decoder replaces it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dune_fast.heads.head import Head, HeadError
from dune_fast.heads.mast3r.activations import CONFIDENCE_MODES, POINT_MODES, Modes, activate, read_mode
from dune_fast.heads.mast3r.decoder import Decoder
from dune_fast.heads.mast3r.descriptors import DescriptorMLP
from dune_fast.heads.mast3r.dpt import DPT, hooks
from dune_fast.heads.tokens import EncoderTokens
from dune_fast.kernels.nn.block import LayerNorm

MAX_NAME = 200
"""Characters of an encoder's name."""
_NORM_EPS = 1e-5
"""Of `norm`, as PyTorch's default; all other norms have 1e-6."""


class ViewHead(nn.Module):
    """What turns one view's tokens into raw channels, in float32: 3 of a point, its confidence, a descriptor, its."""

    def __init__(self, dpt: DPT, local: DescriptorMLP, depth: int) -> None:
        super().__init__()
        self.dpt, self.head_local_features = dpt, local
        self.hooks = hooks(depth)

    def forward(self, tokens: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """The decoder's outputs of the view, [B, h * w, width] each -> [B, channels, ph, pw]."""
        read = {i: tokens[i].float() for i in self.hooks}
        first, *_, last = read.values()
        with torch.autocast(first.device.type, enabled=False):
            return torch.cat([self.dpt(list(read.values()), grid), self.head_local_features(first, last, grid)], dim=1)


class Mast3rHead(Head):
    """See the top of the file.

    Args:
        width: channels of the encoder's tokens.
        patch_size: of the encoder, in pixels.
        dec_dim, dec_depth, dec_heads, mlp_ratio: of the decoder, see `Decoder`; dec_depth is at least 4.
        desc_dim: channels of a descriptor.
        layer_dims, feature_dim, last_dim: see `DPT`.
        depth_mode, conf_mode, desc_conf_mode: (kind, low, high), see `activations`; a bound of None is infinite, a
            `desc_conf_mode` of None is `conf_mode`.
        two_confs: whether descriptors have a confidence of their own.
        own_norm: whether the head reads tokens before the encoder's final norm through a norm of its own, as DUNE's
            version; without, it reads those after the encoder's norm, as the released MASt3R.
        encoder_name: of the encoder that it was trained on, as a release says it; "" where it does not.

    Raises:
        HeadError: sizes or modes that do not go together.
    """

    kind: ClassVar[str] = "mast3r"
    views: ClassVar[int] = 2
    repeated: ClassVar[tuple[str, ...]] = ("dec_depth",)

    def __init__(
        self, width: int, patch_size: int, dec_dim: int = 768, dec_depth: int = 12, dec_heads: int = 12,
        mlp_ratio: float = 4.0, desc_dim: int = 24, layer_dims: Sequence[int] = (96, 192, 384, 768),
        feature_dim: int = 256, last_dim: int = 128, depth_mode: Sequence = ("exp", None, None),
        conf_mode: Sequence = ("exp", 1.0, None), desc_conf_mode: Sequence | None = ("exp", 0.0, None),
        two_confs: bool = True, own_norm: bool = True, encoder_name: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {
            "width": width, "patch_size": patch_size, "dec_dim": dec_dim, "dec_heads": dec_heads, "desc_dim": desc_dim,
            "feature_dim": feature_dim, "last_dim": last_dim,
            **{f"layer_dims[{i}]": dim for i, dim in enumerate(layer_dims)},
        }  # fmt: skip
        if wrong := [f"{name} is {size!r}" for name, size in sizes.items() if type(size) is not int or size < 1]:
            raise HeadError(f"a MASt3R head's sizes are whole numbers from 1: {', '.join(wrong)}")
        if len(layer_dims) != 4 or type(dec_depth) is not int or dec_depth < 4:
            raise HeadError(
                f"a MASt3R head reads 4 depths of a decoder of at least 4 blocks: layer_dims has {len(layer_dims)} "
                f"entries and dec_depth is {dec_depth!r}"
            )
        if type(encoder_name) is not str or len(encoder_name) > MAX_NAME or not encoder_name.isprintable():
            raise HeadError(f"encoder_name has to be a line of at most {MAX_NAME} characters")
        self.width, self.patch_size, self.encoder_name = width, patch_size, encoder_name
        self.modes = Modes(
            read_mode("depth_mode", depth_mode, POINT_MODES),
            read_mode("conf_mode", conf_mode, CONFIDENCE_MODES),
            None if desc_conf_mode is None else read_mode("desc_conf_mode", desc_conf_mode, CONFIDENCE_MODES),
            bool(two_confs),
        )
        self._sizes = {
            "width": width, "patch_size": patch_size, "dec_dim": dec_dim, "dec_depth": dec_depth,
            "dec_heads": dec_heads, "mlp_ratio": mlp_ratio, "desc_dim": desc_dim, "layer_dims": list(layer_dims),
            "feature_dim": feature_dim, "last_dim": last_dim,
        }  # fmt: skip
        self.norm = LayerNorm(width, eps=_NORM_EPS) if own_norm else None
        self.decoder = Decoder(width, dec_dim, dec_depth, dec_heads, mlp_ratio)
        self.downstream_head1, self.downstream_head2 = (
            ViewHead(
                DPT([width, dec_dim, dec_dim, dec_dim], patch_size, 4, layer_dims, feature_dim, last_dim),
                DescriptorMLP(width + dec_dim, desc_dim + int(two_confs), patch_size),
                dec_depth,
            )
            for _ in range(2)
        )

    def options(self) -> dict[str, Any]:
        """See `Head.options`."""
        modes = self.modes
        return {
            **self._sizes,
            "depth_mode": modes.depth.plain(),
            "conf_mode": modes.conf.plain(),
            "desc_conf_mode": modes.desc_conf and modes.desc_conf.plain(),
            "two_confs": modes.two_confs,
            "own_norm": self.norm is not None,
            "encoder_name": self.encoder_name,
        }

    def encoded(self, tokens: EncoderTokens) -> Tensor:
        """A view's tokens as the decoder and the heads read them, [B, N, width]. HeadError for another width."""
        x = tokens.patch if self.norm is None else tokens.raw_patch
        if x.shape[-1] != self.width or x.shape[1] != tokens.grid[0] * tokens.grid[1]:
            raise HeadError(
                f"the mast3r head reads tokens [B, rows * columns, {self.width}], got {list(x.shape)} on a grid of "
                f"{tokens.grid[0]} x {tokens.grid[1]}: choose the encoder that the head was trained on"
            )
        return x if self.norm is None else self.norm(x)

    def forward(self, view1: EncoderTokens, view2: EncoderTokens) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both views' outputs; the views may have images of different sizes.

        Args:
            view1, view2: tokens of B images each; pair i is image i of both.

        Returns:
            Of view 1 `pts3d` [B, H, W, 3], points in the frame of camera 1, in metres where the head was trained on
            metres; `conf` [B, H, W]; `desc` [B, H, W, d], of length 1; `desc_conf` [B, H, W]. The same of view 2, its
            points (in the frame of camera 1 too) called `pts3d_in_other_view`. All in float32.

        Raises:
            HeadError: tokens of another width, or different numbers of images.
        """
        encoded1, encoded2 = self.encoded(view1), self.encoded(view2)
        if len(encoded1) != len(encoded2):
            raise HeadError(f"a pair is one image of each view, got {len(encoded1)} and {len(encoded2)} images")
        outputs1, outputs2 = self.decoder(encoded1, encoded2, view1.grid, view2.grid)
        result1 = activate(self.downstream_head1(outputs1, view1.grid), self.modes)
        result2 = activate(self.downstream_head2(outputs2, view2.grid), self.modes)
        return result1, {"pts3d_in_other_view": result2.pop("pts3d"), **result2}
