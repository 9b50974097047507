"""What all ViT teachers have in common: trunk, architecture read off the tensors, readings of the tokens.

A family is a key map on top: `teachers/dinov2.py`, `mast3r.py`, `multihmr.py`, `unic.py`, `dune.py`, `onnx_vit.py`,
and those with a network of their own: `clip.py`, `siglip.py`, `dinov3.py`, `sam.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from dune_fast.kernels.layer_norm import layer_norm
from dune_fast.kernels.nn.block import LAYER_NORM_EPS, product_dtype
from dune_fast.kernels.nn.encoders import encoder_class, family_of
from dune_fast.kernels.nn.patches import SharedPatches
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.teachers.architecture import infer_vit, random_vit_state, registers_of, stored_architecture
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import container_state, read_container
from dune_fast.teachers.encoder_names import beside_encoder, encoder_prefix, encoder_state
from dune_fast.teachers.protocol import Teacher, Trunk
from dune_fast.teachers.weights import TeacherWeightsError, build_loaded, random_seed, weights_path


class ViTTrunk(Trunk):
    """Images [B, 3, H, W] -> un-normalised tokens after each block that a teacher reads: index -> [B, P + N, C]."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        self.patch_size = vit.cfg.patch_size
        self.num_features = vit.cfg.embed_dim
        self.blocks: set[int] = set()
        """Indices of the blocks whose tokens are read."""

    def drop_unread(self) -> None:
        """Frees the blocks beyond the deepest that is read, which never run; for when every reader is known."""
        self.vit.blocks = self.vit.blocks[: max(self.blocks) + 1]

    def forward(self, images: Tensor, patches: SharedPatches | None = None) -> dict[int, Tensor]:
        return self.vit.block_outputs(images, sorted(self.blocks), patches)


