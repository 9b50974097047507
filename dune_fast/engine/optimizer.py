"""AdamW's parameter groups and the published clipping: every parameter's gradient on its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class OptimizerConfig:
    """AdamW as published for DUNE."""

    lr_per_256: float = 3e-4
    """Peak learning rate for a global batch of 256; scaled linearly with the batch."""
    min_lr: float = 1e-6
    """Learning rate that the cosine ends at."""
    warmup_fraction: float = 0.2
    """Share of the run that warms up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-15
    weight_decay: float = 0.03
    """On tensors of two or more dimensions."""
    clip_per_parameter: float = 1.0
    """L2 norm that each parameter's gradient is clipped to, after averaging over ranks; 0 for no clipping."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: weight decay on tensors of two or more dimensions, none on the others."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(module: nn.Module, cfg: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW (its step count stays on the device: nothing is read by the host)."""
    groups = parameter_groups(module, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=tuple(cfg.betas), eps=cfg.eps, fused=True)


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), elementwise."""
    return (max_norm / (norm + 1e-6)).clamp_max(1.0)


@torch.no_grad()
def clip_per_parameter(gradients: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales each gradient in place to an L2 norm of at most `max_norm`; no host read.

    Returns:
        The norms before clipping, float32 [number of gradients].
    """
    gradients = list(gradients)
    norms = torch.stack(torch._foreach_norm(gradients, 2.0))
    if max_norm > 0:
        torch._foreach_mul_(gradients, list(clip_scale(norms, max_norm).unbind()))
    return norms
