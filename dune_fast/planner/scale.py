"""Many GPUs on paper: what a step sends, reads and decodes, against links, storage and cores.

Bytes that each of n ranks sends in a step, with f = (n - 1) / n, G bytes of gradients (in `deepspeed.gradient_dtype`),
W bytes of float32 weights, p parts (`train.accumulation`):

    ZeRO 0    2 f G                  an all-reduce, partly hidden behind the backward pass of the last part
    ZeRO 1    2 f G + f W            after the backward pass; then each rank's weights to all
    ZeRO 2    2 f G p + f W          the same after every part
    ZeRO 3    (2 f W + f G) p        weights before both passes, gradients to their owner

tests/planner/test_plan_scale.py counts these bytes between two processes. Teachers' statistics are summed once a part:
two float64 numbers a channel and a count.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from dune_fast.engine.config import RunConfig
from dune_fast.engine.gradient_average import FEWEST, LARGEST
from dune_fast.engine.memory import trained_parameters

OVERLAP_SHARE = 0.5
"""Of the link's rate that a transfer reaches beside a backward pass. Two hosts whose two cores compute and send at once
reached 0.61 at 1 Gbit/s and 0.34 at 500 Mbit/s (bench/NOTES.md, "Two hosts"). Not measured on GPUs."""
LATENCY_S = 10e-6
"""Of one hop of a collective, an assumption."""


def bytes_of_stage(stage: int, ranks: int, parameters: int, gradient_size: int, parts: int) -> float:
    """Bytes that each rank sends in a step; see the head of this file."""
    f, gradients, weights = (ranks - 1) / ranks, parameters * gradient_size, parameters * 4
    return {
        0: 2 * f * gradients,
        1: 2 * f * gradients + f * weights,
        2: 2 * f * gradients * parts + f * weights,
        3: (2 * f * weights + f * gradients) * parts,
    }[stage]


def sent_bytes(cfg: RunConfig, ranks: int) -> float:
    """Bytes of gradients and weights that each rank sends in a step."""
    size = 2 if cfg.deepspeed.gradient_dtype == "bf16" else 4
    parts = max(1, cfg.train.accumulation)
    return bytes_of_stage(cfg.deepspeed.zero_stage, ranks, sum(trained_parameters(cfg)), size, parts)


def exposed_seconds(cfg: RunConfig, sent: float, link: float, backward: float) -> float:
    """Of the transfer of `sent` bytes over `link` bytes/s, what the step waits for.

    Under ZeRO 0 a part of it hides behind `backward` seconds, see `overlapped`; under the others nothing does.
    """
    seconds = sent / link
    if cfg.deepspeed.zero_stage:
        return seconds
    size = 2 if cfg.deepspeed.gradient_dtype == "bf16" else 4
    return overlapped(seconds, backward, max(FEWEST, sum(trained_parameters(cfg)) * size / LARGEST))


def overlapped(seconds: float, backward: float, buckets: float) -> float:
    """What a step waits for of a transfer of `seconds`, in equal buckets that the backward pass completes in turn.

    The transfer begins with the first bucket, reaches `OVERLAP_SHARE` of the link's rate until the backward pass ends,
    and all of it then. The last bucket has nothing to hide behind.
    """
    hidden = OVERLAP_SHARE * backward * (1 - 1 / buckets)
    return max(seconds / buckets, seconds - hidden)


def statistics_bytes(cfg: RunConfig) -> int:
    """Bytes of one all-reduce of the teachers' statistics."""
    return sum(8 * (2 * t.num_features + 1) * len(t.token_types) for t in cfg.teachers.values())


@dataclass(frozen=True)
class Cluster:
    """What joins and feeds the GPUs."""

    gpus: int
    """A node."""
    tflops: float
    """TFLOP/s that one GPU reaches."""
    inside: float
    """Bytes/s between GPUs of a node, one direction."""
    between: float
    """Bytes/s of a node's network, one direction."""
    storage: float | None
    """Bytes/s of all nodes together; None if it is not given."""
    cores: int | None
    """CPU cores of a node; None if they are not given."""
    image_bytes: float
    decode_seconds: float
    """CPU time of one image."""


@dataclass(frozen=True)
class Scaled:
    """One step on so many nodes."""

    nodes: int
    gpus: int
    images: int
    """A GPU."""
    seconds: dict[str, float]
    """Of the step, by what takes them: compute, gradients (what is not hidden), statistics, storage, decoding."""
    gradient_bytes: float
    """That a rank sends."""
    statistics_bytes: float
    step: float
    """Seconds."""
    efficiency: float
    """Share of the GPUs' time that they compute."""
    bottleneck: str
    storage_needed: float
    """Bytes/s of all nodes together."""
    cores_needed: float
    """A node."""


def scaled(cfg: RunConfig, cluster: Cluster, flops: tuple[float, float], nodes: int) -> Scaled | None:
    """One step of the recipe's global batch; None if the GPUs cannot share it.

    Args:
        cfg: with `train.accumulation` as on one GPU's share; more GPUs need fewer parts.
        flops: of an image, what is trained and the teachers'.
    """
    ranks, batch = nodes * cluster.gpus, cfg.train.global_batch
    if batch % ranks:
        return None
    cfg = copy.deepcopy(cfg)
    parts = max(1, cfg.train.accumulation)
    images, rate = batch // ranks, cluster.tflops * 1e12
    while images % parts:
        parts -= 1
    cfg.train.accumulation = parts
    link = cluster.inside if nodes == 1 else min(cluster.inside, cluster.between)
    compute, backward = images * sum(flops) / rate, images * flops[0] * 2 / 3 / rate / parts
    sent = sent_bytes(cfg, ranks)
    summed = 2 * (ranks - 1) / ranks * statistics_bytes(cfg) * parts
    seconds = {
        "compute": compute,
        "gradients": exposed_seconds(cfg, sent, link, backward) if ranks > 1 else 0.0,
        "statistics": summed / link + (2 * (ranks - 1) * LATENCY_S * parts if ranks > 1 else 0.0),
        "storage": batch * cluster.image_bytes / cluster.storage if cluster.storage else 0.0,
        "decoding": batch * cluster.decode_seconds / (nodes * cluster.cores) if cluster.cores else 0.0,
    }
    working = seconds["compute"] + seconds["gradients"] + seconds["statistics"]
    step = max(working, seconds["storage"], seconds["decoding"])  # images are read while the GPUs work
    names = ("storage", "decoding") if step > working else ("compute", "gradients", "statistics")
    return Scaled(
        nodes, ranks, images, seconds, sent, summed, step, compute / step, max(names, key=seconds.__getitem__),
        batch * cluster.image_bytes / working, batch * cluster.decode_seconds / working / nodes,
    )  # fmt: skip


def node_counts(text: str) -> Sequence[int]:
    """1..32 as 1, 2, 4, 8, 16, 32; "3" as 3; ValueError for anything else."""
    first, dots, last = text.partition("..")
    if not first.isdigit() or (dots and not last.isdigit()) or not 1 <= int(first) <= int(last or first):
        raise ValueError(f"--nodes {text}: give a number of machines or a range, e.g. 4 or 1..32")
    counts = [int(first)]
    while counts[-1] * 2 <= int(last or first):
        counts.append(counts[-1] * 2)
    return counts
