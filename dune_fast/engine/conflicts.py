"""Do teachers pull the student apart? Correlation of their losses' changes, per pair, while a run trains.

    d_t[i] = L_t[i] - L_t[i-1]    change of teacher t's mean loss over the global batch from one step to the next
    sign agreement = mean_i [sign d_a[i] = sign d_b[i]]
    Pearson        = cov(d_a, d_b) / sqrt(var(d_a) var(d_b))

Where Pearson is negative, or signs agree in less than half of the steps, one teacher's loss tends to rise when the
other's falls. Means are over steps, older ones counting less: a step's weight falls to 1/e after `horizon` steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dune_fast.distill.standardization import AllReduce

MIN_STEPS = 8
"""Changes that are needed before a correlation is reported."""


class TeacherConflicts:
    """Keeps every step's losses in a small table on the device; the host reads it when it logs, and not before.

    Diagnostic only: a resumed run starts it anew.

    Args:
        capacity: steps between two reads, at most; of more, the last ones are kept.
        world_size: ranks that the losses are averaged over, at a read.
        horizon: in steps, see above.
    """

    def __init__(
        self, teachers: Sequence[str], capacity: int, device: torch.device, world_size: int = 1, horizon: float = 1000.0
    ) -> None:
        self.teachers = list(teachers)
        self.world_size = world_size
        count = len(self.teachers)
        self._table = torch.zeros(capacity, count, device=device)
        self._rows = 0
        self._last: np.ndarray | None = None  # losses of the step before the table's first
        self._decay = math.exp(-1.0 / horizon)
        self._changes = 0
        self._weight = 0.0
        self._sum = np.zeros(count)
        self._products, self._agreements = np.zeros((count, count)), np.zeros((count, count))

    def add(self, losses: Sequence[Tensor]) -> None:
        """Takes one step's losses in, a scalar on the device for every teacher in order: this rank's means."""
        if self._rows == len(self._table):  # full without a read: forget the steps so far
            self._rows, self._last = 0, None
        self._table[self._rows] = torch.stack(list(losses))
        self._rows += 1

    def read(self, all_reduce: AllReduce | None = None) -> dict[str, float]:
        """Waits for the device and brings the averages up to date. All ranks call it.

        Returns:
            `conflict/<a>_vs_<b>/pearson` in [-1, 1] and `conflict/<a>_vs_<b>/sign_agreement` in [0, 1] of every pair;
            empty before `MIN_STEPS` changes were seen. A pair of which one loss never changes has no Pearson.
        """
        table = self._table[: self._rows].double()
        if all_reduce is not None:
            all_reduce(table)
        losses = table.cpu().numpy() / self.world_size
        self._rows = 0
        losses = losses[np.isfinite(losses).all(axis=1)]  # a step whose loss is not finite is skipped by the trainer
        if len(losses):
            before = losses[:1] if self._last is None else self._last[None]
            changes = np.diff(np.concatenate([before, losses]), axis=0)
            self._fold(changes[1:] if self._last is None else changes)
            self._last = losses[-1]
        return self._correlations() if self._changes >= MIN_STEPS else {}

    def _fold(self, changes: np.ndarray) -> None:
        for d in changes:
            self._changes += 1
            self._weight = self._weight * self._decay + 1
            self._sum = self._sum * self._decay + d
            self._products = self._products * self._decay + np.outer(d, d)
            self._agreements = self._agreements * self._decay + (np.sign(d)[:, None] == np.sign(d)[None])

    def _correlations(self) -> dict[str, float]:
        mean = self._sum / self._weight
        covariance = self._products / self._weight - np.outer(mean, mean)
        found = {}
        for a, b in itertools.combinations(range(len(self.teachers)), 2):
            name = f"conflict/{self.teachers[a]}_vs_{self.teachers[b]}"
            scale = math.sqrt(max(covariance[a, a] * covariance[b, b], 0.0))
            if scale > 0 and math.isfinite(scale):
                found[f"{name}/pearson"] = float(np.clip(covariance[a, b] / scale, -1, 1))
            found[f"{name}/sign_agreement"] = float(self._agreements[a, b] / self._weight)
        return found
