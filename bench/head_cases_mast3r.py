"""Runners of the reference cases of MASt3R's head: networks, files, matches, poses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from bench.case import GRADIENT, Case, Check, compare, relative_error
from bench.head_cases_mast3r_training import criterion
from dune_fast.heads.mast3r.activations import CONFIDENCE_MODES, POINT_MODES, Modes, activate, read_mode
from dune_fast.heads.mast3r.decoder import Decoder
from dune_fast.heads.mast3r.descriptors import DescriptorMLP
from dune_fast.heads.mast3r.dpt import DPT
from dune_fast.heads.mast3r.head import Mast3rHead, ViewHead
from dune_fast.heads.mast3r.images import for_encoder
from dune_fast.heads.mast3r.matching import reciprocal, symmetric
from dune_fast.heads.mast3r.official import head_state, read, recognize
from dune_fast.heads.mast3r.pose import essential, pnp
from dune_fast.heads.mast3r.training import Outputs, both_orders_outputs
from dune_fast.heads.tokens import encode
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.teachers.containers import read_container
from dune_fast.teachers.encoder_names import flat_blocks

WHOLE, WHOLE_GRADIENT = 1e-4, 1e-3
"""Tolerances from images to outputs: a decoder 8 wide amplifies rounding."""


EXACT = 1e-12
"""Integers that are equal; one that differs gives more."""


def _gradients(module: torch.nn.Module, case: Case, names: Mapping[str, str], tolerance: float = GRADIENT):
    """Checks of the parameters' gradients that a case holds; `names`: ours -> the case's."""
    found = {names[name]: p.grad for name, p in module.named_parameters() if name in names}
    return compare(found, case.under("grad/state"), tolerance, "grad/state/")


def run_mast3r_decoder(case: Case) -> list[Check]:
    info = case.info
    decoder = Decoder(info["enc_dim"], info["dec_dim"], info["depth"], info["heads"], info["mlp_ratio"])
    decoder.load_state_dict(case.under("state"))
    feats = [case[f"in/feat{v}"].clone().requires_grad_() for v in (1, 2)]
    outputs = decoder(*feats, tuple(info["grid1"]), tuple(info["grid2"]))
    ours = {f"view{v}/{i}": x for v in (1, 2) for i, x in enumerate(outputs[v - 1]) if i}
    torch.autograd.backward([x[-1] for x in outputs], [case[f"grad_out/view{v}"] for v in (1, 2)])
    checks = compare({name: x.detach() for name, x in ours.items()}, case.under("out"), under="out/")
    checks += compare({f"feat{v}": feats[v - 1].grad for v in (1, 2)}, case.under("grad/in"), GRADIENT, "grad/in/")
    return checks + _gradients(decoder, case, {name: name for name, _ in decoder.named_parameters()})


def _modes(info: Mapping[str, Any]) -> Modes:
    desc_conf = info["desc_conf_mode"]
    return Modes(
        read_mode("depth_mode", info["depth_mode"], POINT_MODES),
        read_mode("conf_mode", info["conf_mode"], CONFIDENCE_MODES),
        None if desc_conf is None else read_mode("desc_conf_mode", desc_conf, CONFIDENCE_MODES),
        info["two_confs"],
    )


def run_mast3r_head(case: Case) -> list[Check]:
    info = case.info
    widths = [info["enc_dim"], *[info["dec_dim"]] * 3]
    dpt = DPT(widths, info["patch_size"], 4, info["layer_dims"], info["feature_dim"], info["last_dim"])
    channels = info["local_feat_dim"] + int(info["two_confs"])
    local = DescriptorMLP(info["enc_dim"] + info["dec_dim"], channels, info["patch_size"])
    head = ViewHead(dpt, local, info["depth"])
    assert head.hooks == tuple(info["hooks"])
    head.load_state_dict(head_state(case.under("state"), case.path))
    tokens = {int(i): x.clone().requires_grad_() for i, x in case.under("in/tokens").items()}
    raw = head([tokens.get(i) for i in range(info["depth"] + 1)], tuple(info["grid"]))
    out = activate(raw, _modes(info))
    torch.autograd.backward(list(out.values()), [case[f"grad_out/{name}"] for name in out])
    ours = {**out, "raw_pts3d_conf": raw[:, :4], "raw_local": raw[:, 4:]}
    checks = compare({name: x.detach() for name, x in ours.items()}, case.under("out"), under="out/")
    gradients = {str(i): x.grad for i, x in tokens.items()}
    checks += compare(gradients, case.under("grad/in/tokens"), GRADIENT, "grad/in/tokens/")
    return checks + _gradients(head, case, {name: name for name, _ in head.named_parameters()})


def run_mast3r_activations(case: Case) -> list[Check]:
    checks: list[Check] = []
    for name, config in case.info["configs"].items():
        raw = case["in/raw"][:, : None if config["two_confs"] else -1]
        checks += compare(activate(raw, _modes(config)), case.under(f"out/{name}"), under=f"{name}/")
    return checks


def _encoder(case: Case, patch_size: int) -> VisionTransformer:
    info = case.info["encoder"]
    encoder = VisionTransformer(
        ViTConfig(
            image_size=info["pos_embed_grid"] * patch_size, patch_size=patch_size, embed_dim=info["dim"],
            depth=info["depth"], num_heads=info["heads"], num_registers=info["registers"],
        )
    )  # fmt: skip
    encoder.load_state_dict(flat_blocks(case.under("encoder")))
    return encoder.eval().requires_grad_(False)


def _whole_head(case: Case) -> Mast3rHead:
    return read({**_container(case.info), "model": case.under("state")}, case.path)


def _container(info: Mapping[str, Any]) -> dict[str, Any]:
    return {"mast3r_model_str": info["mast3r_model_str"], "dune_backbone_name": ""}


def _both_orders(head: Mast3rHead, encoder: VisionTransformer, case: Case) -> Outputs:
    """As the training runs a batch, in the case's order: (a0, b0), (b0, a0), (a1, b1), ..."""
    portrait = torch.stack([(case[f"in/view{v}/true_shape"].diff() < 0).flatten() for v in (1, 2)], dim=1)
    kinds = portrait.unique(dim=0)  # pairs that stand alike come together
    rows = [(portrait == kind).all(dim=1).nonzero().flatten() for kind in kinds]
    images = [for_encoder(case[f"in/view{v}/img"][torch.cat(rows)], encoder) for v in (1, 2)]
    ends = torch.tensor([len(r) for r in rows]).cumsum(0).tolist()
    groups = [(*kind, first, last) for kind, first, last in zip(kinds.tolist(), [0, *ends], ends, strict=False)]
    outputs = both_orders_outputs(head, lambda x, _: encode(encoder, x), *images, groups, [(None, None)] * ends[-1])
    back = torch.cat(rows).argsort()
    order = torch.stack([back, back + len(back)], dim=1).flatten()
    view1, view2 = ({name: x[order] for name, x in view.items()} for view in outputs)
    return view1, view2


