"""Reference cases of Theia: translators, losses, statistics of features, students."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from bench.case import FORWARD, GRADIENT, Case, Check, compare, relative_error
from dune_fast.distill.objective import ObjectiveConfig, combine, teacher_losses
from dune_fast.distill.stored_statistics import FeatureMoments, bf16_standardized
from dune_fast.distill.terms import TermWeights
from dune_fast.projectors.theia import ConvHead, MLPHead, SharedAdapter, SharedDecoder
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.registry import recognize, vit_family
from dune_fast.teachers.weights import build_loaded


def run_translator(case: Case) -> list[Check]:
    """`theia_translator`: one module with the published names, so that weights and gradients need no other map."""
    info, kind = case.info, case.info["translator"]
    dim, source, _ = info["backbone_feature_size"]
    hidden = info.get("translator_hidden_size", dim)
    whole, heads = nn.Module(), {}
    if kind in ("conv", "mlp"):
        whole = SharedAdapter(dim, hidden)
    elif kind == "transformer":
        whole = SharedDecoder(dim, hidden, source, info["translator_n_layers"], info["translator_n_heads"])
        whole.target_model_emb = nn.ParameterDict()
    whole.translator_heads = nn.ModuleDict()
    patches = int(not info["backbone_no_cls"])
    for name, (channels, *sides) in info["target_feature_sizes"].items():
        key, linear = name.replace(".", "_"), kind == "lconv"
        if "_cls" in name:
            head = nn.Module()
            head.adapter = nn.Sequential(nn.Linear(dim, channels))
            heads[name] = lambda x, head=head: head.adapter(x[:, 0])
        elif kind == "transformer":
            whole.target_model_emb[key] = nn.Parameter(torch.zeros(1, 1, hidden))
            head, embedding = MLPHead(hidden, channels, source, sides[0], 2), whole.target_model_emb[key]
            heads[name] = lambda x, head=head, own=embedding: head(whole(x[:, patches:], own))
        elif linear:
            inner = int(dim * info.get("hidden_size_factor", 1.0))
            head = ConvHead(dim, inner, channels, source, sides[0])
            heads[name] = lambda x, head=head: head(x[:, patches:])
        else:
            head = (
                MLPHead(hidden, channels, source, sides[0]) if kind == "mlp"
                else ConvHead(hidden, 2 * hidden, channels, source, sides[0], linear=False)
            )  # fmt: skip
            heads[name] = lambda x, head=head: head(whole(x[:, patches:]))
        whole.translator_heads[key] = head
    whole.load_state_dict(case.under("state"))
    whole.eval()
    tokens = case["tokens"].clone().requires_grad_()
    out = {name: head(tokens) for name, head in heads.items()}
    torch.autograd.backward(list(out.values()), [case[f"out_grad/{name}"] for name in out])
    checks = compare({n: x.detach() for n, x in out.items()}, {n: case[f"out/{n}"] for n in out}, under="out/")
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in whole.named_parameters()}
    checks.append(Check("grad_tokens", relative_error(tokens.grad, case["grad_tokens"]), GRADIENT))
    return checks + compare(gradients, case.under("grad"), GRADIENT, "grad/")


def run_student(case: Case) -> list[Check]:
    """`theia_student`: the state under the names of Theia's containers, in a file, as any is read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({f"backbone.model.{key}": value.contiguous() for key, value in case.under("state").items()}, path)
        name = recognize([f"backbone.model.{key}" for key in case.under("state")])
        assert name == "theia", name
        family = vit_family(name)
        cfg, state = family.read_file(path, TeacherConfig(num_heads=case.info["num_attention_heads"]))
        encoder = build_loaded(lambda: family.network(cfg), state, path, lambda key: False)
    with torch.no_grad():
        tokens = encoder.norm(encoder.forward_tokens(case["image"]))
    cls, registers, patches = encoder.split(tokens)
    ours = torch.cat([*([] if cls is None else [cls[:, None]]), patches, registers], dim=1)  # in the release's order
    return [Check("out", relative_error(ours, case["out"]), FORWARD)]


def run_loss(case: Case) -> list[Check]:
    """`theia_loss`: by the objective of a run, 0.9 of the maps' cosine and 0.1 of smooth L1, or the squared error."""
    names, weight = case.info["teachers"], case.info["target_weight"]
    student = {name: {"patch": case[f"student/{name}"].clone().requires_grad_()} for name in names}
    teacher = {name: {"patch": case[f"teacher/{name}"]} for name in names}
    checks = []
    for main_loss in ("cos_l1", "mse"):  # both metrics come out of every case
        share = 1.0 if weight is None else weight * len(names)
        of = {"mse": TermWeights(0.0, 0.0, mse=share), "cos_l1": TermWeights(0.0, 0.1 * share, map_cosine=0.9)}
        losses, parts = teacher_losses(student, teacher, None, ObjectiveConfig(patch=of[main_loss]))
        terms = {"mse": "mse"} if main_loss == "mse" else {"cos": "map_cosine", "l1": "smooth_l1"}
        for theirs, ours in terms.items():
            found = torch.stack([parts[f"{name}/patch/{ours}"].mean() for name in names])
            metric = found.mean() if theirs == "cos" else share * found.mean()
            checks.append(Check(f"metrics/{theirs}", relative_error(metric, case[f"metrics/{theirs}"]), FORWARD))
            for name, value in zip(names, found, strict=True):
                key = f"per_teacher/{name}/{theirs}"
                checks.append(Check(key, relative_error(value, case[key]), FORWARD))
        if main_loss == case.info["main_loss"]:
            loss = combine(losses, torch.ones_like(losses))
            checks.append(Check("loss", relative_error(loss.detach(), case["loss"]), FORWARD))
            loss.backward()
    gradients = {name: student[name]["patch"].grad for name in names}
    return checks + compare(gradients, {name: case[f"grad/{name}"] for name in names}, GRADIENT, "grad/")


def run_feature_norm(case: Case) -> list[Check]:
    """`theia_feature_norm`, bit for bit."""
    ours = bf16_standardized(case["in"], case["mean"], case["std"])
    same = torch.equal(ours, case["out"]) and torch.equal(ours.bfloat16(), case["out_bf16"])
    return [Check("out", 0.0 if same else float("inf"), 0.0)]


def run_feature_stats(case: Case) -> list[Check]:
    """`theia_feature_stats`: mean and deviation over batches of several sizes."""
    sums = FeatureMoments()
    for i, _ in enumerate(case.info["batches"]):
        sums.add(case[f"batch{i}"])
    mean, std = sums.finish()
    return compare({"mean": mean, "std": std}, {name: case[name] for name in ("mean", "std")}, 1e-6)


THEIA_RUNNERS: dict[str, Callable[[Case], list[Check]]] = {
    "theia_translator": run_translator,
    "theia_student": run_student,
    "theia_loss": run_loss,
    "theia_feature_norm": run_feature_norm,
    "theia_feature_stats": run_feature_stats,
}
"""Kind of a case -> what recomputes it."""