class ViTTeacher(Teacher):
    """A teacher whose network is `dune_fast.kernels.nn.vit`; `layer` says where its tokens are read."""

    trunk: ViTTrunk
    layer_scale: ClassVar[bool | None] = False
    """Whether the family's blocks have LayerScale; None for whatever a file has, drawn weights have it."""
    pos_embed: ClassVar[str] = "learned"
    """See `ViTConfig.pos_embed`."""
    cls_token: ClassVar[bool | None] = None
    """Whether a cls token leads the sequence; None for one where positions are learned."""
    network: ClassVar[type[VisionTransformer]] = VisionTransformer
    """What the family's blocks are in. Another than `VisionTransformer` is a teacher alone: no student is like it."""
    sizes: ClassVar[Mapping[int, tuple[int, int, float]]] = {
        192: (12, 3, 4), 384: (12, 6, 4), 768: (12, 12, 4), 1024: (24, 16, 4), 1536: (40, 24, 4),
    }  # fmt: skip
    """Channels of a token -> (blocks, heads, `ViTConfig.mlp_ratio`) of the published sizes."""
    swiglu_channels: ClassVar[Collection[int]] = (1536,)
    """Channels of the published sizes with SwiGLU blocks."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        depth, layer = len(self.trunk.vit.blocks), self.config.layer
        if layer is not None and layer > depth:
            raise ValueError(f"teachers.{self.name}.layer is {layer}; {self.config.weights} has {depth} blocks")
        if "cls" in self.config.token_types and self.cls_token is None and not self.trunk.vit.cfg.cls_token:
            raise ValueError(f"teachers.{self.name}: {self.config.weights} has no cls token; give token_types: [patch]")
        self.block = (depth if layer is None else layer) - 1
        self.trunk.blocks.add(self.block)  # one pass to the deepest block serves every teacher of this trunk

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        """Whether a file with these names, wrappers stripped, is one of the family."""
        return False

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        """The encoder's tensors under the names of `dune_fast.kernels.nn.vit`; those of other parts may stay."""
        return encoder_state(state, path)

    @classmethod
    def prefix(cls, names: Iterable[str], path: Path | str) -> str:
        """What stands before the encoder's names; TeacherWeightsError if there is no encoder, or several as good."""
        return encoder_prefix(names, path)

    @classmethod
    def completed(cls, state: dict[str, Tensor], content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
        """`convert`'s tensors with those that the container leaves out because they change nothing."""
        return state

    @classmethod
    def reads(cls, name: str) -> bool:
        """Whether `convert` makes another tensor out of a file's tensor of this name, than by a new name alone."""
        return False

    @classmethod
    def width(cls, architecture: ViTConfig) -> int:
        """Channels of the tokens that a network of the family gives."""
        return architecture.embed_dim

    @classmethod
    def alike(cls, architecture: ViTConfig) -> Collection[str]:
        """Token types that have `width` channels, and so go into one teacher."""
        return cls.token_types

    @classmethod
    def variant(cls, plain: ViTConfig, state: Mapping[str, Tensor], cfg: TeacherConfig) -> ViTConfig:
        """The configuration of the family's `network`, from the part that all ViTs have; `state` is empty where the
        weights are drawn."""
        return plain

    @classmethod
    def heads(cls, content: Mapping[str, Any], path: Path) -> int | None:
        """Attention heads as the container says them, None where it does not."""
        return None

    @classmethod
    def published_interpolation(cls, registers: int) -> tuple[float, bool]:
        """(offset, antialias) of the position table's resizing in the family's own release."""
        return 0.1, False

    @classmethod
    def interpolation(cls, cfg: TeacherConfig, registers: int) -> tuple[float, bool]:
        """(offset, antialias): the configuration's, where it says nothing the release's."""
        offset, antialias = cls.published_interpolation(registers)
        return (
            offset if cfg.interpolate_offset is None else cfg.interpolate_offset,
            antialias if cfg.interpolate_antialias is None else cfg.interpolate_antialias,
        )

    @classmethod
    def architecture(cls, cfg: TeacherConfig) -> ViTConfig:
        """What the configuration alone says of the network, with the published depth for its width.

        ValueError for a width that no published size has, or if there is no image size.
        """
        learned = cls.pos_embed == "learned"
        if cfg.num_features not in cls.sizes or (cfg.image_size is None and learned) or cfg.projected:
            projected = " (with projected, the file is needed)" if cfg.projected else ""
            raise ValueError(
                f"without a weights file, num_features must be one of {', '.join(map(str, cls.sizes))} and "
                f"image_size be given; they are {cfg.num_features} and {cfg.image_size}{projected}"
            )
        registers = cfg.num_registers or 0
        offset, antialias = cls.interpolation(cfg, registers)
        depth, heads, ratio = cls.sizes[cfg.num_features]
        plain = ViTConfig(
            image_size=cfg.image_size if learned else cfg.patch_size, patch_size=cfg.patch_size,
            embed_dim=cfg.num_features, depth=depth, num_heads=cfg.num_heads or heads, mlp_ratio=ratio,
            num_registers=registers, layer_scale=None if cls.layer_scale is False else 1e-4,
            cls_token=learned if cls.cls_token is None else cls.cls_token, pos_embed=cls.pos_embed,
            interpolate_offset=offset, interpolate_antialias=antialias,
            mlp="swiglu" if cfg.num_features in cls.swiglu_channels else "gelu",
        )  # fmt: skip
        return cls.variant(plain, {}, cfg)

    @classmethod
    def read_file(cls, path: Path, cfg: TeacherConfig) -> tuple[ViTConfig, dict[str, Tensor]]:
        """A published file's architecture and tensors, renamed; TeacherWeightsError if it is of another model."""
        return cls.read_content(read_container(path), path, cfg)

    @classmethod
    def read_content(
        cls, content: Mapping[str, Any], path: Path, cfg: TeacherConfig
    ) -> tuple[ViTConfig, dict[str, Tensor]]:
        """As `read_file`, of a container that is read already."""
        state = cls.completed(cls.convert(container_state(content, path), path), content, path)
        if (stored := stored_architecture(path)) is not None:
            asked = {key: getattr(cfg, key) for key in ("num_heads", "interpolate_offset", "interpolate_antialias")}
            return replace(stored, **{key: value for key, value in asked.items() if value is not None}), state
        weight = state.get("patch_embed.proj.weight")
        published = cls.sizes.get(len(weight)) if weight is not None and weight.ndim else None
        heads = cfg.num_heads or cls.heads(content, path) or (published[1] if published else None)
        resizing = cls.interpolation(cfg, registers_of(state))
        plain = infer_vit(state, path, heads, *resizing, cls.pos_embed, cls.layer_scale, cls.cls_token)
        return cls.variant(plain, state, cfg), state

    def build_trunk(self) -> Trunk:
        seed = random_seed(self.name, self.config.weights)
        if seed is None:
            path = weights_path(self.config.weights)
            architecture, state = self.read_file(path, self.config)
        else:
            path, architecture = self.config.weights, self.architecture(self.config)
            state = random_vit_state(architecture, seed, self.network)
        wanted = self.config.num_registers
        if wanted is not None and wanted != architecture.num_registers:
            raise TeacherWeightsError(
                f"teachers.{self.name}.num_registers is {wanted}, but {path} has {architecture.num_registers}"
            )
        return ViTTrunk(build_loaded(lambda: self.built_as(architecture)(architecture), state, path, beside_encoder))

    def built_as(self, architecture: ViTConfig) -> type[VisionTransformer]:
        """The class of the network: the family's, or that of a run's student, which the file names.

        TeacherWeightsError for a student whose tokens the family does not read.
        """
        own = encoder_class(family_of(architecture))
        if issubclass(self.network, own):
            return self.network
        if family_of(architecture) == "radio":
            raise TeacherWeightsError(
                f"teachers.{self.name}: {self.config.weights} is a student of RADIO's family; give "
                f"teachers.{self.name}.family=radio"
            )
        return own

    def tokens(self, features: dict[int, Tensor]) -> dict[str, Tensor]:
        cls, _, patches = self.trunk.vit.split(self.normed(features[self.block]))  # of [B, P + N, C]
        return {"patch": patches} if cls is None else {"cls": cls, "patch": patches}

    def normed(self, x: Tensor) -> Tensor:
        """Tokens after the final norm, after one without weights where they are an earlier block's, or as they are."""
        if not self.config.norm:
            return x
        return self.trunk.vit.norm(x, out_dtype=product_dtype(x)) if self.config.layer is None else plain_norm(x)


def plain_norm(x: Tensor) -> Tensor:
    """LayerNorm without weights over the channels, in autocast's type: losses and statistics read half the bytes."""
    return layer_norm(x, None, None, LAYER_NORM_EPS, product_dtype(x))
