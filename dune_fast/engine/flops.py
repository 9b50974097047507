"""Floating-point operations of one image: student, projectors and every teacher.

Matrix products and convolutions alone, a multiply-add counted as two, as `torch.utils.flop_counter` does. For N tokens
of D channels a block with an MLP of ratio r costs

    2 N (4 + 2 r) D^2   linear layers        4 N^2 D   attention's two products

The backward pass of what is trained costs twice its forward pass; the frozen teachers have none. ViTs and projectors
have formulas, because to count three ViT-L on fake tensors takes a second; other networks are counted.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dune_fast.dali_pipelines.loader import group_weights
from dune_fast.distill.objective import ownership
from dune_fast.engine.config import RunConfig
from dune_fast.engine.projector_cost import KNOWN, projector_cost
from dune_fast.engine.stages import Stage, at_size, settings, stages
from dune_fast.kernels.nn.block import swiglu_hidden_dim
from dune_fast.kernels.nn.depth_anything import DepthAnything
from dune_fast.kernels.nn.routing import PatchSubset
from dune_fast.kernels.nn.sam import SAMEncoder
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.projectors.base import TeacherFeatures
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.teachers.config import TeacherConfig, seen, teachers_by_trunk
from dune_fast.teachers.registry import check_family, family_class
from dune_fast.teachers.vit import ViTTeacher

logger = logging.getLogger(__name__)

TRAINED = 3
"""Forward and backward pass of what is trained, in forward passes."""


@dataclass(frozen=True)
class Flops:
    """Of one image, forward."""

    student: int
    """The encoder."""
    projectors: int
    """All projectors."""
    teachers: Mapping[str, int | None]
    """By name; None where the architecture is not known without its weights. What teachers share, such as a trunk,
    counts for the first of them."""

    @property
    def all_teachers(self) -> int | None:
        """Sum over teachers; None if one is unknown."""
        counts = list(self.teachers.values())
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def training(self) -> int | None:
        """Of one image in a training step; None if a teacher is unknown."""
        frozen = self.all_teachers
        return None if frozen is None else frozen + TRAINED * (self.student + self.projectors)


def linear_flops(rows: int, inputs: int, outputs: int) -> int:
    """[rows, inputs] @ [inputs, outputs]."""
    return 2 * rows * inputs * outputs


def block_flops(tokens: int, dim: int, mlp_ratio: float = 4.0, mlp: str = "gelu") -> int:
    """One transformer block on one image's tokens."""
    attention = linear_flops(tokens, dim, 4 * dim) + 4 * tokens**2 * dim
    if mlp == "swiglu":
        return attention + linear_flops(tokens, dim, 3 * swiglu_hidden_dim(dim, mlp_ratio))
    return attention + linear_flops(tokens, dim, 2 * int(dim * mlp_ratio))


def vit_flops(cfg: ViTConfig, grid_size: int, depth: int | None = None) -> int:
    """A Vision Transformer on one image of grid_size x grid_size patches, up to block `depth` (all by default)."""
    patches = grid_size**2
    tokens = patches + int(cfg.cls_token) + cfg.num_registers
    embedding = linear_flops(patches, 3 * cfg.patch_size**2, cfg.embed_dim)
    blocks = cfg.depth if depth is None else depth
    return embedding + blocks * block_flops(tokens, cfg.embed_dim, cfg.mlp_ratio, cfg.mlp)


def projector_flops(
    cfg: ProjectorConfig, student: ViTConfig, teacher: TeacherFeatures, grid: int, share: float = 1.0
) -> int:
    """One teacher's projector on one image of grid x grid patches.

    `share`: of the patches that it is asked for, `objective.patch_share`.
    """
    dim, every, channels, token_types = student.embed_dim, grid**2, teacher.channels, teacher.token_types
    if cfg.kind not in KNOWN:
        return projector_cost(cfg, student, teacher, grid).flops
    patches = PatchSubset(share, 0, 0).count(every)
    if cfg.kind == "tp":
        blocks = cfg.num_blocks * block_flops(every + 1, dim, cfg.mlp_ratio)
        blocks -= linear_flops(every - patches, dim, 2 * int(dim * cfg.mlp_ratio))  # of the last one, after attention
        return blocks + linear_flops(patches + 1, dim, channels)
    if cfg.kind == "sp":
        return linear_flops(patches + 1, cfg.hidden_dim, dim + cfg.num_inner * cfg.hidden_dim + channels)
    rows = {"cls": 1, "patch": patches}
    blocks = cfg.which_blocks or range(student.depth)
    hidden = sum(cfg.last_hidden_dim if i == student.depth - 1 else cfg.hidden_dim for i in blocks)
    return sum(linear_flops(rows[token], dim + channels, hidden) for token in token_types)


