"""What a run takes of a device's memory, and in how many parts a step's images fit: a model, not a measurement.

Three things lie on a device:

- weights, gradients and AdamW's two moments in float32 (a share of what the ZeRO stage shards), and frozen teachers;
- the rank's whole batch, several times: in use, being decoded, waiting;
- what the backward pass needs of the images of one part. Each has N tokens of D channels. A value takes s bytes in
  matrix products (2 under bf16 autocast, else 4) and t bytes between blocks (2 with `train.student_stream=bf16`, else
  4). A block with an MLP of ratio r keeps N D (2 t + s (8 + 2 r)): its input and its sum before the second norm; both
  norms, qkv, attention, its projection, both sides of GELU, the MLP's output. Added are the projectors, the features
  and their gradients, and the larger of a teacher's forward pass (12 s a value) and the gradients within one block.

Workspaces, fragmentation, NCCL, DALI's decoder and DeepSpeed's copies are not in the model: `SPARE` is for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from dune_fast.engine.config import RunConfig
from dune_fast.engine.flops import published_network, teachers_by_trunk
from dune_fast.kernels.nn.block import swiglu_hidden_dim
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.student import Student

SPARE = 0.15
"""Share of a device's memory that is left for what the model does not count."""
ADAM_BYTES = 8
"""Of a parameter: AdamW's two moments in float32."""
_TEACHER_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
"""Of a parameter of a frozen teacher; norms and positions stay in float32, which is little."""
_BATCHES_IN_FLIGHT = 3
"""Batches on the device besides the `data.prefetch` that wait: in use, just decoded, being decoded."""


def trained_parameters(cfg: RunConfig) -> tuple[int, int]:
    """Numbers of parameters of the encoder and of all projectors."""
    with torch.device("meta"):
        student = Student(cfg.student, cfg.projector, cfg.teacher_features)
    return sum(p.numel() for p in student.encoder.parameters()), sum(p.numel() for p in student.projectors.parameters())


def teacher_parameters(cfg: RunConfig) -> dict[str, int | None]:
    """Parameters of every network that teachers need, by the first teacher that reads it; None if it is unknown."""
    counts: dict[str, int | None] = {}
    for first, *_ in teachers_by_trunk(cfg.teachers):
        network = published_network(first, cfg.teachers[first])
        counts[first] = None if network is None else sum(p.numel() for p in network.parameters())
    return counts


def checkpoint_bytes(cfg: RunConfig) -> int:
    """Bytes of one checkpoint: float32 weights, AdamW's moments, the average of `train.ema`; teachers' statistics are
    little."""
    return sum(trained_parameters(cfg)) * (4 + ADAM_BYTES + (4 if cfg.train.ema else 0))


def disk_bytes(cfg: RunConfig) -> int:
    """The most that a run has on its disk at once: checkpoints, one of them being written, and the exported weights."""
    encoder, projectors = trained_parameters(cfg)
    forever = cfg.steps // cfg.train.keep_every if cfg.train.keep_every else 0
    exported = 2 * encoder + projectors + (encoder + projectors if cfg.train.ema else 0)
    return checkpoint_bytes(cfg) * (cfg.train.keep_checkpoints + forever + 1) + 4 * exported


