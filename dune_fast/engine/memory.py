"""What a run takes of a device's memory, and in how many parts a step's images fit: a model, not a measurement.

Three things lie on a device:

- weights, gradients and Adam's two moments in float32 (a share of what the ZeRO stage shards), and frozen teachers;
- the rank's whole batch, teachers' own crops too, several times: in use, being decoded, waiting;
- what the backward pass needs of the images of one part. Each has N tokens of D channels. A value takes s bytes in
  matrix products (2 under bf16 autocast, else 4) and t bytes between blocks (2 with `train.student_stream=bf16`, else
  4). A block with an MLP of ratio r keeps N D (2 t + s (8 + 2 r)): its input and its sum before the second norm; both
  norms, qkv, attention, its projection, both sides of GELU, the MLP's output. Added are the projectors, and what is
  largest of: the features and a teacher's forward pass (12 s a value); the features, their gradients and those within
  one block; the loss, counted by `loss_cost` with all that it enlarges, samples, rotates and keeps.

With `progressive` the images are those of the largest size, with `partitions` those of the fullest rank. What a teacher
and its projector take is counted for the images that they get (`presample`, `route_by_dataset`: the mean share and
three deviations of a part's), on the patches that the loss is taken on, and for a teacher's own `scale`, `input_size`,
`mosaic` and grid. A run from a cache has no teachers, unless `evaluation.every` loads them; it has their features of
the rank's whole batch, twice where that is split into parts.

Workspaces, fragmentation, NCCL, DALI's decoder and DeepSpeed's copies are not in the model: `SPARE` is for them. Nor is
the copy of the weights in LAMB's update, which needs nothing of the images any more.

More than 300 lines: the model is one thing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from dune_fast.distill.phi_s_running import RunningPhiS
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.engine.config import RunConfig
from dune_fast.engine.flops import loss_patches, published_network, share_of_images
from dune_fast.engine.loss_cost import Compared, loss_cost
from dune_fast.engine.projector_cost import KNOWN, ProjectorCost, projector_cost
from dune_fast.engine.stages import at_size, loaded_teachers, turns
from dune_fast.kernels.nn.block import swiglu_hidden_dim
from dune_fast.kernels.nn.routing import PatchSubset
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.base import blocks_read
from dune_fast.student import Student
from dune_fast.teachers.config import given_patches, network_key, seen, teachers_by_input, teachers_by_trunk

SPARE = 0.15
"""Share of a device's memory that is left for what the model does not count."""
ADAM_BYTES = 8
"""Of a parameter: Adam's two moments in float32, AdamW's and LAMB's."""
_TEACHER_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
"""Of a parameter of a frozen teacher; norms and positions stay in float32, which is little."""
_BATCHES_IN_FLIGHT = 3
"""Batches on the device besides the `data.prefetch` that wait: in use, just decoded, being decoded."""


def trained_parameters(cfg: RunConfig) -> tuple[int, int]:
    """Numbers of parameters of the encoder and of all projectors, what these share included."""
    with torch.device("meta"):
        student = Student(cfg.student, cfg.projector, cfg.teacher_features)
    encoder, everything = (sum(p.numel() for p in module.parameters()) for module in (student.encoder, student))
    return encoder, everything - encoder


def teacher_parameters(cfg: RunConfig) -> dict[str, int | None]:
    """Parameters of every network that teachers need, by the first teacher that reads it; None if it is unknown."""
    counts: dict[str, int | None] = {}
    held = set()
    for first, *_ in teachers_by_trunk(cfg.teachers):
        network = published_network(first, cfg.teachers[first])
        again = network_key(cfg.teachers[first]) in held  # for another input
        counts[first] = 0 if again else None if network is None else sum(p.numel() for p in network.parameters())
        held.add(network_key(cfg.teachers[first]))
    return counts


def checkpoint_bytes(cfg: RunConfig) -> int:
    """Bytes of one checkpoint: float32 weights, Adam's moments, the average of `train.ema`; teachers' statistics are
    little."""
    return sum(trained_parameters(cfg)) * (4 + ADAM_BYTES + (4 if cfg.train.ema else 0))