def count_flops(module: nn.Module, image_size: tuple[int, int]) -> int:
    """The forward pass of any network on one image [1, 3, H, W], counted on tensors without data.

    The weights may be on any device, the meta device too; they are not touched.
    """
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        state = {
            name: torch.empty(value.shape, dtype=value.dtype)
            for name, value in (*module.named_parameters(), *module.named_buffers())
        }
        torch.func.functional_call(module, state, (torch.empty(1, 3, *image_size),))
    return counter.get_total_flops()


def published_network(name: str, cfg: TeacherConfig) -> nn.Module | None:
    """A teacher's network on the meta device, from its configuration alone; None where that does not say it.

    ViTs are taken to be of the published size for their width; teachers of one architecture get the same module.
    UnknownTeacherError: no such family.
    """
    check_family(name, cfg.family)
    family = family_class(cfg.family)
    try:
        with torch.device("meta"):
            if issubclass(family, ViTTeacher):
                known = dataclasses.replace(cfg, image_size=cfg.image_size or cfg.patch_size)
                architecture = family.architecture(known)
                return _meta_network(family.network, type(architecture), dataclasses.astuple(architecture))
            if cfg.family == "xfeat":
                from dune_fast.teachers.xfeat import XFeat

                return XFeat().eval()
            if cfg.family == "timm":
                from dune_fast.teachers.timm_model import create

                options = {**({"img_size": cfg.image_size} if cfg.image_size else {}), **cfg.model_args}
                return create(name, cfg.model, options).eval()
    except Exception as error:  # timm's factories raise anything; a run and a plan can do without the numbers
        logger.debug("the network of teacher %s is not known: %s", name, error)
    return None


@functools.lru_cache(16)
def _meta_network(network: Callable[[Any], nn.Module], architecture: type, fields: tuple) -> nn.Module:
    """Of an architecture's fields; a plan asks for the same few a hundred times."""
    with torch.device("meta"):
        return network(architecture(*fields)).eval()


