"""Reference cases of MASt3R's training side: the losses, and the geometry of a training pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench.case import FORWARD, GRADIENT, Case, Check, relative_error
from dune_fast.heads.mast3r.matching_loss import MatchingLoss, MatchingLossConfig, at, average_precision
from dune_fast.heads.mast3r.point_loss import PointLoss, PointLossConfig

Views = dict[str, Tensor]


def point_loss(options: Mapping[str, Any], alpha: float, invariant: bool = False) -> PointLoss:
    """The loss that a case calls `regr3d`."""
    fields = {name: value for name, value in options.items() if name != "reduction"}
    return PointLoss(PointLossConfig(**fields, alpha=alpha, scale_shift_invariant=invariant))


def matching_loss(options: Mapping[str, Any]) -> MatchingLoss:
    """The loss that a case calls `matching` or `matching_loss`."""
    info = {**options["infonce"], **{name: value for name, value in options.items() if name != "infonce"}}
    names = ("mode", "temperature", "eps", "blocksize", "negatives_padding", "confmode")
    fields = {name: info[name] for name in names if name in info}
    return MatchingLoss(MatchingLossConfig(**fields, alpha=info.get("alpha", 0.0)))


def criterion(
    wanted: Mapping[str, Any], gt1: Views, gt2: Views, pred1: Views, pred2: Views, permutation: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar that a case's criterion names, and what the case calls its details."""
    views = (gt1, gt2, pred1, pred2)
    total, details = torch.zeros(()), {}
    for name, options in wanted.items():
        if name == "sum_of":
            for part in options:
                loss, found = criterion(part, *views, permutation)
                total, details = total + loss, details | found
        elif name == "conf_loss":
            loss, metrics = point_loss(options["regr3d"], options["alpha"])(*views)
            total = total + loss
            details |= {"conf_loss_1": metrics["point_conf_1"], "conf_loss2": metrics["point_conf_2"]}
            details |= {f"Regr3D_pts3d_{v}": metrics[f"point_{v}"] for v in (1, 2)}
        elif name in ("regr3d", "regr3d_scale_shift_inv"):
            loss, metrics = point_loss(options, 0.0, name.endswith("inv"))(*views)
            title = "Regr3D_ScaleShiftInv" if name.endswith("inv") else "Regr3D"
            total, details = total + loss, details | {f"{title}_pts3d_{v}": metrics[f"point_{v}"] for v in (1, 2)}
        elif name in ("matching", "matching_loss"):
            loss, metrics = matching_loss(options)(*views, permutation)
            total, details = total + options.get("weight", 1.0) * loss, details | {"MatchingLoss": metrics["matching"]}
            if "matching_conf" in metrics:
                details["matching_conf_loss"] = metrics["matching_conf"]
                for v, gt, pred in ((1, gt1, pred1), (2, gt2, pred2)):
                    details[f"Conf{v}_std"] = at(pred["desc_conf"], gt["corres"]).std()
        elif name == "matching_ap":
            total = total + average_precision(*views, options["negatives_padding"])
            details["MatchingLoss"] = total
        elif name != "note":
            raise ValueError(f"no such criterion: {name}")
    return total, details


def run_mast3r_loss(case: Case) -> list[Check]:
    gt1, gt2 = case.under("in/gt1"), case.under("in/gt2")
    pred1, pred2 = (
        {name: x.clone().requires_grad_() for name, x in case.under(f"in/pred{v}").items()} for v in (1, 2)
    )
    permutation = case.tensors.get("in/permutation")
    loss, details = criterion(case.info["criterion"], gt1, gt2, pred1, pred2, permutation)
    checks = [Check("out/loss", relative_error(loss.detach(), case["out/loss"]), FORWARD)]
    for name, value in case.info["details"].items():
        checks.append(Check(name, relative_error(details[name].detach(), torch.tensor(value)), FORWARD))
    if loss.requires_grad:
        loss.backward()
    for v, pred in ((1, pred1), (2, pred2)):
        for name, x in pred.items():
            key = f"grad/pred{v}/{name}"
            if key in case:
                checks.append(Check(key, relative_error(x.grad, case[key]), GRADIENT))
            elif x.grad is not None and x.grad.abs().max() > 0:
                checks.append(Check(key + " should have none", float("inf"), GRADIENT))
    return checks