def disk_bytes(cfg: RunConfig) -> int:
    """The most that a run has on its disk at once: checkpoints, one of them being written, and the exported weights."""
    encoder, projectors = trained_parameters(cfg)
    forever = cfg.steps // cfg.train.keep_every if cfg.train.keep_every else 0
    exported = 2 * encoder + projectors + (encoder + projectors if cfg.train.ema else 0)
    return checkpoint_bytes(cfg) * (cfg.train.keep_checkpoints + forever + 1) + 4 * exported


def memory_bytes(cfg: RunConfig, ranks: int, low_precision: bool = True) -> dict[str, int | None]:
    """Bytes on each of `ranks` devices before the first image, by what they are for; None where that is not known. Of
    teachers, on the device that has the most.

    `low_precision`: whether `precision: auto` means bf16, as on a GPU.
    """
    every = [teacher_bytes(loaded, low_precision) for loaded, _ in _ranks(cfg, ranks)]
    teachers = None if None in every else max(count or 0 for count in every)
    statistics = statistics_bytes(cfg)[0]
    known = {"teachers' statistics": statistics} if statistics > 2**24 else {}  # means and deviations are little
    return {**trained_bytes(cfg, sum(trained_parameters(cfg)), ranks), **known, "teachers": teachers}


def teacher_bytes(cfg: RunConfig, low_precision: bool) -> int | None:
    """Bytes of all teachers that a configuration has, where they are loaded; None if one is not known."""
    auto = "bf16" if low_precision else "fp32"
    total: int | None = 0
    none = cfg.cache.folder and not cfg.evaluation.every
    for name, count in ({} if none else teacher_parameters(cfg)).items():
        precision = cfg.teachers[name].precision
        size = _TEACHER_BYTES[auto if precision == "auto" else precision]
        total = None if total is None or count is None else total + count * size
    return total


def statistics_bytes(cfg: RunConfig) -> tuple[int, int]:
    """Bytes of the teachers' statistics, and the most that an update of them has beside: matrices [C, C] in float64 of
    PHI-S (estimated beforehand, they are there before the optimizer is, which takes more)."""
    with torch.device("meta"):
        statistics = TeacherStatistics.of(cfg.teacher_features, cfg.standardization)
    kept = sum(x.numel() * x.element_size() for x in statistics.buffers())
    running = statistics.of_convention(RunningPhiS.convention)
    return kept, max((n.update_bytes for _, _, n in running), default=0)


