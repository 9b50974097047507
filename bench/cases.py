"""Runs reference cases through the project's own code; shared by `python -m bench.parity` and the tests.

Each runner takes a case and returns the errors of everything that it recomputed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import (
    head_cases_mast3r,
    head_cases_mast3r_training,
    head_cases_metrics,
    head_cases_multihmr,
    sibling_cases_heads,
    sibling_cases_radio,
)
from bench.case import FORWARD, GRADIENT, Case, Check, batch_groups, compare, objective_of, relative_error
from bench.linear_case import run_linear_depth, run_linear_seg
from bench.sibling_cases_losses import LOSS_RUNNERS
from bench.sibling_cases_sak import SAK_RUNNERS
from bench.sibling_cases_teachers import TEACHER_RUNNERS
from bench.sibling_cases_theia import THEIA_RUNNERS
from bench.sibling_cases_views import VIEW_RUNNERS
from bench.teacher_case import run_teacher
from bench.train_case import run_train
from dune_fast.distill.objective import coefficients, combine, teacher_losses
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.kernels.distill_loss import standardize
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.kernels.rope2d import rope2d_angles, rotate
from dune_fast.projectors.ladder import LadderProjector
from dune_fast.projectors.transformer import TransformerProjector
from dune_fast.released import load_released
from dune_fast.teachers.encoder_names import flat_blocks


def run_encoder(case: Case) -> list[Check]:
    info = case.info
    encoder = VisionTransformer(
        ViTConfig(
            image_size=info["image_size"], patch_size=info["patch_size"], embed_dim=info["embed_dim"],
            depth=info["depth"], num_heads=info["num_heads"], num_registers=info["num_register_tokens"],
            layer_scale=info["layerscale"], interpolate_offset=info["interpolate_offset"],
            interpolate_antialias=info["interpolate_antialias"],
        )
    )  # fmt: skip
    encoder.load_state_dict(flat_blocks(case.under("state")))
    checks: list[Check] = []
    for size in info["sizes"]:
        expected = case.under(size)
        image = expected.pop("image")
        with torch.no_grad():
            ours = encoder(image)
            cls, _, patches = encoder.split(ours["x_prenorm"])
            ours |= {"unnormed_cls": cls, "unnormed_patch": patches}
            count = sum(f"intermediate{i}" in expected for i in range(info["depth"]))
            layers = encoder.get_intermediate_layers(image, count) if count else ()
        ours |= {f"intermediate{i}": layer for i, layer in enumerate(layers)}
        checks += compare(ours, expected, under=f"{size}/")
    return checks


def _gradient_checks(module: torch.nn.Module, case: Case, rename: Callable[[str], str] = str) -> list[Check]:
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    expected = {rename(name): gradient for name, gradient in case.under("grad").items()}
    assert gradients.keys() == expected.keys()
    return compare(gradients, expected, GRADIENT, "grad/")


def run_tp(case: Case) -> list[Check]:
    info = case.info
    projector = TransformerProjector(
        info["input_dim"], info["output_dim"], info["num_heads"], info["num_blocks"], info["mlp_ratio"]
    )
    projector.load_state_dict(case.under("state"))
    x = case["in"].clone().requires_grad_()
    out = projector.project(x)
    out.backward(case["grad_out"])
    return [
        Check("out", relative_error(out.detach(), case["out"]), FORWARD),
        Check("grad_in", relative_error(x.grad, case["grad_in"]), GRADIENT),
        *_gradient_checks(projector, case),
    ]


def run_lp(case: Case) -> list[Check]:
    info = case.info
    blocks = info["which_blocks"] if info["which_blocks"] is not None else list(range(info["num_blocks"]))
    last = info["num_blocks"] - 1
    hidden = [info["last_hidden_dim"] if i == last else info["hidden_dim"] for i in blocks]
    ladder = torch.nn.ModuleDict(
        {
            name: LadderProjector(info["input_dim"], dim, blocks, hidden, info["prenorm"], info["midnorm"])
            for name, dim in info["head_dims"].items()
        }
    )
    ladder.load_state_dict({k.removeprefix("heads."): v for k, v in case.under("state").items()})
    inputs = {}  # block -> [cls, patches]; the case counts the embedding before the first block as 0
    for i in blocks:
        cls, patch = case[f"tokens_cls/{i + 1}"], case[f"tokens_patch/{i + 1}"]
        inputs[i] = torch.cat([cls[:, None], patch], 1).requires_grad_()
    outputs = {f"{n}/{t}": x for n, head in ladder.items() for t, x in head(inputs).items() if t in ("cls", "patch")}
    torch.autograd.backward(list(outputs.values()), [case[f"grad_out/{name}"] for name in outputs])
    checks = compare({n: x.detach() for n, x in outputs.items()}, {n: case[f"out/{n}"] for n in outputs}, under="out/")
    for token, part in (("cls", slice(0, 1)), ("patch", slice(1, None))):
        for i, reference in case.under(f"grad_{token}").items():
            ours = inputs[int(i) - 1].grad[:, part].reshape(reference.shape)
            checks.append(Check(f"grad_{token}/{i}", relative_error(ours, reference), GRADIENT))
    return checks + _gradient_checks(ladder, case, lambda key: key.removeprefix("heads."))


def run_loss(case: Case) -> list[Check]:
    info = case.info
    cfg = objective_of(info)
    own, groups = batch_groups(info, cfg)
    student = {
        n: {t: case[f"student/{n}/{t}"].clone().requires_grad_() for t in ts} for n, ts in info["teachers"].items()
    }
    teacher = {n: {t: case[f"teacher/{n}/{t}"] for t in ts} for n, ts in info["teachers"].items()}
    losses, parts = teacher_losses(student, teacher, None, cfg)
    c = coefficients(losses, own, groups, torch.arange(len(groups)), 0, 0, cfg)
    loss = combine(losses, c)
    loss.backward()
    checks = [Check("loss", relative_error(loss.detach(), case["loss"]), FORWARD)]
    names = list(info["teachers"])
    for i, name in enumerate(names):
        checks.append(Check(name, relative_error(losses[i].detach(), case[f"per_teacher/{name}"]), FORWARD))
    checks += _metric_checks(case, names, losses.detach(), loss.detach(), c, parts)
    for name, tokens in student.items():
        for token, x in tokens.items():
            reference = case[f"grad/{name}/{token}"]
            finite = bool(torch.isfinite(x.grad).all())
            tolerance = GRADIENT if reference.dtype == torch.float32 else 1e-2
            error = relative_error(x.grad, reference) if finite else float("inf")
            checks.append(Check(f"grad/{name}/{token}", error, tolerance))
    return checks


def _metric_checks(
    case: Case, names: list[str], losses: Tensor, loss: Tensor, c: Tensor, parts: dict[str, Tensor]
) -> list[Check]:
    ours = {"loss": loss}
    for i, name in enumerate(names):
        ours[f"loss/dist_{name}"] = losses[i].mean()
        ours[f"t_coeff_{name}"] = c[i].sum() / c.sum()
    term = {"cosine": "_cos", "smooth_l1": "_sl1", "total": ""}
    for key, value in parts.items():
        name, token, part = key.rsplit("/", 2)
        ours[f"loss/dist_{token}{term[part]}_{name}"] = value.mean()
    return compare(ours, case.under("metrics"), under="metrics/")


def run_teacher_norm(case: Case) -> list[Check]:
    info = case.info
    tokens = sorted(case.under("step0/in"))
    channels = case[f"step0/in/{tokens[0]}"].shape[-1]
    statistics = TeacherStatistics({"teacher": (channels, tokens)}, info["convention"], info["eps"])
    normalizers = {token: normalizer for _, token, normalizer in statistics.items()}
    checks: list[Check] = []
    for step, momentum in enumerate(info["momenta"]):
        x = case.under(f"step{step}/in")
        standardizers = statistics.update({"teacher": x}, momentum)["teacher"]
        ours = {f"out/{token}": standardize(x[token], *standardizers[token]) for token in tokens}
        for token in tokens:
            ours |= {f"running/{token}/{name}": getattr(normalizers[token], name) for name in ("mean", "std")}
        checks += compare(ours, {name: case[f"step{step}/{name}"] for name in ours}, under=f"step{step}/")
    running = statistics.running()["teacher"]
    ours = {token: standardize(x, *running[token]) for token, x in case.under("eval/in").items()}
    return checks + compare(ours, {token: case[f"eval/out/{token}"] for token in ours}, under="eval/")


def run_rope2d(case: Case) -> list[Check]:
    x = case["in"].transpose(1, 2)  # [B, N, heads, head_dim]
    cos, sin = rope2d_angles(case["positions"], x.shape[-1], case.info["base"])
    out = rotate(x, cos, sin).transpose(1, 2)
    return [Check("out", relative_error(out, case["out"]), FORWARD)]


def run_checkpoint(case: Case) -> list[Check]:
    student, _ = load_released(case.path.parent / case.info["file"])
    image = case["image"]
    last = student.projectors.blocks[-1]
    with torch.no_grad():
        ours = student.encoder(image)
        tokens = student.tokens(image)
        ours["encoder_output"] = tokens[last]
        for name, projector in student.projectors.items():
            ours[f"projector/{name}"] = projector.project(tokens[last])
    # the published dense output is that of the first teacher's projector, as a map
    dense = ours[f"projector/{case.info['teachers'][0]}"]
    height, width = student.encoder.grid(image)
    ours["dense/cls"] = dense[:, 0]
    ours["dense/patch"] = dense[:, 1:].transpose(1, 2).unflatten(2, (height, width))
    return compare(ours, {name: value for name, value in case.tensors.items() if name != "image"})


CONTAINERS = {**head_cases_mast3r.CONTAINERS, **head_cases_multihmr.CONTAINERS}
"""`what` of a case of the kind `container` -> what recomputes it."""


def run_container(case: Case) -> list[Check]:
    """A file in the container of an official release of a head."""
    what = case.info["what"]
    if what not in CONTAINERS:
        raise ValueError(f"nothing here computes {what}")
    return CONTAINERS[what](case)


RUNNERS: dict[str, Callable[[Case], list[Check]]] = {
    "encoder": run_encoder,
    "tp": run_tp,
    "lp": run_lp,
    "loss": run_loss,
    "teacher_norm": run_teacher_norm,
    "rope2d": run_rope2d,
    "checkpoint": run_checkpoint,
    "teacher": run_teacher,
    "train": run_train,
    "linear_depth": run_linear_depth,
    "linear_seg": run_linear_seg,
    "container": run_container,
    **head_cases_mast3r.RUNNERS,
    **head_cases_mast3r_training.RUNNERS,
    **head_cases_metrics.RUNNERS,
    **head_cases_multihmr.RUNNERS,
    **SAK_RUNNERS,
    **TEACHER_RUNNERS,
    **THEIA_RUNNERS,
    **LOSS_RUNNERS,
    **VIEW_RUNNERS,
    **sibling_cases_radio.RUNNERS,
    **sibling_cases_heads.RUNNERS,
}
"""Kind of a case -> what recomputes it; a kind that is not here is "not built"."""
