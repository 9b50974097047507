"""Reference cases of RADIO's heads."""

from __future__ import annotations

from bench.case import FORWARD, GRADIENT, Case, Check, compare, relative_error
from dune_fast.projectors.heads import AttentionHead, HeadV1, HeadV2


def run_radio_head(case: Case) -> list[Check]:
    """One head, forward and backward."""
    info, state, x = case.info, case.under("state"), case["in"].clone().requires_grad_()
    inner, upsample = info["num_inner"], info.get("upsample_factor", 1)
    prefix = "mlp." if info["version"] == "attn" else ""
    hidden, dim = state[f"{prefix}fc1.weight"].shape
    channels = case["out"].shape[-1]
    if info["version"] == "v1":
        head = HeadV1(dim, hidden, channels, inner)
    else:
        mlp = HeadV2(dim, hidden, channels, inner, info.get("pre_norm", False), upsample=upsample)
        head = AttentionHead(dim, mlp, info["layer_norm_eps"]) if info["version"] == "attn" else mlp
    head.load_state_dict(state)
    out = head(x, tuple(info.get("grid", ())) or None)
    out.backward(case["out_grad"])
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    return [
        Check("out", relative_error(out.detach(), case["out"]), FORWARD),
        Check("grad_in", relative_error(x.grad, case["grad_in"]), GRADIENT),
        *compare(gradients, case.under("grad"), GRADIENT, "grad/"),
    ]


RUNNERS = {"radio_head": run_radio_head}
