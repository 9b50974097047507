"""Reference cases of RADIO's losses: summaries, aligned maps, running PHI-S, Hadamard matrices, three teachers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.case import FORWARD, GRADIENT, Case, Check, compare, relative_error
from dune_fast.distill.alignment import RULES, Rule, View, align, image_losses, sums_of
from dune_fast.distill.phi_s import hadamard
from dune_fast.distill.summary import AngleDispersion, TangentSphere, summary_cosine
from dune_fast.distill.terms import ELEMENTS
from dune_fast.kernels.distill_loss import distill_loss

STATISTICS = 1e-6
REVISIONS: dict[tuple[str, bool], str] = {
    ("7.0.1", False): "smaller", ("4deb2f7", False): "teacher", ("4deb2f7", True): "partitioned",
}  # fmt: skip
"""(published revision, partitioned) -> the rule that does the same."""


def run_summary_cosine(case: Case) -> list[Check]:
    student = case["student"].clone().requires_grad_()
    return _scalar(case, summary_cosine(student, case["teacher"]).mean(), student)


def run_balanced(case: Case) -> list[Check]:
    student, weight = case["student"].clone().requires_grad_(), case.info["weight"]
    losses = distill_loss(student, case["teacher"], None, None, 1 - weight, weight, case.info["beta"])
    return _scalar(case, losses.total.mean(), student)


def run_angle(case: Case) -> list[Check]:
    loss = AngleDispersion(case["step0/student"].shape[1], case.info["max_samples"])
    state = {"num_samples": loss.count, "sum_direction": loss.direction, "sum_angle_sq": loss.squares}
    checks = []
    for step in range(case.info["steps"]):
        checks += _summary_step(case, loss, f"step{step}/")
        expected = {name: case[f"step{step}/{name}"] for name in state}
        checks += compare(state, expected, STATISTICS, f"step{step}/")
    return checks


def run_tangent_sphere(case: Case) -> list[Check]:
    batch, channels = case["step0/student"].shape
    loss = TangentSphere(channels, case.info["max_samples"], batch)
    checks = []
    for step in range(case.info["steps"]):
        checks += _summary_step(case, loss, f"step{step}/", 1e-4, 1e-3)
    ours = {"pole": loss.pole[None], "tangent_mean": loss.tangent_mean[None], "alpha": loss.alpha}
    return checks + compare(ours | {"num_samples": loss.count}, {n: case[n] for n in (*ours, "num_samples")}, 1e-4)


def _summary_step(
    case: Case, loss: nn.Module, under: str, forward: float = FORWARD, gradient: float = GRADIENT
) -> list[Check]:
    student, teacher = case[f"{under}student"].clone().requires_grad_(), case[f"{under}teacher"]
    loss.update(teacher, torch.arange(len(teacher)))
    return _scalar(case, loss(student, teacher).mean(), student, under, forward, gradient)


def _scalar(
    case: Case, loss: Tensor, student: Tensor, under: str = "", forward: float = FORWARD, gradient: float = GRADIENT
) -> list[Check]:
    loss.backward()
    return [
        Check(f"{under}loss", relative_error(loss.detach(), case[f"{under}loss"]), forward),
        Check(f"{under}grad", relative_error(student.grad, case[f"{under}grad"]), gradient),
    ]


def run_spatial(case: Case) -> list[Check]:
    rule = RULES[REVISIONS[case.info["version"], case.info.get("partitioned", False)]]
    student = case["student"].clone().requires_grad_()
    masks = [case[name] if name in case else None for name in ("transform", "student_valid", "teacher_valid")]
    aligned = align(student, case["teacher"], rule, View(*masks))
    loss = spatial_loss(case.info["loss"], aligned.student, aligned.teacher, aligned.weight, rule)
    checks = _scalar(case, loss, student)
    ours = {"aligned_student": _tokens(aligned.student).detach(), "aligned_teacher": _tokens(aligned.teacher)}
    if aligned.weight is not None:
        ours["weight"] = aligned.weight
    expected = {name: case[name] for name in (*ours, "weight") if name in case}
    return checks + compare({n: x.reshape(expected[n].shape) for n, x in ours.items() if n in expected}, expected)


def spatial_loss(name: str, student: Tensor, teacher: Tensor, weight: Tensor | None, rule: Rule) -> Tensor:
    """A case's loss of aligned maps [B, C, h, w], a scalar."""
    s, t = _tokens(student), _tokens(teacher)
    if name == "balanced":
        rows = distill_loss(s.flatten(0, 1), t.flatten(0, 1), None, None, 0.9, 0.1, 2.0).total
        positions = rows.view(s.shape[:2])
    else:
        positions = ELEMENTS[name](s - t).mean(-1)
    if weight is None:
        return positions.mean()
    return image_losses(positions, weight.flatten(1), rule, sums_of(weight, rule)).mean()


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def run_hadamard(case: Case) -> list[Check]:
    return compare({f"{n}": hadamard(n) for n in case.info["orders"]}, case.under("H"), STATISTICS, "H/")


LOSS_RUNNERS: dict[str, Callable[[Case], list[Check]]] = {
    "radio_summary_cosine_loss": run_summary_cosine,
    "radio_balanced_loss": run_balanced,
    "radio_angle_loss": run_angle,
    "radio_tangent_sphere_loss": run_tangent_sphere,
    "radio_spatial_loss": run_spatial,
    "hadamard": run_hadamard,
}
"""Kind of a case -> what recomputes it."""
