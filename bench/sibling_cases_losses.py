"""Reference cases of RADIO's losses: summaries, aligned maps, running PHI-S, Hadamard matrices, three teachers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.case import FORWARD, GRADIENT, Case, Check, compare, relative_error
from dune_fast.distill.alignment import RULES, Rule, View, align, image_losses, sums_of, token_mask
from dune_fast.distill.phi_s import hadamard
from dune_fast.distill.phi_s_running import RunningPhiS, fold
from dune_fast.distill.summary import AngleDispersion, TangentSphere, summary_cosine
from dune_fast.distill.terms import ELEMENTS
from dune_fast.kernels.distill_loss import distill_loss
from dune_fast.projectors.heads import HeadV2

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
    masks = [case.tensors.get(name) for name in ("transform", "student_valid", "teacher_valid")]
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


def run_phi_s(case: Case) -> list[Check]:
    """Eigenvectors are free in sign: targets and folds take the case's P, ours is checked for what defines it."""
    info, checks = case.info, []
    ours = RunningPhiS(info["dim"], info["update_period"])
    for step in range(info["steps"]):
        x = case[f"step{step}/in"]  # [B, C, h, w]
        ours.update(_tokens(x), case[f"step{step}/mask"].flatten(1) > 0)
        found = {
            "mean": ours.mean, "cov": ours.scatter / (ours.count - 1), "alpha": ours.alpha, "num_samples": ours.count,
            "fwd_count": ours.steps,
        }  # fmt: skip
        checks += compare(found, {name: case[f"step{step}/{name}"] for name in found}, STATISTICS, f"step{step}/")
        square = ours.alpha.square() * torch.eye(info["dim"], dtype=torch.float64)
        checks.append(Check(f"step{step}/P P^T", relative_error(ours.whiten @ ours.whiten.T, square), STATISTICS))
        own, given = ours.whiten.clone(), case[f"step{step}/whiten"]
        checks += compare({"inverse": ours.unwhiten}, {"inverse": torch.linalg.inv(own)}, STATISTICS, f"step{step}/")
        ours.whiten.copy_(given)
        out = ours.rotate(_tokens(x))
        found = {"out": out, "back": ours.restore(out)}
        found = {name: y.transpose(1, 2).unflatten(2, x.shape[2:]) for name, y in found.items()}
        checks += compare(found, {name: case[f"step{step}/{name}"] for name in found}, under=f"step{step}/")
        inverse = ours.inverse()
        ours.whiten.copy_(own)
    for name in ("linear", "linear_up"):
        weight, bias = fold(case[f"{name}/weight_in"], case[f"{name}/bias_in"], *inverse)
        found = {"weight_out": weight, "bias_out": bias}
        checks += compare(found, {n: case[f"{name}/{n}"] for n in found}, under=f"{name}/")
    return checks


def run_combo(case: Case) -> list[Check]:
    """Three teachers, three steps, in the order of revision 7.0.1: align, project, standardize both sides."""
    info, checks = case.info, []
    rule, names = RULES["smaller"], list(case.info["teachers"])
    statistics = {n: RunningPhiS(t["dim"], info["phi_update_period"]) for n, t in info["teachers"].items()}
    angles = {n: AngleDispersion(t["summary_dim"]) for n, t in info["teachers"].items()}
    heads = nn.ModuleDict({name: nn.ModuleDict(_heads(case, name)) for name in names})
    for step in range(info["steps"]):
        heads.zero_grad()
        spatial = case[f"step{step}/student/spatial"].clone().requires_grad_()
        total, summaries = spatial.new_zeros(()), {}
        for name in names:
            about, given = info["teachers"][name], case.under(f"step{step}/{name}")
            teacher, valid = given["teacher_spatial"], given.get("teacher_valid_pixels")
            tokens = None if valid is None else token_mask(valid, *teacher.shape[-2:]) > 0
            statistics[name].update(_tokens(teacher), None if tokens is None else tokens.flatten(1))
            aligned = align(spatial, teacher, rule, View(given.get("transform"), None, valid))
            projected = heads[name]["spatial"](_tokens(aligned.student))
            s, t = statistics[name].rotate(projected), statistics[name].rotate(_tokens(aligned.teacher))
            positions = ELEMENTS[about["spatial_loss"]](s - t).mean(-1)
            if aligned.weight is None:
                loss = positions.mean()
            else:
                sums = sums_of(aligned.weight, rule)
                loss = image_losses(positions, aligned.weight.flatten(1), rule, sums).mean()
            summary = given["student_summary"].clone().requires_grad_()
            target = given["teacher_summary"]
            predicted = heads[name]["summary"](summary)
            if about["summary_loss"] == "angle":
                angles[name].update(target, torch.arange(len(target)))
                of_summary = angles[name](predicted, target).mean()
            else:
                of_summary = summary_cosine(predicted, target).mean()
            loss = about["fd_weight"] * loss + about["summary_weight"] * of_summary
            checks.append(Check(f"step{step}/{name}", relative_error(loss.detach(), given["loss"]), FORWARD))
            total, summaries[name] = total + info["loss_lambda"][name] / len(names) * loss, summary
        checks.append(Check(f"step{step}/loss", relative_error(total.detach(), case[f"step{step}/loss"]), FORWARD))
        total.backward()
        found = {f"{name}/student_summary_grad": x.grad for name, x in summaries.items()}
        found["student/spatial_grad"] = spatial.grad
        checks += compare(found, {n: case[f"step{step}/{n}"] for n in found}, GRADIENT, f"step{step}/")
    expected = case.under("grad")
    gradients = {name.replace(".", "/", 2): x.grad for name, x in heads.named_parameters()}
    # SAM's summary weighs 0: zeros in the case, and here no gradient or zeros
    found = {n: torch.zeros_like(x) if gradients[n] is None else gradients[n] for n, x in expected.items()}
    return checks + compare(found, expected, GRADIENT, "grad/")


def _heads(case: Case, teacher: str) -> dict[str, HeadV2]:
    """A teacher's two heads, with the case's weights."""
    heads = {}
    for kind in ("spatial", "summary"):
        state = case.under(f"state/{teacher}/{kind}")
        (hidden, dim), channels = state["fc1.weight"].shape, len(state["final.2.bias"])
        heads[kind] = HeadV2(dim, hidden, channels, case.info["num_inner"])
        heads[kind].load_state_dict(state)
    return heads


LOSS_RUNNERS: dict[str, Callable[[Case], list[Check]]] = {
    "radio_summary_cosine_loss": run_summary_cosine,
    "radio_balanced_loss": run_balanced,
    "radio_angle_loss": run_angle,
    "radio_tangent_sphere_loss": run_tangent_sphere,
    "radio_spatial_loss": run_spatial,
    "hadamard": run_hadamard,
    "phi_s": run_phi_s,
    "radio_combo": run_combo,
}
"""Kind of a case -> what recomputes it."""
