"""Reference cases of the linear heads, through the code that `dune-fast evaluate --task segmentation | depth` runs."""

from __future__ import annotations

import torch

from bench.case import FORWARD, GRADIENT, Case, Check, relative_error
from dune_fast.evaluate.metrics import DEPTH_METRICS, ConfusionMatrix, depth_errors
from dune_fast.heads.linear.depth import DepthHead, depth_gradient_loss, depth_loss
from dune_fast.heads.linear.layers import resize
from dune_fast.heads.linear.segmentation import SegmentationHead, segmentation_loss


def run_linear_depth(case: Case) -> list[Check]:
    info = case.info
    layers = [
        (case[f"in/{i}/patch"].clone().requires_grad_(), case[f"in/{i}/cls"].clone().requires_grad_())
        for i in range(info["layers"])
    ]
    head = DepthHead(info["channels"], layers=info["layers"], max_depth=info["max_depth"])
    head.conv_depth.load_state_dict(case.under("state"))
    truth, small = case["in/gt"], head.from_layers(layers)
    depth, loss = resize(small, truth.shape[-2:]), depth_loss(small, truth)
    loss.backward()
    ours = {"out/depth_small": small, "out/depth": depth, "loss/sig": loss}
    ours["loss/sig_warm_up"] = depth_loss(small, truth, warm_up=True)
    maps = zip(depth[:, 0], truth[:, 0], strict=True)
    ours["loss/gradient_2d"] = torch.stack([0.5 * depth_gradient_loss(*pair) for pair in maps])
    errors = [depth_errors(*pair, info["max_depth"]) for pair in zip(depth, truth, strict=True)]
    ours |= {f"metric/{name}": column for name, column in zip(DEPTH_METRICS, torch.stack(errors, 1), strict=True)}
    ours |= {f"grad/{name}": p.grad for name, p in head.conv_depth.named_parameters()}
    for i, (patch, cls) in enumerate(layers):
        ours |= {f"grad/in/{i}/patch": patch.grad, f"grad/in/{i}/cls": cls.grad}
    return _checks(case, ours)


def run_linear_seg(case: Case) -> list[Check]:
    info = case.info
    head = SegmentationHead(info["channels"], info["classes"])
    head.load_state_dict(case.under("state"))
    patch, labels = case["in/patch"].clone().requires_grad_(), case["in/label"]
    with torch.no_grad():
        # with the statistics of the file, before the step updates them
        evaluated = head.eval().from_layers([(patch, None)])
    logits = head.train().from_layers([(patch, None)])
    loss = segmentation_loss(logits, labels)
    loss.backward()
    ours = {"out/train_logits": logits, "loss/mean_over_all_pixels": loss}
    ours["loss/mean_over_labelled_pixels"] = loss * labels.numel() / (labels != info["ignore"]).sum()
    ours |= {"out/running_mean": head.bn.running_mean, "out/running_var": head.bn.running_var}
    ours |= {f"grad/{name}": p.grad for name, p in head.named_parameters()} | {"grad/in/patch": patch.grad}
    ours |= {"out/eval_logits": evaluated, "out/eval_prediction": resize(evaluated, labels.shape[-2:]).argmax(1)}
    confusion = ConfusionMatrix(info["classes"])
    confusion.add(ours["out/eval_prediction"], labels)
    ours["metric/iou"] = confusion.iou()
    miou = relative_error(torch.tensor(confusion.result()["miou"]), torch.tensor(info["miou"]))
    return [*_checks(case, ours), Check("miou", miou, FORWARD)]


def _checks(case: Case, ours: dict[str, torch.Tensor]) -> list[Check]:
    """Of everything that the case holds but its inputs and weights."""
    wanted = {name: x for name, x in case.tensors.items() if not name.startswith(("in/", "state/"))}
    return [
        Check(name, relative_error(ours[name].detach(), x), GRADIENT if name.startswith("grad/") else FORWARD)
        for name, x in wanted.items()
    ]
