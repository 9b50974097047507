"""Runs reference cases through the project's own code; shared by `python -m bench.parity` and the tests.

A case is a safetensors file whose metadata entry `case` says what was computed; each runner returns the errors of what
it recomputed. Tolerances: relative Frobenius error 1e-5 forward, 1e-4 gradients, in float32 on a CPU.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dune_fast.distill.objective import ObjectiveConfig, TermWeights, coefficients, combine, ownership, teacher_losses
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.distill.step import DistillationStep
from dune_fast.engine.deepspeed_engine import Engine, init_distributed, sum_over_ranks
from dune_fast.engine.optimizer import OptimizerConfig
from dune_fast.engine.schedules import ema_momenta, learning_rates
from dune_fast.nn.projectors import LadderProjector, ProjectorConfig, TransformerProjector
from dune_fast.nn.student import Student
from dune_fast.nn.vit import ViTConfig, VisionTransformer
from dune_fast.released import encoder_keys, load_released
from kernels.distill_loss import standardize
from kernels.rope2d import rope2d_angles, rotate
from teachers.config import TeacherConfig
from teachers.ensemble import TeacherEnsemble

FORWARD, GRADIENT = 1e-5, 1e-4

GENERIC = {"in19k", "in1k", "gldv2", "mapillarystreet"}
HUMAN = {"bedlam", "agora", "cuffs", "ubody"}
OWN_GROUP = {"dino2reg": "generic", "mast3r": "3d", "multihmr": "human"}
"""Prefix of a teacher's name -> group of its own datasets."""
SHARING = {"none": "full", "lowest_loss": "full", "own_data": "none", "own+generic_data": "generic"}
"""Published name of the dropping method -> `objective.sharing`."""


@dataclass
class Check:
    """One recomputed quantity."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


class Case:
    """A file of tensors, named by paths, and what was run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "pt") as handle:
            self.info: dict[str, Any] = json.loads(handle.metadata()["case"])
            self.tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118

    @property
    def kind(self) -> str:
        return self.info["kind"]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below a path, without it."""
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + "/")}


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference; the plain norm where the reference is zero."""
    if ours.shape != reference.shape:
        return float("inf")
    difference = torch.linalg.vector_norm(ours.double() - reference.double())
    scale = torch.linalg.vector_norm(reference.double())
    return float(difference / scale if scale > 0 else difference)


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
    encoder.load_state_dict(encoder_keys(case.under("state")))
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


def group_of(dataset: str) -> str:
    """Group of a dataset of the published list."""
    return "generic" if dataset in GENERIC else "human" if dataset in HUMAN else "3d"


def own_groups(teachers: list[str]) -> dict[str, list[str]]:
    """teacher -> groups of its own datasets, by the published names."""
    return {name: [group for prefix, group in OWN_GROUP.items() if name.startswith(prefix)] for name in teachers}


def objective_of(info: dict[str, Any]) -> ObjectiveConfig:
    """The objective that a loss or train case was run with."""
    weights = [TermWeights(info.get("lam_cos", 0.5), info.get("lam_sl1", 0.5)) for _ in range(2)]
    probability = info["p"] if info["method"] == "lowest_loss" else 0.0
    return ObjectiveConfig(*weights, beta=info.get("beta", 1.0), sharing=SHARING[info["method"]], drop_probability=probability)