def run_dune_mast3r(case: Case) -> list[Check]:
    head, encoder = _whole_head(case).requires_grad_(True), _encoder(case, case.info["patch_size"])
    results = _both_orders(head, encoder, case)
    mixed = case.info.get("orientation") == "mixed"  # then the case has the pairs in one order
    checks: list[Check] = []
    for v, result in enumerate(results, 1):
        ours = {name: x.detach()[:: 2 if mixed else 1] for name, x in result.items()}
        checks += compare(ours, case.under(f"out/view{v}"), WHOLE, f"view{v}/")
    if mixed:
        return checks
    tokens = [encode(encoder, for_encoder(case[f"in/view{v}/img"][:1], encoder)).raw_patch for v in (1, 2)]
    checks.append(Check("encoder_tokens", relative_error(torch.cat(tokens), case["out/encoder_tokens"]), WHOLE))
    return checks + _loss_checks(case, head, results)


def _loss_checks(case: Case, head: Mast3rHead, results: Outputs) -> list[Check]:
    """The loss of a batch of pairs in both orders, and its gradients."""
    given = [case.under(f"in/view{v}") for v in (1, 2)]
    names = [name for name in given[0] if name != "img"]
    truth = [
        {name: torch.stack([a[name], b[name]], dim=1).flatten(0, 1) for name in names} for a, b in (given, given[::-1])
    ]
    loss, details = criterion(case.info["criterion"], *truth, *results)
    loss.backward()
    checks = [Check("loss", relative_error(loss.detach(), case["out/loss"]), WHOLE)]
    for name, value in case.info["details"].items():
        checks.append(Check(name, relative_error(details[name].detach(), torch.tensor(value)), WHOLE))
    names = {name: f"mast3r.{name.removeprefix('decoder.')}" for name, _ in head.named_parameters()}
    names |= {name: name for name in names if name.startswith("norm.")}
    return checks + _gradients(head, case, names, WHOLE_GRADIENT)