def trained_bytes(cfg: RunConfig, count: int, ranks: int) -> dict[str, int]:
    """Bytes on each of `ranks` devices of so many trained parameters, by what they are for: what ZeRO shards."""
    stage = cfg.deepspeed.zero_stage
    moments, gradients, weights = (ranks if stage >= first else 1 for first in (1, 2, 3))
    return {
        "weights": 4 * count // weights,
        "gradients": 4 * count // gradients,
        "Adam's moments": ADAM_BYTES * count // moments,
        **({"average of the weights": 4 * count // moments} if cfg.train.ema else {}),
    }


def _block(
    tokens: int, dim: int, size: int, stream: int, mlp_ratio: float, mlp: str = "gelu", kept: int | None = None
) -> int:
    """Kept of one image in one transformer block, of whose tokens `kept` go on after attention."""
    inner = 4 * swiglu_hidden_dim(dim, mlp_ratio) if mlp == "swiglu" else 2 * int(mlp_ratio * dim)
    kept = tokens if kept is None else kept
    return tokens * (stream + 6 * size) * dim + kept * ((stream + 2 * size) * dim + size * inner)


def _encoder(cfg: ViTConfig, tokens: int, size: int, stream: int, recompute: bool) -> int:
    if recompute:  # the tokens between blocks
        return tokens * stream * cfg.embed_dim * cfg.depth
    return _block(tokens, cfg.embed_dim, size, stream, cfg.mlp_ratio, cfg.mlp) * cfg.depth


def _cost(cfg: RunConfig, name: str, grid: int, size: int) -> ProjectorCost:
    return projector_cost(cfg.projector.of(name), cfg.student, cfg.teacher_features[name], grid, size)


def _projector(cfg: RunConfig, name: str, every: int, patches: int, size: int, stream: int) -> int:
    """Kept of one image of so many patches in one teacher's projector, its output on some of them included."""
    p, dim, tokens = cfg.projector.of(name), cfg.student.embed_dim, patches + 1
    teacher = cfg.teacher_features[name]
    channels, token_types = teacher.channels, teacher.token_types
    if p.kind not in KNOWN:
        return _cost(cfg, name, math.isqrt(every), size).kept
    if p.kind == "tp":
        blocks = (p.num_blocks - 1) * _block(every + 1, dim, size, stream, p.mlp_ratio)
        blocks += _block(every + 1, dim, size, stream, p.mlp_ratio, kept=tokens) if p.num_blocks else 0
        return blocks + tokens * ((stream + size) * dim + size * channels)
    if p.kind == "sp":  # norm and GELU in float32, their inputs and outputs
        return tokens * (size * dim + (1 + p.num_inner) * (2 * size + 8) * p.hidden_dim + size * channels)
    rows = {"cls": 1, "patch": patches}
    kept = 0
    for block in p.which_blocks or range(cfg.student.depth):
        hidden = p.last_hidden_dim if block == cfg.student.depth - 1 else p.hidden_dim
        kept += sum(rows[t] * size * (dim + 2 * hidden) for t in token_types)
    return kept + sum(rows[t] * size * channels for t in token_types)


def _sizes(cfg: RunConfig, low_precision: bool) -> tuple[int, int]:
    """Bytes of a value in matrix products, and between blocks."""
    size = 2 if cfg.train.precision == "bf16" or (cfg.train.precision == "auto" and low_precision) else 4
    return size, 2 if size == 2 and cfg.train.student_stream == "bf16" else 4


def _peak_share(cfg: RunConfig, teachers: list[str], images: int | None) -> float:
    """Of a part's images, the most that any of these teachers gets: the mean share and three deviations; all where
    teachers are drawn for whole steps."""
    share = 1.0 if cfg.objective.teachers_per_step else share_of_images(cfg, teachers)
    return min(1.0, share + 3 * (share * (1 - share) / images) ** 0.5) if images else share


def kept_bytes(cfg: RunConfig, low_precision: bool = True, images: int | None = None) -> int:
    """Bytes that the student's forward pass keeps for every image of a part, its outputs included.

    `images` of the part, which decide what share of them a teacher may get; None for the mean share.
    """
    size, stream = _sizes(cfg, low_precision)
    patches, dim = (cfg.image_size // cfg.student.patch_size) ** 2, cfg.student.embed_dim
    tokens = patches + 1 + cfg.student.num_registers
    total = _encoder(cfg.student, tokens, size, stream, cfg.train.activation_checkpointing)
    read = len(blocks_read(cfg.projector, cfg.student.depth))
    total += stream * dim * (patches + 1) * read  # [cls, patches] without the registers
    some = loss_patches(cfg, patches)
    for name in cfg.teachers:
        own = _projector(cfg, name, patches, some, size, stream)
        total += round(own * _peak_share(cfg, [name], images))
    return total


def _loss(cfg: RunConfig, low_precision: bool) -> tuple[int, int]:
    """Bytes that the loss takes at its peak, see `loss_cost`: whatever the part, and for every image of it."""
    grid = cfg.image_size // cfg.student.patch_size
    size, some, compared = _sizes(cfg, low_precision)[0], loss_patches(cfg, grid**2), []
    dtype = torch.bfloat16 if size == 2 else torch.float32
    for name, teacher in cfg.teachers.items():
        if "patch" in teacher.token_types:
            projector, given = cfg.projector.of(name), given_patches(teacher, grid)
            given = given if teacher.grid == "own" else some
            finer = projector.patch_head.upsample**2 if projector.kind == "heads" else 1
            own = given if projector.kind == "theia" else finer * some
            view = (teacher.input_size or cfg.image_size) if cfg.data.teacher_views else 0
            kind = dtype if projector.kind in KNOWN else _cost(cfg, name, grid, size).dtype
            compared.append(Compared(name, teacher.num_features, own, given, kind, view))
    return loss_cost(cfg.objective, cfg.standardization, compared, dtype) if compared else (0, 0)


def image_bytes(cfg: RunConfig, low_precision: bool = True, images: int | None = None) -> int:
    """Bytes at the peak of a step for every image of a part: see the head of this file. `images`: see `kept_bytes`."""
    return max(phases(cfg, low_precision, images).values())


def phases(cfg: RunConfig, low_precision: bool = True, images: int | None = None) -> dict[str, int]:
    """The same at the peak of each phase of a step: while the teachers run, the loss, the student's backward pass."""
    size, stream = _sizes(cfg, low_precision)
    grid = cfg.image_size // cfg.student.patch_size
    patches, dim = grid**2, cfg.student.embed_dim
    some, tokens = loss_patches(cfg, patches), patches + 1 + cfg.student.num_registers
    kept, pictures, features, gradients, forward = kept_bytes(cfg, low_precision, images), 0.0, 0.0, 0.0, 0.0
    for group in teachers_by_trunk(cfg.teachers):
        read = cfg.teachers[group[0]]
        for name in group:
            teacher = cfg.teachers[name]
            channels = size * teacher.num_features * _peak_share(cfg, [name], images)
            of_loss = some * channels
            gradients += of_loss
            features += given_patches(teacher, grid) * channels if not cfg.cache.folder else 0
            features += of_loss if cfg.objective.patch_share < 1 else 0  # a copy
        if cfg.cache.folder:
            continue
        share, given = _peak_share(cfg, group, images) / max(1, seen(read, grid).images), seen(read, grid)
        tokens_in = (given.side // read.patch_size) ** 2
        forward = max(forward, share * tokens_in * 12 * size * max(cfg.teachers[name].num_features for name in group))
        if given.side != cfg.image_size:
            pictures += share * 12 * given.side**2
    backward = gradients + size * tokens * int(2 * cfg.student.mlp_ratio * dim)
    if cfg.train.activation_checkpointing:  # one block is whole again
        backward = max(backward, _block(tokens, dim, size, stream, cfg.student.mlp_ratio, cfg.student.mlp))
    loss = _loss(cfg, low_precision)[1] * max(_peak_share(cfg, [name], images) for name in cfg.teachers)
    each = {"teachers": features + pictures + forward, "loss": loss, "backward": features + backward}
    return {name: kept + round(size) for name, size in each.items()}


def cached_bytes(cfg: RunConfig) -> int:
    """Bytes of one image's features out of a cache, decoded; 0 without a cache."""
    if not cfg.cache.folder:
        return 0
    size, grid = 4 if cfg.cache.format == "fp32" else 2, cfg.image_size // cfg.student.patch_size
    total = 0
    for teacher in cfg.teachers.values():
        rows = {"patch": PatchSubset(cfg.cache.patch_share, 0, 0).count(given_patches(teacher, grid)), "cls": 1}
        total += sum(size * rows[token] * teacher.num_features for token in teacher.token_types)
    return total


@dataclass(frozen=True)
class Fit:
    """How a rank's images of a step would lie in its device's memory."""

    images: int
    """Of a step, on this rank."""
    parts: int
    """Of equal size, one backward pass each."""
    needed: int
    """Bytes, estimated."""
    available: int
    """Bytes of the device."""
    unknown: tuple[str, ...] = ()
    """Teachers whose size is not known: then none of them is counted."""

    @property
    def fits(self) -> bool:
        """Whether the spare share is left."""
        return self.needed <= (1 - SPARE) * self.available

    def __str__(self) -> str:
        parts = f"in {self.parts} parts of {self.images // self.parts}" if self.parts > 1 else "at once"
        but = f" (without the teachers: the size of {', '.join(self.unknown)} is not known)" if self.unknown else ""
        return f"{parts}: estimated {self.needed / 2**30:.3g} of {self.available / 2**30:.3g} GiB{but}"


def fit(cfg: RunConfig, ranks: int, available: int, low_precision: bool = True, parts: int | None = None) -> Fit:
    """The fewest parts that leave the spare share of memory; as many as there are images where none does.

    Args:
        ranks: devices; they must share the batch evenly.
        available: bytes of each device.
        low_precision: whether `auto` precisions mean bf16, as on a GPU.
        parts: look at this number of parts alone.
    """
    assert cfg.partitions or cfg.train.global_batch % ranks == 0
    unknown = tuple(name for name, count in teacher_parameters(cfg).items() if count is None)
    unknown = () if cfg.cache.folder and not cfg.evaluation.every else unknown
    trained = sum(trained_bytes(cfg, sum(trained_parameters(cfg)), ranks).values()) + statistics_bytes(cfg)[0]
    every = [(teacher_bytes(loaded, low_precision) or 0, batches) for loaded, batches in _ranks(cfg, ranks)]
    shared = math.gcd(*(images for _, batches in every for _, images in batches))
    for count in [n for n in range(1, shared + 1) if shared % n == 0] if parts is None else [parts]:
        needed = trained + max(frozen + _of_batches(batches, count, low_precision) for frozen, batches in every)
        images = max(sum(n for _, n in batches) for _, batches in every)
        found = Fit(images, count, needed, available, unknown)
        if found.fits:
            break
    return found


def _ranks(cfg: RunConfig, ranks: int) -> list[tuple[RunConfig, list[tuple[RunConfig, int]]]]:
    """Of every rank that differs from the ranks before: the configuration with the teachers that it loads, and those of
    the batches of a step, with their images."""
    if not cfg.partitions:
        return [(cfg, [(cfg, cfg.train.global_batch // ranks)])]
    found = {}
    for rank in range(ranks):
        own = turns(cfg, rank, ranks)
        key = tuple((turn.stage, turn.part.slots.stop - turn.part.slots.start) for turn in own)
        batches = [(at_size(cfg, stage.image_size, stage.teachers), images) for stage, images in key]
        found[key] = at_size(cfg, cfg.image_size, loaded_teachers(cfg, own)), batches
    return list(found.values())


def _of_batches(batches: list[tuple[RunConfig, int]], count: int, low_precision: bool) -> int:
    """Bytes of a rank's batches in a step, each in `count` parts."""
    total, peak = 0, 0
    for cfg, images in batches:
        crops = [names[0] for names in teachers_by_input(cfg.teachers)] if cfg.data.teacher_views else []
        sides = [cfg.image_size, *(cfg.teachers[name].input_size or cfg.image_size for name in crops)]
        total += images * 12 * sum(side**2 for side in sides) * (cfg.data.prefetch + _BATCHES_IN_FLIGHT)
        total += images * cached_bytes(cfg) * (2 if count > 1 else 1)
        fixed = max(_loss(cfg, low_precision)[0], statistics_bytes(cfg)[1])
        peak = max(peak, fixed + images // count * image_bytes(cfg, low_precision, images // count))
    return total + peak


def device_memory(device: torch.device, ranks: int) -> int:
    """Bytes that a rank may use: all of a GPU's; of a CPU's, its share of what is free (all ranks are on one host)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":  # a container's
        free = min(free, int(text) - int(used.read_text()))
    return max(0, free) // ranks


def smallest_memory(device: torch.device) -> int:
    """The least `device_memory` of all ranks, which all call it and all get the same."""
    found = torch.tensor(device_memory(device, dist.get_world_size()), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found.item())
