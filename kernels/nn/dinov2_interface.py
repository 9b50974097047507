"""What users of DINOv2 and of DUNE call and read on an encoder, by their names; the network is in `vit.py`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.nn.preprocessing import Preprocessing

_NO_TABLE_SIZE = 512
"""Side in pixels, about, of images for an encoder without a position table, which would say it: MASt3R's."""


class DINOv2Interface:
    """Methods and properties of a `VisionTransformer`."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Channel means of the images in [0, 1] that the weights were trained on; ImageNet's unless a loader says else."""
    std: tuple[float, float, float] = IMAGENET_STD
    """See `mean`."""

    @property
    def embed_dim(self) -> int:
        """Channels of a token; `num_features` too."""
        return self.cfg.embed_dim

    num_features = embed_dim

    @property
    def cls_channels(self) -> int:
        """Of `x_norm_clstoken`; 0 where there is none."""
        return self.cfg.embed_dim * int(self.cfg.cls_token)

    def normed_parts(self, tokens: Tensor, block: int = -1) -> tuple[Tensor | None, Tensor, Tensor]:
        """What `split` gives of a block's tokens, after the final norm."""
        return self.split(self.norm(tokens))

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.cfg.patch_size

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def num_heads(self) -> int:
        """Attention heads of a block."""
        return self.cfg.num_heads

    @property
    def num_register_tokens(self) -> int:
        """Register tokens between cls and patches."""
        return self.cfg.num_registers

    @property
    def transform(self) -> Preprocessing:
        """What makes this encoder's input of a PIL image or a uint8 tensor, at its own image size."""
        cfg = self.cfg
        size = cfg.image_size if cfg.pos_embed == "learned" else _NO_TABLE_SIZE // cfg.patch_size * cfg.patch_size
        return Preprocessing(size, tuple(self.mean), tuple(self.std))

    def forward_features(self, images: Tensor, masks: Tensor | None = None, apply_norm: bool = True) -> dict:
        """As `forward`, with the entry `masks` that DINOv2's has."""
        _refuse_masks(masks)
        return {**self.forward(images, apply_norm), "masks": masks}

    def prepare_tokens_with_masks(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """The tokens before the first block, [B, P + N, D]; the name that DINOv2 has for `embed`."""
        _refuse_masks(masks)
        return self.embed(images)

    def get_intermediate_layers(
        self, images: Tensor, n: int | Sequence[int] = 1, reshape: bool = False, return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple:  # fmt: skip
        """Patch tokens of some blocks, for each [B, N, D], in the order asked for.

        Args:
            images: [B, 3, H, W].
            n: how many of the last blocks, or indices from 0; negative ones count from the end. ValueError for none.
            reshape: give maps [B, D, H/p, W/p] instead of tokens.
            return_class_token: give pairs (patches, cls).
            norm: whether the final norm is applied to each.
        """
        depth = len(self.blocks)
        asked = range(depth - n, depth) if isinstance(n, int) else [int(i) for i in n]
        few = isinstance(n, int) and not 1 <= n <= depth
        if few or not len(asked) or any(not -depth <= i < depth for i in asked):
            raise ValueError(
                f"layers {n if isinstance(n, int) else list(asked)} of an encoder with {depth} blocks: give a number "
                f"of last blocks from 1 to {depth}, or indices from 0 to {depth - 1} (-1 to -{depth} from the end)"
            )
        blocks = [i % depth for i in asked]
        outputs = self.block_outputs(images, blocks)
        height, width = self.grid(images)
        layers = []
        for i in blocks:
            cls, _, patches = self.normed_parts(outputs[i], i) if norm else self.split(outputs[i])
            if reshape:
                patches = patches.transpose(1, 2).unflatten(2, (height, width)).contiguous()
            layers.append((patches, cls) if return_class_token else patches)
        return tuple(layers)


def _refuse_masks(masks: Tensor | None) -> None:
    if masks is not None:
        raise ValueError("masks are for DINOv2's training; a distilled encoder has no mask token, so give none")
