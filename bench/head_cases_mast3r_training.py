"""Reference cases of MASt3R's training side: the losses, and the geometry of a training pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.case import FORWARD, GRADIENT, Case, Check, relative_error
from dune_fast.heads.mast3r.correspondences import back_project, correspondences, nearest_pixels, sample
from dune_fast.heads.mast3r.crops import covering_size, nearest_resize, recentre, scaled_intrinsics
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


def run_pair_correspondences(case: Case) -> list[Check]:
    info = case.info
    views = [{name: x.numpy() for name, x in case.under(f"in/view{v}").items()} for v in (1, 2)]
    depths, cameras, poses = ([v[n] for v in views] for n in ("depthmap", "camera_intrinsics", "camera_pose"))
    sizes = tuple(depth.shape for depth in depths)
    points = [back_project(*given) for given in zip(depths, cameras, poses, strict=True)]
    ours: dict[str, Any] = {}
    for v in (1, 2):
        ours[f"view{v}/pts3d"], ours[f"view{v}/valid_mask"] = points[v - 1], depths[v - 1] > 0
    found = correspondences(points[0], points[1], tuple(cameras), tuple(poses))
    small, scale = covering_size(depths[0].shape[::-1], tuple(info["rescale_target"]))
    ours |= {"rescale/size": np.array(small), "rescale/depthmap": nearest_resize(depths[0], small)}
    ours |= {"rescale/K": scaled_intrinsics(cameras[0], scale), "rescale/bbox": np.array([0, 0, *small])}
    turned = recentre(cameras[0].astype(np.float64), case["in/crop"].numpy(), tuple(info["crop_target"]))
    ours |= {"crop/H": turned.homography, "crop/K": turned.intrinsics, "crop/R": turned.rotation}
    expected = case.under("out")
    checks = [Check(name, relative_error(torch.as_tensor(x), expected[name]), FORWARD) for name, x in ours.items()]
    # integers: up to 0.1 % of the pixels may lie on a rounding boundary
    for v, name in ((1, "corres_1_to_2"), (2, "corres_2_to_1")):
        other = 2 - v
        index = nearest_pixels(points[v - 1], cameras[other], poses[other], sizes[other])
        checks.append(Check(name, float((index != expected[name].numpy()).mean()), 1e-3))
    flat = [xy[:, 1].numpy() * w + xy[:, 0].numpy() for xy, (_, w) in zip((expected["xy1"], expected["xy2"]), sizes,
                                                                           strict=True)]  # fmt: skip
    wanted = set(zip(*(x.tolist() for x in flat), strict=True))
    differing = len(wanted ^ set(zip(*(x.tolist() for x in found), strict=True)))
    checks.append(Check("xy", differing / len(wanted), 1e-3))
    drawn = sample(found, sizes, info["n_corres"], info["nneg"], np.random.default_rng(0))
    for title, (xy1, xy2, true) in (("ours", drawn), ("sampled", [expected[f"sampled/{n}"].numpy() for n in
                                                                  ("xy1", "xy2", "valid")])):  # fmt: skip
        pairs = zip(*((xy[:, 1] * w + xy[:, 0]).tolist() for xy, (_, w) in zip((xy1, xy2), sizes, strict=True)),
                    strict=True)  # fmt: skip
        wrong = sum((pair in wanted) != bool(is_true) for pair, is_true in zip(pairs, true, strict=True))
        checks.append(Check(f"{title}/positives lie in xy", wrong, 0.5))
        checks.append(Check(f"{title}/number of positives", abs(int(true.sum()) - info["n_corres"] / 2), 0.5))
    return checks


RUNNERS = {"mast3r_loss": run_mast3r_loss, "pair_correspondences": run_pair_correspondences}
