"""Reference cases of SAK: adapters along the trunk, routers, distillation and task losses, decode head."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.case import FORWARD, GRADIENT, Case, Check, compare, relative_error
from dune_fast.distill.objective import ObjectiveConfig, teacher_losses
from dune_fast.distill.terms import TermWeights
from dune_fast.heads.sak.decode import DecodeHead
from dune_fast.heads.sak.losses import LOSSES
from dune_fast.heads.sak.router import TaskRouters
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.projectors.sak import AdapterChain, Level


class OneGrid(VisionTransformer):
    """An encoder whose position table is of the image's grid, which need not be square."""

    def positions(self, height: int, width: int) -> Tensor:
        return self.pos_embed


class Network(nn.Module):
    """Trunk, adapters and levels of each teacher, routers."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        info = case.info
        dim, levels = info["embed_dim"], info["out_indices"]
        cfg = ViTConfig(
            image_size=max(info["image"]), patch_size=info["patch_size"], embed_dim=dim, depth=info["depth"],
            num_heads=info["num_heads"], num_registers=0, layer_scale=None, final_norm=False,
        )  # fmt: skip
        self.vit = OneGrid(cfg)
        self.vit.pos_embed = nn.Parameter(torch.empty_like(case["state/vit.pos_embed"]))
        self.chains = nn.ModuleDict({n: AdapterChain(dim, levels, info["down_ratio"]) for n in info["teachers"]})
        self.levels = nn.ModuleDict(
            {f"{level}_{name}": Level(dim, width) for level in levels for name, width in info["teachers"].items()}
        )
        self.routers = TaskRouters(
            dim, levels, info["tasks"] or [], len(self.chains) + 1, info["router"] == "mor", info["noisy_gating"]
        )

    def forward(
        self, image: Tensor, noise: dict[str, Tensor] | None
    ) -> tuple[dict[str, dict[int, Tensor]], dict[str, dict[int, Tensor]]]:
        """(teacher -> level -> what stands against its features, task -> level -> mixed), [B, N, C]."""
        outputs = self.vit.block_outputs(image, range(-1, len(self.vit.blocks)))
        tokens = {block: x[:, self.vit.num_prefix_tokens :] for block, x in outputs.items()}
        chains = {name: chain(tokens) for name, chain in self.chains.items()}
        experts = {n: {i: self.levels[f"{i}_{n}"].norm(r) for i, r in found.items()} for n, found in chains.items()}
        aligned = {n: {i: self.levels[f"{i}_{n}"].aligned(f) for i, f in found.items()} for n, found in experts.items()}
        stacks = {level: [tokens[level], *(f[level] for f in experts.values())] for level in self.routers.levels}
        return aligned, self.routers(stacks, noise)


RENAMES = [
    (r"^tsap\.(\w+)\.", r"chains.\1.adapters."),
    (r"^out_norms\.(\w+)\.", r"levels.\1.norm."),
    (r"^ts_aligners\.(\w+)\.", r"levels.\1.aligner."),
    (r"^mor\.(\w+)\.router\.", r"routers.routers.\1."),
]
"""Published names -> ours."""


def ours_of(key: str) -> str:
    """Our name of a published tensor."""
    for pattern, name in RENAMES:
        key = re.sub(pattern, name, key)
    return key


def run_sak(case: Case) -> list[Check]:
    """`sak`: aligned tokens of every teacher and level, mixed ones of every task, gradients."""
    network = Network(case)
    network.load_state_dict({ours_of(key): value for key, value in case.under("state").items()})
    network.train(case.info["training"])
    noise = {name: x.flatten(2) for name, x in case.under("noise").items()}  # [B, E, H, W]
    aligned, mixed = network(case["image"], noise or None)
    rows = [size // case.info["patch_size"] for size in case.info["image"]]
    ours, gradients = {}, []
    for part, found in (("aligned", aligned), ("task", mixed)):
        for name, levels in found.items():
            for i, level in enumerate(case.info["out_indices"]):
                ours[f"{part}/{name}/{i}"] = levels[level].transpose(1, 2).unflatten(2, rows)
                gradients.append(case[f"{part}_grad/{name}/{i}"])
    torch.autograd.backward(list(ours.values()), gradients)
    expected = {name: x for name, x in case.tensors.items() if name.startswith(("aligned/", "task/"))}
    assert ours.keys() == expected.keys()
    checks = compare({name: x.detach() for name, x in ours.items()}, expected)
    parameters = dict(network.named_parameters())
    return checks + [
        Check(f"grad/{key}", relative_error(_gradient(parameters[ours_of(key)]), value), GRADIENT)
        for key, value in case.under("grad").items()
    ]


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def run_sak_decode_head(case: Case) -> list[Check]:
    """`sak_decode_head`, in evaluation."""
    maps = list(case.under("in").values())
    head = DecodeHead(maps[0].shape[1], case["out"].shape[1], len(maps))
    head.load_state_dict(case.under("state"))
    with torch.no_grad():
        out = head.eval()(maps, tuple(case.info["image"]))
    return [Check("out", relative_error(out, case["out"]), FORWARD)]


def run_sak_task_losses(case: Case) -> list[Check]:
    """`sak_task_losses`: values and gradients, without the weights, which are compared."""
    checks = []
    for task in sorted({name.split("/")[0] for name in case.tensors}):
        weight, loss = LOSSES[task]
        out = case[f"{task}/out"].clone().requires_grad_()
        value = loss(out, case[f"{task}/label"])
        value.backward()
        checks.append(Check(f"{task}/weight", float(abs(weight - case.info["weights"][task])), FORWARD))
        checks.append(Check(f"{task}/loss", relative_error(value.detach(), case[f"{task}/loss"]), FORWARD))
        checks.append(Check(f"{task}/grad", relative_error(out.grad, case[f"{task}/grad"]), GRADIENT))
    return checks


TERMS = {
    "cos+l1": {"map_cosine": 0.9, "smooth_l1": 0.1},
    "cos": {"map_cosine": 1.0, "smooth_l1": 0.0},
    "l2": {"mse": 1.0, "smooth_l1": 0.0},
}
"""`loss_type` of a case -> weights of the terms of patches."""


def run_sak_loss(case: Case) -> list[Check]:
    """`sak_loss`, by the objective of a run: every level of a teacher is one of its teachers."""
    cfg = ObjectiveConfig(patch=TermWeights(cosine=0.0, **TERMS[case.info["loss_type"]]), align="larger")
    tokens = {
        part: {name: {"patch": x.flatten(2).transpose(1, 2)} for name, x in case.under(part).items()}
        for part in ("student", "teacher")
    }
    for maps in tokens["student"].values():
        maps["patch"].requires_grad_()
    losses, _ = teacher_losses(tokens["student"], tokens["teacher"], None, cfg)
    terms = losses.mean(1)  # of each teacher and level
    terms.sum().backward()
    ours = {"loss": terms.detach().sum()}
    gradients = {}
    for (name, maps), term in zip(tokens["student"].items(), terms.detach(), strict=True):
        teacher, level = name.split("/")
        ours[f"term/{teacher}_level{int(level) + 1}"] = term
        gradients[name] = maps["patch"].grad.transpose(1, 2).unflatten(2, case[f"student/{name}"].shape[-2:])
    expected = {name: case[name] for name in ours}
    assert len(case.under("term")) == len(ours) - 1
    return compare(ours, expected) + compare(gradients, case.under("grad"), GRADIENT, "grad/")


SAK_RUNNERS: dict[str, Callable[[Case], list[Check]]] = {
    "sak": run_sak,
    "sak_loss": run_sak_loss,
    "sak_decode_head": run_sak_decode_head,
    "sak_task_losses": run_sak_task_losses,
}
"""Kind of a case -> what recomputes it."""
