"""Standardization of teachers' features per channel, with the statistics of all ranks.

    DUNE   y = (x - mean_batch) / max(std_batch, eps), eps = 1e-3; running statistics serve evaluation
    UNIC   y = (x - mean_run) / (std_run + eps), eps = 1e-6, with the running statistics from before the update; the
           batch deviation that updates them is std + eps
    PHI-S  y = (R x - mean) / max(phi, eps), eps = 1e-6: rotated by R first, see `dune_fast.distill.phi_s`
    fixed  y = (x - mean_all) / max(std_all, eps), eps = 1e-3: over all training images, known beforehand
    stored the same, eps = 0, with statistics out of files; "stored_bf16" in bfloat16, as Theia
    none   y = x
    PHI-S, running, as published: see `dune_fast.distill.phi_s_running`

    running = (1 - m) * running + m * batch,   unbiased std, over all images and patches of all ranks

Token types may have conventions of their own. PHI-S that is not running has nothing that runs: `estimate` takes
rotation, mean of R x and phi from the first batches of the run, before its first step; then they are frozen. Its
standardizer is per channel like the others, with equal deviations, so one loss kernel serves all conventions; the
rotation is one matrix product before it, in the features' own type.

Ranks exchange (count, sum, sum of squares) about a shift that all of them know, the running mean: one all-reduce for
all teachers, 16 bytes a channel. It is packed in float64, so that the first step, where the shift is still 0, loses
nothing either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dune_fast.distill.normalizers import BATCH, CONVENTIONS, PREPARED, Normalizer, Standardizer
from dune_fast.distill.phi_s import SecondMoments, phi_s
from dune_fast.distill.phi_s_running import PERIOD, AllReduce, RunningPhiS
from dune_fast.kernels.moments import moments

Features = Mapping[str, Mapping[str, Tensor]]
"""teacher -> token type -> [B, C] or [B, N, C]"""
AnyNormalizer = Normalizer | RunningPhiS


class StandardizationConfig(Protocol):
    """What is read here of a run's section `standardization`."""

    convention: str
    eps: float | None
    cls: str
    patch: str
    phi_s_period: int