def memory_bytes(cfg: RunConfig, ranks: int, low_precision: bool = True) -> dict[str, int | None]:
    """Bytes on each of `ranks` devices before the first image, by what they are for; None where that is not known.

    `low_precision`: whether `precision: auto` means bf16, as on a GPU.
    """
    trained, stage = sum(trained_parameters(cfg)), cfg.deepspeed.zero_stage
    moments, gradients, weights = (ranks if stage >= first else 1 for first in (1, 2, 3))
    auto = "bf16" if low_precision else "fp32"
    teachers: int | None = 0
    for name, count in teacher_parameters(cfg).items():
        precision = cfg.teachers[name].precision
        size = _TEACHER_BYTES[auto if precision == "auto" else precision]
        teachers = None if teachers is None or count is None else teachers + count * size
    return {
        "weights": 4 * trained // weights,
        "gradients": 4 * trained // gradients,
        "AdamW's moments": ADAM_BYTES * trained // moments,
        **({"average of the weights": 4 * trained // moments} if cfg.train.ema else {}),
        "teachers": teachers,
    }


def _block(tokens: int, dim: int, size: int, stream: int, mlp_ratio: float, mlp: str = "gelu") -> int:
    """Kept of one image in one transformer block."""
    inner = 4 * swiglu_hidden_dim(dim, mlp_ratio) if mlp == "swiglu" else 2 * int(mlp_ratio * dim)
    return tokens * (2 * stream * dim + size * (8 * dim + inner))


def _encoder(cfg: ViTConfig, tokens: int, size: int, stream: int, recompute: bool) -> int:
    if recompute:  # the tokens between blocks
        return tokens * stream * cfg.embed_dim * cfg.depth
    return _block(tokens, cfg.embed_dim, size, stream, cfg.mlp_ratio, cfg.mlp) * cfg.depth


def _projector(cfg: RunConfig, channels: int, token_types: list[str], patches: int, size: int, stream: int) -> int:
    """Kept of one image in one teacher's projector, its output included."""
    p, dim, tokens = cfg.projector, cfg.student.embed_dim, patches + 1
    if p.kind == "tp":
        blocks = p.num_blocks * _block(tokens, dim, size, stream, p.mlp_ratio)
        return blocks + tokens * ((stream + size) * dim + size * channels)
    if p.kind == "sp":  # norm and GELU in float32, their inputs and outputs
        inner = 1 + (p.num_inner if p.version == 2 else 0)
        return tokens * (size * dim + inner * (2 * size + 8) * p.hidden_dim + size * channels)
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


def kept_bytes(cfg: RunConfig, low_precision: bool = True) -> int:
    """Bytes that the student's forward pass keeps for every image of a part, its outputs included."""
    size, stream = _sizes(cfg, low_precision)
    patches, dim = (cfg.image_size // cfg.student.patch_size) ** 2, cfg.student.embed_dim
    tokens = patches + 1 + cfg.student.num_registers
    total = _encoder(cfg.student, tokens, size, stream, cfg.train.activation_checkpointing)
    read = len(cfg.projector.which_blocks or range(cfg.student.depth)) if cfg.projector.kind == "lp" else 1
    total += stream * dim * (patches + 1) * read  # [cls, patches] without the registers
    for teacher in cfg.teachers.values():
        total += _projector(cfg, teacher.num_features, teacher.token_types, patches, size, stream)
    return total


def image_bytes(cfg: RunConfig, low_precision: bool = True) -> int:
    """Bytes at the peak of a step for every image of a part: see the head of this file."""
    size, stream = _sizes(cfg, low_precision)
    grid = cfg.image_size // cfg.student.patch_size
    patches, dim = grid**2, cfg.student.embed_dim
    tokens = patches + 1 + cfg.student.num_registers
    total, features, forward = kept_bytes(cfg, low_precision), 0, 0
    for teacher in cfg.teachers.values():
        features += patches * size * teacher.num_features
        forward = max(forward, patches * 12 * size * teacher.num_features)
        total += 12 * (grid * teacher.patch_size) ** 2 if teacher.patch_size != cfg.student.patch_size else 0
    backward = features + size * tokens * int(2 * cfg.student.mlp_ratio * dim)
    if cfg.train.activation_checkpointing:  # one block is whole again
        backward = max(backward, _block(tokens, dim, size, stream, cfg.student.mlp_ratio, cfg.student.mlp))
    return total + features + max(forward, backward)


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
    assert cfg.train.global_batch % ranks == 0
    images = cfg.train.global_batch // ranks
    held = memory_bytes(cfg, ranks, low_precision)
    unknown: tuple[str, ...] = ()
    if held["teachers"] is None:
        unknown = tuple(name for name, count in teacher_parameters(cfg).items() if count is None)
    fixed = sum(count or 0 for count in held.values())
    fixed += images * 12 * cfg.image_size**2 * (cfg.data.prefetch + _BATCHES_IN_FLIGHT)
    each = image_bytes(cfg, low_precision)
    for count in [n for n in range(1, images + 1) if images % n == 0] if parts is None else [parts]:
        found = Fit(images, count, fixed + images // count * each, available, unknown)
        if found.fits:
            break
    return found


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
