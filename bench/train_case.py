"""The `train` cases: the original training step, step by step, under DeepSpeed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.case import FORWARD, GRADIENT, Case, Check, batch_groups, compare, objective_of, relative_error
from bench.toy.conv_patchify import toy_teacher
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.distill.step import DistillationStep
from dune_fast.engine.deepspeed_engine import Engine, init_distributed, sum_over_ranks
from dune_fast.engine.optimizer import OptimizerConfig
from dune_fast.engine.schedules import ema_momenta, learning_rates
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import Student
from dune_fast.teachers.encoder_names import flat_blocks
from dune_fast.teachers.ensemble import TeacherEnsemble


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
    state = flat_blocks(case.under(moment))
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
        configs[name] = toy_teacher(
            str(weights), info["patch_size"], info["num_features"], info["token_types"],
            hidden_dim=len(case.under(f"teacher/{name}")["proj.bias"]),
        )  # fmt: skip
    return TeacherEnsemble(configs, case.info["student"]["patch_size"])


class Trajectory:
    """Trains as the case did, under DeepSpeed, each rank on its contiguous share of every batch.

    Args:
        case: of kind "train".
        zero_stage: 0 to 3.
        rank, world_size: of this process.
        options: further arguments of `Engine`.
    """

    def __init__(self, case: Case, zero_stage: int = 0, rank: int = 0, world_size: int = 1, **options: Any) -> None:
        info = case.info
        init_distributed()
        self.case = case
        student, self.statistics = train_case_student(case)
        objective = objective_of(info)
        own, self.groups = batch_groups(info, objective)
        self.batch = case["images"].shape[1]
        self.share = slice(rank * self.batch // world_size, (rank + 1) * self.batch // world_size)
        # the mean over ranks is that over images, also where the batch does not divide
        self.weight = (self.share.stop - self.share.start) * world_size / self.batch
        optimizer = OptimizerConfig(
            betas=list(info["betas"]), eps=info["eps"], weight_decay=info["weight_decay"],
            clip_per_parameter=info["clip_per_parameter_norm"],
        )  # fmt: skip
        self.engine = Engine(student, optimizer, self.batch // world_size, zero_stage, **options)
        self.lr = learning_rates(info["steps"], info["base_lr"], info["min_lr"], info["warmup_fraction"])
        self.momenta = ema_momenta(info["steps"], info["ema_start"], info["ema_end"])
        with tempfile.TemporaryDirectory() as folder:
            teachers = train_case_teachers(case, Path(folder))
        all_reduce = sum_over_ranks if world_size > 1 else None
        self.distill = DistillationStep(self.engine, teachers, self.statistics, own, objective, all_reduce=all_reduce)

    def step(self, i: int) -> dict[str, Tensor]:
        """Step i; returns this rank's `loss` and `teacher_loss/<name>`, and `grad_norm_max`."""
        positions = torch.arange(i * self.batch, (i + 1) * self.batch)[self.share]
        images, groups = self.case["images"][i][self.share], self.groups[self.share]
        loss, metrics, _ = self.distill(images, groups, positions, i, float(self.momenta[i]))
        self.engine.backward(loss * self.weight)
        norms = self.engine.step(float(self.lr[i]), loss)
        losses = {f"teacher_loss/{name}": metrics[f"loss/{name}"] for name in self.case.info["teachers"]}
        return {"loss": loss.detach(), "grad_norm_max": norms.max(), **losses}

    def run(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Steps start .. stop (the end); returns what `step` does, per step, and `lr` and `ema_momentum` of all."""
        steps = [self.step(i) for i in range(start, stop or len(self.case["images"]))]
        history = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
        return history | {"lr": torch.from_numpy(self.lr), "ema_momentum": torch.from_numpy(self.momenta)}

    def student(self) -> Student:
        """A copy of the student, whole under every stage."""
        copy, _ = train_case_student(self.case)
        with self.engine.whole_weights() as module:
            copy.load_state_dict(module.state_dict())
        return copy


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
    """Losses within 1e-4 at every step, the weights' change within 1e-2, the trained students' outputs within 1e-4."""
    trajectory = Trajectory(case, zero_stage)
    history, student, statistics = trajectory.run(), trajectory.student(), trajectory.statistics
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
    return checks + compare(statistics.state_dict(), final_statistics.state_dict(), under="statistics/")