def run_dune_mast3r_file(case: Case) -> list[Check]:
    """A file in DUNE-MASt3R's container, with the encoder that it does not hold."""
    path = case.path.parent / case.info["file"]
    content = read_container(path)
    assert recognize(content)
    head, encoder = read(content, path), _encoder(case, case.info["encoder"]["patch_size"])
    with torch.no_grad():
        results = head(*(encode(encoder, for_encoder(case[f"in/view{v}/img"], encoder)) for v in (1, 2)))
    return [
        check
        for v, result in enumerate(results, 1)
        for check in compare(result, case.under(f"out/view{v}"), WHOLE, f"view{v}/")
    ]


def run_reciprocal_nn(case: Case) -> list[Check]:
    info = case.info
    maps, confs = [case["in/desc1"], case["in/desc2"]], [case["in/conf1"], case["in/conf2"]]
    step = info["subsample"]
    ours = dict(zip(("init/xy1", "init/xy2"), reciprocal(
        *maps, start=case["in/init_xy1"], tolerance=info["pixel_tol"]
    ), strict=True))  # fmt: skip
    for distance in ("dot", "l2"):
        ours |= zip((f"{distance}/xy1", f"{distance}/xy2"), reciprocal(*maps, step, distance=distance), strict=True)
    both = symmetric(*maps, *confs, step)
    ours |= {"symmetric/xy1": both.xy1, "symmetric/xy2": both.xy2, "symmetric/conf": both.confidence}
    return [Check(name, relative_error(x, case[f"out/{name}"]), EXACT) for name, x in ours.items()]


def _angle(a: np.ndarray, b: np.ndarray) -> float:
    """Degrees between two rotations [3, 3] or two directions [3]."""
    cosine = (np.trace(a.T @ b) - 1) / 2 if a.ndim == 2 else a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def run_pnp(case: Case) -> list[Check]:
    """Within 0.2 degrees and 0.02 m of the truth, as the case says."""
    info, given = case.info, case.under("in")
    options = {"threshold": info["reprojection_error"], "iterations": info["iterations"]}
    found = pnp(given["pts3d"].numpy(), given["pts2d"].numpy(), given["K"].numpy(), **options)
    pose, truth = found.camera_to_world, case["gt/cam_to_world"].numpy()
    assert pose is not None, found.reason
    return [
        Check("degrees", _angle(pose[:3, :3], truth[:3, :3]), 0.2),
        Check("metres", float(np.linalg.norm(pose[:3, 3] - truth[:3, 3])), 0.02),
    ]


def run_relative_pose(case: Case) -> list[Check]:
    """Within 0.1 and 0.5 degrees of the truth, and 5 % of the public method's length, as the case says."""
    info, given = case.info, {name: x.numpy() for name, x in case.under("in").items()}
    k, pixels1, pixels2 = given["K"], given["kpts0"], given["kpts1"]
    at1, at2 = (tuple(pixels.astype(int).T[::-1]) for pixels in (pixels1, pixels2))
    depth1, depth2 = given["depth0"][at1], given["depth1"][at2]
    emat, options = info["emat"], {"threshold": info["pnp"]["threshold"], "iterations": info["pnp"]["iterations"]}
    known, rays = depth1 > 0, np.column_stack([pixels1, np.ones(len(pixels1))]) @ np.linalg.inv(k).T
    ours = {"pnp": pnp((rays * depth1[:, None])[known], pixels2[known], k, **options)}
    for name, scale in (("emat_scale_ransac", "consensus"), ("emat_scale_mean", "mean")):
        ours[name] = essential(
            pixels1, pixels2, k, k, depth1, depth2, threshold=emat["pix_threshold"], scale=scale,
            scale_threshold=emat["scale_threshold"],
        )  # fmt: skip
    checks: list[Check] = []
    for name, found in ours.items():
        assert found.rotation is not None and found.translation is not None, found.reason
        length = np.linalg.norm(case[f"out/{name}/t"].numpy())
        checks += [
            Check(f"{name}/degrees", _angle(found.rotation, case["gt/R"].numpy()), 0.1),
            Check(f"{name}/direction", _angle(found.translation, case["gt/t"].numpy()), 0.5),
            Check(f"{name}/length", abs(float(np.linalg.norm(found.translation) / length) - 1), 0.05),
        ]
    return checks


CONTAINERS = {"dunemast3r": run_dune_mast3r_file}
"""`what` of a case of the kind `container` -> what recomputes it."""
RUNNERS = {
    "mast3r_decoder": run_mast3r_decoder,
    "mast3r_head": run_mast3r_head,
    "mast3r_activations": run_mast3r_activations,
    "dune_mast3r": run_dune_mast3r,
    "reciprocal_nn": run_reciprocal_nn,
    "pnp": run_pnp,
    "relative_pose": run_relative_pose,
}
