"""The optimizer, its parameter groups, and the published clipping: every parameter's gradient on its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dune_fast.engine.lamb import Lamb
from dune_fast.engine.schedules import SCHEDULES, scaled_learning_rate, scheduled_rates

OPTIMIZERS = {"adamw": torch.optim.AdamW, "lamb": Lamb}


@dataclass
class OptimizerConfig:
    """The optimizer and its schedule; the defaults are those published for DUNE."""

    name: str = "adamw"
    """One of `OPTIMIZERS`: "adamw"; "lamb", which makes the step of every parameter that has weight decay `lr` times as
    long as the parameter. Those without, vectors and biases, take AdamW's step; see `decay_vectors`."""
    lr_per_256: float = 3e-4
    """Peak learning rate for a global batch of 256; scaled linearly with the batch."""
    lr: float | None = None
    """Peak learning rate for any batch; null for that of `lr_per_256`."""
    schedule: str = "dune"
    """How the learning rate goes, one of `schedules.SCHEDULES`: "dune", "mast3r", "linear", "cosine", "constant"."""
    min_lr: float = 1e-6
    """Learning rate that the schedule ends at."""
    warmup_fraction: float = 0.2
    """Share of the run that warms up."""
    warmup_start: float = 0.0
    """"linear", "cosine", "constant": the share of its rate that the warm-up begins with."""
    cycle_beta: list[float] = field(default_factory=list)
    """[high, low]: the first beta goes from high to low in the first 30 % of the run, and back; empty for `betas`."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-15
    weight_decay: float = 0.03
    """On tensors of two or more dimensions that are no biases."""
    decay_vectors: bool = False
    """Weight decay on tensors of one dimension and biases, too, which LAMB then adapts."""
    frozen_trunk_steps: int = 0
    """The student's encoder keeps its weights for the first so many steps, in which their moments settle; the
    projectors learn. PHI-S: 5,000."""
    clip_per_parameter: float = 1.0
    """L2 norm that each parameter's gradient is clipped to, after averaging over ranks; 0 for none of this kind."""
    clip_global: float = 0.0
    """L2 norm that all gradients together are clipped to; 0 for none of this kind. Set `clip_per_parameter` to 0."""

    def peak(self, global_batch: int) -> float:
        """The highest learning rate."""
        return scaled_learning_rate(self.lr_per_256, global_batch) if self.lr is None else self.lr

    def rates(self, steps: int, global_batch: int) -> np.ndarray:
        """The learning rate of every step of a run, float64 [steps]."""
        return scheduled_rates(
            self.schedule, steps, self.peak(global_batch), self.min_lr, self.warmup_fraction, self.warmup_start
        )

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optimizer.name={self.name!r}; choose one of {', '.join(OPTIMIZERS)}")
        if self.name == "lamb" and not self.weight_decay:
            raise ValueError(
                "optimizer.name=lamb adapts parameters with weight decay, and optimizer.weight_decay=0 leaves none: "
                "set it above 0, or optimizer.name=adamw"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer.schedule={self.schedule!r}; choose one of {', '.join(SCHEDULES)}")
        if self.cycle_beta and (len(self.cycle_beta) != 2 or not all(0 <= beta < 1 for beta in self.cycle_beta)):
            raise ValueError(f"optimizer.cycle_beta={list(self.cycle_beta)}; give two numbers from 0 to below 1, or []")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={list(self.betas)}; give two numbers from 0 to below 1")
        if self.clip_per_parameter and self.clip_global:
            raise ValueError(
                f"optimizer.clip_per_parameter={self.clip_per_parameter:g} and clip_global={self.clip_global:g} "
                "exclude each other: set one of them to 0"
            )


TRUNK = "encoder."
"""What names of the encoder's parameters begin with."""


def parameter_groups(
    module: nn.Module, weight_decay: float, vectors: bool = False, own_trunk: bool = False
) -> list[dict]:
    """Trainable parameters in two groups: tensors of two or more dimensions with weight decay; vectors and biases (that
    of a LayerNorm over a map has three dimensions) without, or with it for `vectors`. A third one has those that a
    module of the network names `undecayed`. With `own_trunk` the encoder's follow in groups of their own, marked
    "trunk"."""
    every = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    never = {id(getattr(part, name)) for part in module.modules() for name in getattr(part, "undecayed", ())}
    vector = {id(p) for name, p in every if p.ndim < 2 or name.rpartition(".")[2] == "bias"}
    groups = []
    for trunk in (False, True) if own_trunk else (None,):
        own = [p for name, p in every if trunk is None or name.startswith(TRUNK) == trunk]
        mark = {"trunk": True} if trunk else {}
        groups += [
            {"params": [p for p in own if id(p) not in vector | never], "weight_decay": weight_decay, **mark},
            {"params": [p for p in own if id(p) in vector], "weight_decay": weight_decay * vectors, **mark},
        ]
        if rest := [p for p in own if id(p) in never - vector]:
            groups.append({"params": rest, "weight_decay": 0.0, **mark})
    return groups


def build_optimizer(module: nn.Module, cfg: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW, or LAMB on top of it: their step count stays on the device, the host reads nothing."""
    groups = parameter_groups(module, cfg.weight_decay, cfg.decay_vectors, cfg.frozen_trunk_steps > 0)
    return OPTIMIZERS[cfg.name](groups, lr=0.0, betas=tuple(cfg.betas), eps=cfg.eps, fused=True)


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), elementwise."""
    return (max_norm / (norm + 1e-6)).clamp_max(1.0)


@torch.no_grad()
def scale_gradients(gradients: list[Tensor], norms: Tensor, indices: Tensor, cfg: OptimizerConfig) -> None:
    """Clips in place, each parameter on its own or all together; no host read.

    Args:
        gradients: whole gradients, or pieces of them.
        norms: of every parameter's whole gradient, float32 [P].
        indices: int64 [number of gradients], the parameter of each.
        cfg: at most one of `clip_per_parameter` and `clip_global` is on.
    """
    if cfg.clip_per_parameter > 0:
        torch._foreach_mul_(gradients, list(clip_scale(norms[indices], cfg.clip_per_parameter).unbind()))
    elif cfg.clip_global > 0:
        torch._foreach_mul_(gradients, clip_scale(norms.square().sum().sqrt(), cfg.clip_global))