def teacher_flops(name: str, cfg: TeacherConfig, grid: int) -> int | None:
    """One teacher on one image where the student has grid x grid patches of it; see `published_network`."""
    network, given = published_network(name, cfg), seen(cfg, grid)
    if network is None or not given.images:
        return None
    if isinstance(network, VisionTransformer) and not isinstance(network, SAMEncoder | DepthAnything):
        return vit_flops(network.cfg, given.side // cfg.patch_size, cfg.layer) // given.images
    count = _count_or_none(name, network, given.side)
    return None if count is None else count // given.images


def loss_patches(cfg: RunConfig, every: int) -> int:
    """How many of an image's patches the loss is taken on: those that a cache has, and of these `patch_share`."""
    stored = PatchSubset(cfg.cache.patch_share, 0, 0).count(every) if cfg.cache.folder else every
    return PatchSubset(cfg.objective.patch_share, 0, 0).count(stored)


def share_of_images(cfg: RunConfig, teachers: Sequence[str]) -> float:
    """The share of a batch's images that any of these teachers gets: all, unless `route_by_dataset`, `presample` or
    `teachers_per_step` keep some back."""
    groups, every = cfg.data.groups, len(cfg.teachers)
    if drawn := cfg.objective.teachers_per_step:
        return 1.0 - math.comb(every - len(teachers), drawn) / math.comb(every, drawn)
    if cfg.objective.presample:
        p, count = cfg.objective.drop_probability, len(teachers)
        return 1.0 - p**count + p**every * count / every
    if not cfg.objective.route_by_dataset or not groups:
        return 1.0
    own = ownership({name: cfg.teachers[name].groups for name in teachers}, groups, cfg.objective)
    weights = group_weights(cfg.data, groups)
    return sum(w for w, seen in zip(weights, own.any(0).tolist(), strict=True) if seen) / sum(weights)


def run_flops(cfg: RunConfig, trunks: Mapping[str, nn.Module] | None = None) -> Flops:
    """Of a run's configuration, the mean over its images: with `progressive` they differ in size, with
    `route_by_dataset` or `presample` each goes to some teachers only.

    `trunks` are the teachers' networks, where they are built: counts those that no configuration describes.
    """
    return mean_flops(stage_flops(cfg, trunks))


def stage_flops(cfg: RunConfig, trunks: Mapping[str, nn.Module] | None = None) -> list[tuple[Stage, Flops]]:
    """Of every stage of a run, which has one without `progressive`; `trunks` as in `run_flops`. The mean over images
    where a stage has several sizes, or a step partitions."""
    found = []
    for stage in stages(cfg):
        parts = [
            (setting.images, _flops_at_one_size(at_size(cfg, setting.image_size, setting.teachers), trunks))
            for setting in settings(cfg, stage)
        ]
        found.append((stage, _mean(parts, list(cfg.teachers))))
    return found


def mean_flops(parts: Sequence[tuple[Stage, Flops]]) -> Flops:
    """Over the steps of all stages."""
    names = list(parts[0][1].teachers)
    return _mean([(stage.end - stage.first, flops) for stage, flops in parts], names)


def _mean(parts: Sequence[tuple[float, Flops]], names: Sequence[str]) -> Flops:
    """By weights; a teacher that has no part in some counts nothing there."""
    counts = [weight for weight, _ in parts]

    def mean(values: list[int | None]) -> int | None:
        if None in values:
            return None
        return round(sum(n * x for n, x in zip(counts, values, strict=True) if x is not None) / sum(counts))

    every = [flops for _, flops in parts]
    student, projectors = mean([f.student for f in every]), mean([f.projectors for f in every])
    assert student is not None and projectors is not None
    return Flops(student, projectors, {name: mean([f.teachers.get(name, 0) for f in every]) for name in names})


def _flops_at_one_size(cfg: RunConfig, trunks: Mapping[str, nn.Module] | None = None) -> Flops:
    """`run_flops` of a run without `progressive`."""
    grid = cfg.image_size // cfg.student.patch_size
    teachers: dict[str, int | None] = {}
    for first, *others in [] if cfg.cache.folder else teachers_by_trunk(cfg.teachers):
        counts = [teacher_flops(name, cfg.teachers[name], grid) for name in (first, *others)]
        # one network: an entry that reads another width of it (CLIP's projected cls) does not say which
        deepest = max((count for count in counts if count is not None), default=None)
        if deepest is None and trunks is not None:
            given = seen(cfg.teachers[first], grid)
            known = given.images and first in trunks  # a rank may not have loaded it
            deepest = _count_or_none(first, trunks[first], given.side) if known else None
            deepest = None if deepest is None else deepest // given.images
        if deepest is not None:
            deepest = round(deepest * share_of_images(cfg, [first, *others]))
        teachers |= {first: deepest, **dict.fromkeys(others, 0)}
    projectors = 0
    for name, features in cfg.teacher_features.items():
        share = loss_patches(cfg, grid**2) / grid**2
        count = projector_flops(cfg.projector.of(name), cfg.student, features, grid, share)
        projectors += round(count * share_of_images(cfg, [name]))
    return Flops(vit_flops(cfg.student, grid), projectors, {name: teachers.get(name, 0) for name in cfg.teachers})


def _count_or_none(name: str, trunk: nn.Module, side: int) -> int | None:
    try:
        return count_flops(trunk, (side, side))
    except Exception as error:  # anybody's network, on tensors without data: whatever it does, the run can do without
        logger.info("the operations of teacher %s cannot be counted, so there is no MFU: %s", name, error)
        return None