def batch_groups(info: dict[str, Any], cfg: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """(ownership table [T, G], group of each image [B]) of a loss or train case."""
    groups = [group_of(name) for name in info["datasets"]]
    known = sorted({"generic", "3d", "human"})
    own = ownership(own_groups(list(info["teachers"])), known, cfg, torch.device("cpu"))
    return own, torch.tensor([known.index(group) for group in groups])


def run_loss(case: Case) -> list[Check]:
    info = case.info
    cfg = objective_of(info)
    own, groups = batch_groups(info, cfg)
    student = {n: {t: case[f"student/{n}/{t}"].clone().requires_grad_() for t in ts} for n, ts in info["teachers"].items()}
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
        Check(f"metrics/{key}", relative_error(ours[key], value), FORWARD) for key, value in case.under("metrics").items()
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


def train_case_student(case: Case) -> tuple[Student, TeacherStatistics]:
    """Student and statistics of a train case, with its initial weights."""
    cfg = case.info["student"]
    encoder = ViTConfig(
        image_size=cfg["image_size"], patch_size=cfg["patch_size"], embed_dim=cfg["embed_dim"], depth=cfg["depth"],
        num_heads=cfg["num_heads"], num_registers=cfg["num_register_tokens"],
    )  # fmt: skip
    widths = {name: (t["num_features"], t["token_types"]) for name, t in case.info["teachers"].items()}
    student = Student(encoder, ProjectorConfig(num_heads=cfg["projector_heads"]), widths)
    statistics = TeacherStatistics(widths)
    load_train_state(case, "init", student, statistics)
    return student, statistics


def load_train_state(case: Case, moment: str, student: Student, statistics: TeacherStatistics) -> None:
    """Loads the weights and statistics of `moment`, "init" or "final"."""
    state = encoder_keys(case.under(moment))
    norms = {k.removeprefix("teacher_norms."): v for k, v in state.items() if k.startswith("teacher_norms.")}
    student.load_state_dict({k: v for k, v in state.items() if not k.startswith("teacher_norms.")})
    if norms:
        statistics.load_state_dict(norms)


def train_case_teachers(case: Case, folder: Path) -> TeacherEnsemble:
    """The case's tiny teachers, through the registry: their weights are written to `folder`."""
    configs = {}
    for name, info in case.info["teachers"].items():
        weights = folder / f"{name}.safetensors"
        save_file({k: v.contiguous() for k, v in case.under(f"teacher/{name}").items()}, weights)
        configs[name] = TeacherConfig(
            family="conv_patchify", weights=str(weights), patch_size=info["patch_size"],
            num_features=info["num_features"], token_types=list(info["token_types"]),
        )  # fmt: skip
    return TeacherEnsemble(configs, case.info["student"]["patch_size"])


def train_trajectory(
    case: Case, zero_stage: int = 0, rank: int = 0, world_size: int = 1
) -> tuple[dict[str, Tensor], Student, TeacherStatistics]:
    """Trains as the case did, under DeepSpeed, each rank on its contiguous share of every batch.

    Returns:
        Per-step `loss`, `teacher_loss/<name>` (this rank's), `grad_norm_max`, `lr`, `ema_momentum`; the student; the
        statistics.
    """
    info = case.info
    init_distributed()
    student, statistics = train_case_student(case)
    objective = objective_of(info)
    own, groups = batch_groups(info, objective)
    batch = case["images"].shape[1]
    share = slice(rank * batch // world_size, (rank + 1) * batch // world_size)
    optimizer = OptimizerConfig(
        betas=list(info["betas"]), eps=info["eps"], weight_decay=info["weight_decay"],
        clip_per_parameter=info["clip_per_parameter_norm"],
    )  # fmt: skip
    engine = Engine(student, optimizer, batch // world_size, zero_stage)
    lr = learning_rates(info["steps"], info["base_lr"], info["min_lr"], info["warmup_fraction"])
    momenta = ema_momenta(info["steps"], info["ema_start"], info["ema_end"])
    with tempfile.TemporaryDirectory() as folder:
        teachers = train_case_teachers(case, Path(folder))
    all_reduce = sum_over_ranks if world_size > 1 else None
    step = DistillationStep(engine, teachers, statistics, own, objective, all_reduce=all_reduce)
    series: dict[str, list[Tensor]] = {}
    for i, images in enumerate(case["images"]):
        positions = torch.arange(i * batch, (i + 1) * batch)[share]
        loss, metrics = step(images[share], groups[share], positions, i, float(momenta[i]))
        engine.backward(loss)
        norms = engine.step(float(lr[i]))
        series.setdefault("loss", []).append(loss.detach())
        series.setdefault("grad_norm_max", []).append(norms.max())
        for name in info["teachers"]:
            series.setdefault(f"teacher_loss/{name}", []).append(metrics[f"loss/{name}"])
    history = {name: torch.stack(values) for name, values in series.items()}
    history |= {"lr": torch.from_numpy(lr), "ema_momentum": torch.from_numpy(momenta)}
    return history, student, statistics


def comparable_weights(student: Student) -> Tensor:
    """All trained weights in one vector, but the biases of attention's keys.

    A key bias adds the same q . b to every logit of a query, which softmax takes out again: its gradient is zero in
    exact arithmetic. Adam with eps = 1e-15 turns the rounding noise that is left into full steps, so that these values
    are a random walk of whichever machine ran them; `outputs` shows that nothing depends on them.
    """
    parts = []
    for name, parameter in student.named_parameters():
        value = parameter.detach()
        if name.endswith("attn.qkv.bias"):
            query, _, values = value.chunk(3)
            value = torch.cat([query, values])
        parts.append(value.flatten())
    return torch.cat(parts)


def run_train(case: Case, zero_stage: int = 0) -> list[Check]:
    """Losses within 1e-4 at every step; the weights' change within 1e-2; what the trained students compute within 1e-4."""
    history, student, statistics = train_trajectory(case, zero_stage)
    checks = []
    for name, ours in history.items():
        if name in case:
            reference = case[name].double()
            error = ((ours.double() - reference).abs() / reference.abs().clamp_min(1e-12)).max()
            forward = name in ("lr", "ema_momentum")
            checks.append(Check(name, float(error), FORWARD if forward else GRADIENT))
    initial, initial_statistics = train_case_student(case)
    final, final_statistics = train_case_student(case)
    load_train_state(case, "final", final, final_statistics)
    start, end, ours = (comparable_weights(model) for model in (initial, final, student))
    checks.append(Check("weights", relative_error(ours - start, end - start), 1e-2))
    with torch.no_grad():
        expected, found = final(case["images"][0]), student(case["images"][0])
    for name, tokens in expected.items():
        error = max(relative_error(found[name][token], tokens[token]) for token in tokens)
        checks.append(Check(f"outputs/{name}", error, GRADIENT))
    for (key, value), reference in zip(statistics.state_dict().items(), final_statistics.state_dict().values(), strict=True):
        checks.append(Check(f"statistics/{key}", relative_error(value, reference), FORWARD))
    return checks


RUNNERS: dict[str, Callable[[Case], list[Check]]] = {
    "encoder": run_encoder,
    "tp": run_tp,
    "lp": run_lp,
    "loss": run_loss,
    "teacher_norm": run_teacher_norm,
    "rope2d": run_rope2d,
    "checkpoint": run_checkpoint,
    "train": run_train,
}
NOT_YET = {"teacher"}
"""Kinds that are known and wait for their teachers."""