class TeacherStatistics(nn.Module):
    """Running and batch statistics of every teacher and token type.

    State: `<teacher>.normalizers.<token>.{mean,std}`, float32 [C], as in the published checkpoints; for PHI-S
    `rotation` [C, C] too; for running PHI-S what `RunningPhiS` has.

    Args:
        teachers: name -> (channels, token types).
        convention: one of CONVENTIONS, see above.
        eps: of the formula; the convention's own by default.
        cls, patch: the convention of a token type; empty for the common one.
        period: steps between two rotations of running PHI-S.
    """

    def __init__(
        self, teachers: Mapping[str, tuple[int, Sequence[str]]], convention: str = "dune", eps: float | None = None,
        cls: str = "", patch: str = "", period: int = PERIOD,
    ) -> None:  # fmt: skip
        super().__init__()
        for chosen in (convention, *filter(None, (cls, patch))):
            if chosen not in CONVENTIONS:
                raise ValueError(f"standardization convention {chosen!r}; choose one of {', '.join(CONVENTIONS)}")
        of_token = {"cls": cls or convention, "patch": patch or convention}
        self.leads = True
        """Whether this is the rank whose eigenvectors all take."""
        for name, (channels, token_types, *_) in teachers.items():
            holder, normalizers = nn.Module(), {}
            for token in token_types:
                chosen = of_token[token]
                least = CONVENTIONS[chosen] if eps is None else eps
                running = chosen == RunningPhiS.convention
                normalizers[token] = (
                    RunningPhiS(channels, period, least) if running else Normalizer(channels, chosen, least)
                )
            holder.normalizers = nn.ModuleDict(normalizers)
            self.add_module(name, holder)

    @classmethod
    def of(cls, teachers: Mapping[str, tuple[int, Sequence[str]]], cfg: StandardizationConfig) -> TeacherStatistics:
        """Those that a run's section `standardization` describes."""
        return cls(teachers, cfg.convention, cfg.eps, cfg.cls, cfg.patch, cfg.phi_s_period)

    def items(self) -> list[tuple[str, str, AnyNormalizer]]:
        """(teacher, token type, running statistics), in a fixed order."""
        return [
            (name, token, normalizer)
            for name, teacher in self.named_children()
            for token, normalizer in teacher.normalizers.items()
        ]

    def of_convention(self, *conventions: str) -> list[tuple[str, str, AnyNormalizer]]:
        """Those of `items` that have one of these conventions."""
        return [(name, token, n) for name, token, n in self.items() if n.convention in conventions]

    def running(self) -> dict[str, dict[str, Standardizer]]:
        """Standardizers of the running statistics, for evaluation."""
        standardizers: dict[str, dict[str, Standardizer]] = {}
        for name, token, normalizer in self.items():
            standardizers.setdefault(name, {})[token] = normalizer.running()
        return standardizers

    @torch.no_grad()
    def update(
        self, features: Features, momentum: float, all_reduce: AllReduce | None = None,
        valid: Mapping[str, Tensor] | None = None,
    ) -> dict[str, dict[str, Standardizer]]:  # fmt: skip
        """Takes one global batch in and returns the standardizers that this step trains with.

        Args:
            features: this rank's raw features; ranks may hold different numbers of rows, also no rows.
            momentum: m of the formula for this step; at 0 the statistics are frozen and the running ones standardize,
                as in evaluation, whatever the convention. PHI-S, running or not, and fixed statistics have none.
            all_reduce: sums a float64 tensor over ranks; None on a single rank.
            valid: teacher -> bool [B, N], the patches that count for running PHI-S; all of them by default.
        """
        for name, token, normalizer in self.of_convention(RunningPhiS.convention):
            mask = valid.get(name) if valid is not None and token == "patch" else None
            normalizer.update(features[name][token], mask, all_reduce, self.leads)
        batch = iter(self._batch(features, all_reduce)) if momentum else iter(())
        standardizers: dict[str, dict[str, Standardizer]] = {}
        for name, token, normalizer in self.items():
            standardizer = normalizer.running() if normalizer.convention != "dune" or not momentum else None
            if momentum and normalizer.convention in BATCH:
                mean, std = next(batch)
                if normalizer.convention == "unic":
                    std = std + normalizer.eps
                else:
                    standardizer = Standardizer(mean, 1.0 / normalizer.denominator(std))
                normalizer.mean.lerp_(mean, momentum)
                normalizer.std.lerp_(std, momentum)
            standardizers.setdefault(name, {})[token] = standardizer
        return standardizers

    def restart(self) -> None:
        """Running PHI-S begins anew, as it does at every stage of a training; the other conventions go on."""
        for _, _, normalizer in self.of_convention(RunningPhiS.convention):
            normalizer.restart()

    def rotated(self, features: Features) -> Features:
        """Raw features in the basis that the standardizers are for: PHI-S rotates, "stored_bf16"
        standardizes by itself, the others leave them alone."""
        if not self.of_convention(*PREPARED):
            return features
        return self._map(features, lambda normalizer, x: normalizer.rotate(x))

    def restored(self, standardized: Features) -> Features:
        """Standardized features, or what a student takes for them, in the teachers' own scale and basis."""
        return self._map(standardized, lambda normalizer, y: normalizer.restore(y))

    @torch.no_grad()
    def estimate(self, batches: Iterable[Features], all_reduce: AllReduce | None = None) -> None:
        """PHI-S: rotations, means and scales from raw features; replaces what there was.

        Ranks that are on different devices may find different eigenvectors of equal eigenvalues: share one rank's
        buffers afterwards.

        Args:
            batches: this rank's features, batch by batch; their union over ranks and batches counts, not its parts.
            all_reduce: sums a float64 tensor over ranks, 8 (C + 1)^2 bytes a token type and fewer; None on one rank.

        Raises:
            HadamardError: there is no rotation for a teacher's number of channels.
            ValueError: another convention, or a token type without any row.
        """
        rotated = self.of_convention("phi_s")
        if not rotated:
            raise ValueError("no token type has the convention 'phi_s', the one that estimates something beforehand")
        moments = [SecondMoments(len(normalizer.mean), normalizer.mean.device) for _, _, normalizer in rotated]
        for features in batches:
            for (name, token, _), sums in zip(rotated, moments, strict=True):
                sums.add(features[name][token])
        for (name, token, normalizer), sums in zip(rotated, moments, strict=True):
            if all_reduce is not None:
                all_reduce(sums.sums)
            if sums.sums[0] < 2:
                raise ValueError(f"PHI-S got no two rows of {name}'s {token} tokens: give it more batches")
            mean, covariance = sums.mean_and_covariance()
            rotation, scale = phi_s(covariance)
            normalizer.rotation.copy_(rotation)
            normalizer.mean.copy_(rotation @ mean)
            normalizer.std.copy_(scale)

    @torch.no_grad()
    def fix(self, moments: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]], *conventions: str) -> None:
        """Takes statistics for these conventions: teacher -> token type -> mean and deviation [C]."""
        for name, token, normalizer in self.of_convention(*conventions):
            for own, given in zip((normalizer.mean, normalizer.std), moments[name][token], strict=True):
                own.copy_(given)

    def _map(self, features: Features, function: Callable[[Normalizer, Tensor], Tensor]) -> Features:
        normalizers = {(name, token): normalizer for name, token, normalizer in self.items()}
        return {
            name: {token: function(normalizers[name, token], x) for token, x in tokens.items()}
            for name, tokens in features.items()
        }

    def _batch(self, features: Features, all_reduce: AllReduce | None) -> list[tuple[Tensor, Tensor]]:
        """Global mean and unbiased deviation, float32 [C], of the conventions that take them of a batch."""
        packed, moving = [], self.of_convention(*BATCH)
        for name, token, normalizer in moving:
            x = features[name][token]
            rows = x.numel() // x.shape[-1]
            count = torch.full((1,), rows, dtype=torch.float64, device=x.device)
            if rows:
                mean, m2 = (moment.double() for moment in moments(x))
                delta = mean - normalizer.mean.double()
                packed += [count, rows * delta, m2 + rows * delta.square()]
            else:
                packed += [count, count.new_zeros(2 * x.shape[-1])]
        if not moving:
            return []
        sums = torch.cat(packed)
        if all_reduce is not None:
            all_reduce(sums)
        statistics = []
        at = 0
        for _, _, normalizer in moving:
            channels = len(normalizer.mean)
            count, total, squares = sums[at : at + 1 + 2 * channels].split([1, channels, channels])
            at += 1 + 2 * channels
            delta = total / count.clamp_min(1)
            variance = (squares - count * delta.square()).clamp_min(0) / (count - 1).clamp_min(1)
            std = torch.where(count > 1, variance.sqrt().float(), normalizer.std)  # fewer than two rows: unchanged
            statistics.append(((normalizer.mean.double() + delta).float(), std))
        return statistics
