"""Runs reference cases through the project's own code; shared by `python -m bench.parity` and the tests.

Each runner takes a case and returns the errors of everything that it recomputed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.case import FORWARD, GRADIENT, Case, Check, batch_groups, objective_of, relative_error
from bench.linear_case import run_linear_depth, run_linear_seg
from bench.teacher_case import run_teacher
from bench.train_case import run_train
from dune_fast.distill.objective import coefficients, combine, teacher_losses
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.kernels.distill_loss import standardize
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.kernels.rope2d import rope2d_angles, rotate
from dune_fast.released import load_released
from dune_fast.student import LadderProjector, TransformerProjector
from dune_fast.teachers.dune import flat_blocks


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
    checks = []
    with torch.no_grad():
        for size in info["sizes"]:
            image = case[f"{size}/image"]
            ours = encoder(image)
            cls, _, patches = encoder.split(ours["x_prenorm"])
            ours |= {"unnormed_cls": cls, "unnormed_patch": patches}
            count = sum(f"{size}/intermediate{i}" in case for i in range(info["depth"]))
            layers = encoder.get_intermediate_layers(image, count) if count else ()
            ours |= {f"intermediate{i}": layer for i, layer in enumerate(layers)}
            for name, reference in case.under(size).items():
                if name != "image":
                    checks.append(Check(f"{size}/{name}", relative_error(ours[name], reference), FORWARD))
    return checks


def _gradient_checks(module: torch.nn.Module, case: Case, rename: Callable[[str], str] = str) -> list[Check]:
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    expected = {rename(name): gradient for name, gradient in case.under("grad").items()}
    assert gradients.keys() == expected.keys()
    return [Check(f"grad/{k}", relative_error(gradients[k], v), GRADIENT) for k, v in expected.items()]


def run_tp(case: Case) -> list[Check]:
    info = case.info
    projector = TransformerProjector(
        info["input_dim"], info["output_dim"], info["num_heads"], info["num_blocks"], info["mlp_ratio"]
    )
    projector.load_state_dict(case.under("state"))
    x = case["in"].clone().requires_grad_()
    out = projector(x)
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
    outputs = {name: head(inputs) for name, head in ladder.items()}
    pairs = [(outputs[n][t], case[f"grad_out/{n}/{t}"]) for n in outputs for t in ("cls", "patch")]
    torch.autograd.backward(*zip(*pairs, strict=True))
    checks = [
        Check(f"out/{n}/{t}", relative_error(outputs[n][t].detach(), case[f"out/{n}/{t}"]), FORWARD)
        for n in outputs
        for t in ("cls", "patch")
    ]
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
    return [
        Check(f"metrics/{key}", relative_error(ours[key], value), FORWARD)
        for key, value in case.under("metrics").items()
    ]


def run_teacher_norm(case: Case) -> list[Check]:
    info = case.info
    tokens = sorted(case.under("step0/in"))
    channels = case[f"step0/in/{tokens[0]}"].shape[-1]
    statistics = TeacherStatistics({"teacher": (channels, tokens)}, info["convention"], info["eps"])
    normalizers = {token: normalizer for _, token, normalizer in statistics.items()}
    checks = []
    for step, momentum in enumerate(info["momenta"]):
        x = case.under(f"step{step}/in")
        standardizers = statistics.update({"teacher": x}, momentum)["teacher"]
        for token in tokens:
            ours = standardize(x[token], *standardizers[token])
            checks.append(Check(f"step{step}/{token}", relative_error(ours, case[f"step{step}/out/{token}"]), FORWARD))
            for name in ("mean", "std"):
                error = relative_error(getattr(normalizers[token], name), case[f"step{step}/running/{token}/{name}"])
                checks.append(Check(f"step{step}/running/{token}/{name}", error, FORWARD))
    running = statistics.running()["teacher"]
    for token, x in case.under("eval/in").items():
        error = relative_error(standardize(x, *running[token]), case[f"eval/out/{token}"])
        checks.append(Check(f"eval/{token}", error, FORWARD))
    return checks


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
            ours[f"projector/{name}"] = projector(tokens[last])
    # the published dense output is that of the first teacher's projector, as a map
    dense = ours[f"projector/{case.info['teachers'][0]}"]
    height, width = student.encoder.grid(image)
    ours["dense/cls"] = dense[:, 0]
    ours["dense/patch"] = dense[:, 1:].transpose(1, 2).unflatten(2, (height, width))
    return [
        Check(name, relative_error(ours[name], reference), FORWARD)
        for name, reference in case.tensors.items()
        if name != "image"
    ]


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
}
