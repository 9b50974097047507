"""The student: an encoder, and one projector a teacher, which is thrown away after distillation.

`dune_fast.projectors` has the projectors, `dune_fast.kernels.nn.encoders` the encoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dune_fast.kernels.nn.block import Block
from dune_fast.kernels.nn.draws import StepDraws
from dune_fast.kernels.nn.encoders import EncoderConfig, build_encoder
from dune_fast.kernels.nn.patches import SharedPatches
from dune_fast.kernels.nn.routing import OwnPatches, PatchSubset, Routes, select
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.base import (
    Projection,
    StudentShape,
    Tokens,
    blocks_read,
    build_projector,
    placed,
    shared_layers,
)
from dune_fast.projectors.config import ProjectorConfig

Teachers = Mapping[str, tuple[int, Sequence[str]]]
"""name -> `TeacherFeatures`, of which the first two are enough."""


@dataclass
class StudentConfig(EncoderConfig):
    """The encoder that is trained, and what projectors read of it."""

    normed: bool = False
    """Projectors read tokens after the final norm, which is trained then (Theia); DUNE's read them before it."""
    cls_per_teacher: bool = False
    """A cls token for every `source` of the teachers, which its projector reads (family "radio")."""


class Projectors(nn.ModuleDict):
    """One projector a teacher, all of one kind; ValueError for a kind that is not known, or blocks that are not there.

    Args:
        student: what is known of the encoder.
        teachers: name -> its features.
        slots: teacher -> its cls token's place among the student's; None where the student has one.
    """

    def __init__(
        self, cfg: ProjectorConfig, student: StudentShape, teachers: Teachers, slots: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        self.kind = cfg.kind
        self.prefix, self.slots = int(student.cls), None
        if slots:
            self.read_slots(slots, 1 + max(slots.values()))
        self.token_types = {name: tuple(features[1]) for name, features in teachers.items()}
        self.blocks = blocks_read(cfg, student.depth)
        if unknown := sorted(set(cfg.teachers) - set(teachers)):
            raise ValueError(f"projector.teachers has {', '.join(unknown)}; there are: {', '.join(teachers)}")
        features = placed(teachers)
        self.sources = {name: of_teacher.source for name, of_teacher in features.items()}
        for name, of_teacher in features.items():
            self[name] = build_projector(cfg.of(name), student, of_teacher)
            self[name].share(next(iter(self.values())))

    def read_slots(self, slots: Mapping[str, int], count: int) -> None:
        """Reads each teacher's cls token at its place among `count`."""
        self.prefix, self.slots = count, dict(slots) if count > 1 else None

    def forward(
        self, tokens: Tokens, routes: Routes | None = None, subset: PatchSubset | OwnPatches | None = None,
        grid: tuple[int, int] | None = None, shared: Mapping[str, nn.Module] | None = None,
    ) -> dict[str, Projection]:  # fmt: skip
        """{block: [B, K + N, D]}, K cls tokens -> teacher -> token type -> [B, C] or [B, N, C], of the teacher's images
        if routed.

        Of a subset of the patches if there is one: then token-wise projectors see no others. `grid`: of the patches.
        `shared`: source -> what makes other tokens {block: [B, K + N, D]} for its projectors.

        A projector without images runs on the batch's first one and gives none of its tokens: no operation has to take
        an empty batch, and every parameter gets a gradient, of zeros.
        """
        projections = {}
        last = tokens[self.blocks[-1]]
        kept = self._kept(subset, last.shape[1] - self.prefix, last.device)
        of_source = {source: layers(tokens) for source, layers in (shared or {}).items()}
        for name, projector in self.items():
            own, own_kept, nothing = self._own(name, of_source.get(self.sources[name], tokens)), kept, False
            if routes is not None:
                route = routes[name]
                nothing = not len(route)
                own = {block: x[:1] if nothing else route.take(x) for block, x in own.items()}
                if kept is not None and kept.ndim == 2:
                    own_kept = kept[:1] if nothing else route.take(kept)
            if not projector.reads_all_tokens:
                own, own_kept = {block: select(x, own_kept) for block, x in own.items()}, None
            projection = projector(own, own_kept, grid)
            projections[name] = {token: x[:0] for token, x in projection.items()} if nothing else projection
        return projections

    def _kept(self, subset: PatchSubset | OwnPatches | None, patches: int, device: torch.device) -> Tensor | None:
        """The tokens of a subset, a cls token before them where there is one; None for all."""
        if subset is None:
            return None
        return subset.with_cls(patches, device) if self.prefix else subset.index(patches, device)

    def _own(self, name: str, tokens: Tokens) -> Tokens:
        """The tokens with the teacher's own cls token alone."""
        if self.slots is None:
            return tokens
        at = self.slots[name]
        return {block: torch.cat([x[:, at : at + 1], x[:, self.prefix :]], dim=1) for block, x in tokens.items()}


def summary_slots(teachers: Teachers) -> dict[str, int]:
    """teacher -> the place of its source among all sources, in the order of the teachers."""
    sources = {name: features.source for name, features in placed(teachers).items()}
    order = list(dict.fromkeys(sources.values()))
    return {name: order.index(source) for name, source in sources.items()}


class Student(nn.Module):
    """Encoder and projectors. images [B, 3, H, W] -> teacher -> token type -> [B, C] or [B, N, C].

    The projectors take un-normalised [cls, patches] without the registers, so no loss reaches the encoder's final norm:
    it is frozen at gamma = 1, beta = 0. With `StudentConfig.normed` they take them after it.

    `autocast_dtype` is the type of its matrix products; weights, norms and residuals stay float32. It lives here, not
    around the call: DeepSpeed's engine switches an outer autocast off. None: float32 throughout.
    """

    autocast_dtype: torch.dtype | None = None

    def compute_in(self, autocast_dtype: torch.dtype | None, stream: str = "fp32") -> None:
        """Sets the types: of products, and of tokens between blocks, "fp32" or "bf16" (where products are bf16)."""
        self.autocast_dtype = autocast_dtype
        bf16 = stream == "bf16" and autocast_dtype is torch.bfloat16
        self.encoder.stream_dtype = torch.bfloat16 if bf16 else None

    def __init__(self, encoder: ViTConfig, projector: ProjectorConfig, teachers: Teachers) -> None:
        super().__init__()
        cfg = encoder if isinstance(encoder, StudentConfig) else StudentConfig(**vars(encoder))
        slots = summary_slots(teachers) if cfg.cls_per_teacher else None
        self.encoder = build_encoder(cfg, 1 + max(slots.values()) if slots else int(cfg.cls_token))
        if not self.encoder.num_cls and any("cls" in features[1] for features in teachers.values()):
            raise ValueError(
                "the student has no cls token, and a teacher's cls tokens are to be distilled: give it one "
                "(student.cls_token=true), or leave them out (teachers.NAME.token_types=[patch])"
            )
        if slots:  # the encoder's own summary is that of the sources that have one
            read = {slots[name] for name, features in teachers.items() if "cls" in features[1]}
            self.encoder.cfg.summaries = tuple(sorted(read)) or self.encoder.cfg.summaries
        self.normed = cfg.normed
        self.encoder.norm.requires_grad_(cfg.normed)
        shape = StudentShape(
            cfg.embed_dim, cfg.depth, cfg.num_heads, self.encoder.num_cls > 0, cfg.image_size // cfg.patch_size
        )
        self.projectors = Projectors(projector, shape, teachers, slots)
        self.shared = shared_layers(projector, shape, self.projectors.sources.values())

    def compile_blocks(self, **options: Any) -> None:
        """`torch.compile`, with its options, of every block on its own, in place: parameters keep their names."""
        for module in self.modules():
            if isinstance(module, Block):
                module.compile(**{"dynamic": False, **options})

    def tokens(
        self, images: Tensor, patches: SharedPatches | None = None, draws: StepDraws | None = None
    ) -> dict[int, Tensor]:
        """[cls, patches] after the blocks that the projectors read: block -> [B, K + N, D], K cls tokens."""
        outputs = self.encoder.block_outputs(images, self.projectors.blocks, patches, draws)
        if self.normed:
            outputs = {i: self.encoder.norm(x) for i, x in outputs.items()}
        return {i: self.encoder.without_registers(x) for i, x in outputs.items()}

    def forward(
        self, images: Tensor, routes: Routes | None = None, patches: SharedPatches | None = None,
        subset: PatchSubset | OwnPatches | None = None, draws: StepDraws | None = None,
    ) -> dict[str, Projection]:  # fmt: skip
        """`routes`: which of the images each teacher's projector gets, all by default; `patches`: the step's; `subset`:
        of the patches that are projected, all by default; `draws`: random numbers of a training step, else None."""
        with torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            tokens = self.tokens(images, patches, draws)
            return self.projectors(tokens, routes, subset, self.encoder.grid(images), self.shared)


def build_student(
    encoder: ViTConfig, projector: ProjectorConfig, teachers: Teachers, seed: int = 0
) -> Student:
    """A student with initial weights that are a function of the configuration and `seed` alone.

    `teachers`: name -> (channels, token types) of its features, or `TeacherFeatures`.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        student = Student(encoder, projector, teachers)
        student.encoder.init_weights()
    return student
