"""The range of every number in the configuration, but for those of datasets and teachers, which check their own."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Limit(NamedTuple):
    """A range; `low` itself is allowed unless `above` is set."""

    low: float = 0
    high: float = math.inf
    meaning: str = ""
    """What `low` stands for, for the message."""
    above: bool = False

    def fault(self, value: float) -> str:
        """ "it must be at least 1", or nothing where the value is allowed; NaN never is."""
        if (self.low < value or (value == self.low and not self.above)) and value <= self.high:
            return ""
        if self.high < math.inf:
            return f"it must be {'above' if self.above else 'from'} {self.low:g} {'up ' * self.above}to {self.high:g}"
        return f"it must be {'above' if self.above else 'at least'} {self.low:g}{self.meaning}"


_COUNT, _SHARE, _POSITIVE = Limit(1), Limit(0, 1), Limit(0, above=True)

LIMITS: dict[str, Limit] = {
    **dict.fromkeys((
        *(f"projector.{head}_head.{field}" for head in ("cls", "patch") for field in ("hidden_dim", "upsample")),
        "image_size", "student.image_size", "student.patch_size", "student.embed_dim", "student.depth",
        "student.num_heads", "projector.num_blocks", "projector.num_heads", "projector.hidden_dim",
        "projector.down_ratio", "projector.last_hidden_dim", "projector.translator_layers",
        "projector.translator_heads",
        "standardization.phi_s_batches", "standardization.phi_s_period", "start.blocks", "objective.angle_samples",
        "train.images", "train.global_batch",
        "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "evaluation.batch",
        "evaluation.knn_images", "evaluation.knn_k", "evaluation.figure_size", "evaluation.figure_images",
        "head.threads", "head.ahead", "student.radio.num_global",
    ), _COUNT),
    **dict.fromkeys((
        *(f"projector.{head}_head.{field}" for head in ("cls", "patch") for field in ("num_inner", "upsample_rank")),
        "student.num_registers", "projector.num_inner", "train.drift_images", "objective.cls.cosine",
        "objective.cls.smooth_l1", "objective.patch.cosine", "objective.patch.smooth_l1", "objective.beta",
        *(f"objective.{token}.{term}" for token in ("cls", "patch") for term in (
            "mse", "dampened_mse", "map_cosine", "angle", "tangent_sphere",
        )),
        "optimizer.clip_per_parameter", "optimizer.clip_global", "optimizer.frozen_trunk_steps", "train.steps",
        "cache.components", "objective.teachers_per_step", "projector.source_grid",
        *(f"student.radio.{field}" for field in ("cpe_max_size", "register_multiple", "num_windowed")),
    ), Limit()),
    **dict.fromkeys((
        "student.mlp_ratio", "projector.mlp_ratio", "standardization.eps", "train.max_loss", "train.timeout_minutes",
        "projector.hidden_factor", "train.rendezvous_minutes", "cache.shard_megabytes",
    ), _POSITIVE),
    **dict.fromkeys((
        "standardization.ema_start", "standardization.ema_end", "objective.drop_probability",
        "optimizer.warmup_fraction", "optimizer.warmup_start", "student.radio.position_dropout",
        "student.radio.window_probability",
    ), _SHARE),
    "student.radio.spectral": Limit(0, 2),
    "student.interpolate_offset": Limit(0, 0.99),
    "objective.patch_share": Limit(0, 1, above=True),
    "cache.patch_share": Limit(0, 1, above=True),
    "student.layer_scale": Limit(0, 100),
    "projector.layer_scale": Limit(0, 100),
    "projector.version": Limit(1, 2),
    "optimizer.lr_per_256": Limit(0, 10, above=True),
    "optimizer.lr": Limit(0, 10, above=True),
    "optimizer.min_lr": Limit(0, 10),
    "optimizer.eps": Limit(0, 1, above=True),
    "optimizer.weight_decay": Limit(0, 10),
    "objective.tangent_samples": Limit(2),
    "start.images": Limit(2),
    "train.seed": Limit(0, 2**63 - 1),
    "train.accumulation": Limit(0, meaning=", which works it out from the memory"),
    "train.keep_every": Limit(0, meaning=", which keeps none for good"),
    "train.notice_seconds": Limit(0, above=True),
    "train.ema": Limit(0, 0.999999),
    "evaluation.every": Limit(0, meaning=", which evaluates never"),
    "deepspeed.zero_stage": Limit(0, 3),
}  # fmt: skip


def find_fault(numbers: dict[str, Any]) -> str:
    """A sentence for the first number out of its range; empty if there is none.

    Args:
        numbers: dotted field -> value; None, text and fields without a limit are passed over.
    """
    for path, limit in LIMITS.items():
        value = numbers.get(path)
        if isinstance(value, int | float) and not isinstance(value, bool) and (fault := limit.fault(value)):
            return f"{path}={value}; {fault}"
    return ""
