"""Reference cases of Multi-HMR: its body model, rotations, detection, head, training and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.case import FORWARD, GRADIENT, Case, Check, compare, relative_error
from dune_fast.evaluate.human_mesh import MeshErrors
from dune_fast.heads.multihmr import official
from dune_fast.heads.multihmr.camera import depth_of, focal_ratio
from dune_fast.heads.multihmr.detection import detect, scores_of, suppress
from dune_fast.heads.multihmr.head import MultiHmrHead, People, Placed, place_bodies
from dune_fast.heads.multihmr.loss import LossWeights, losses
from dune_fast.heads.multihmr.rotations import axis_angle_from_matrix, matrix_from_six
from dune_fast.heads.multihmr.smplx import BodyModel, load_body_model
from dune_fast.heads.multihmr.targets import PARTS, make_targets
from dune_fast.heads.tokens import encode
from dune_fast.load import load_encoder
from dune_fast.teachers.containers import read_container

_EXACT = 1e-9  # of integers
_ROTVEC = 1e-4


def _body(case: Case) -> BodyModel:
    """The synthetic body model in the folder beside the case's."""
    folder: Path = case.path.parents[1] / "smplx"
    return load_body_model(folder / case.info["body_model"], case.info["vertex_ids"])


def run_smplx(case: Case) -> list[Check]:
    model, given = _body(case), {k: v.clone().requires_grad_() for k, v in case.under("in").items()}
    names = ("global_orient", "body_pose", "jaw_pose", "leye_pose", "reye_pose", "left_hand_pose", "right_hand_pose")
    rotations = model.matrices(*(given[name] for name in names), flat_hand_mean=case.info["flat_hand_mean"])
    body = model(given["betas"], rotations, given["expression"])
    out = {name: getattr(body, name) + given["transl"][:, None] for name in ("vertices", "joints")}
    torch.autograd.backward(list(out.values()), [case[f"grad_out/{name}"] for name in out])
    unmoved = torch.eye(3).expand(len(given["betas"]), 55, 3, 3)
    out["v_shaped"] = model(given["betas"], unmoved).vertices  # without expression
    gradients = {name: x.grad for name, x in given.items()}
    return [
        *compare({k: v.detach() for k, v in out.items()}, case.under("out"), under="out/"),
        *compare(gradients, case.under("grad"), GRADIENT, "grad/"),
    ]


def run_rot6d(case: Case) -> list[Check]:
    matrix = matrix_from_six(case["in/x"])
    return [
        Check("rotmat", relative_error(matrix, case["out/rotmat"]), FORWARD),
        Check("rotvec", relative_error(axis_angle_from_matrix(matrix), case["out/rotvec"]), _ROTVEC),
    ]


def run_multihmr_nms(case: Case) -> list[Check]:
    checks = []
    for kernel in range(1, 6):
        scores = suppress(scores_of(case["in/logits"]), kernel)
        cells = detect(scores, case.info["det_thresh"])
        index = torch.stack([cells.image, cells.row, cells.column], 1)
        checks.append(Check(f"kernel{kernel}/scores", relative_error(scores, case[f"out/kernel{kernel}/scores"]), 1e-6))
        checks.append(Check(f"kernel{kernel}/idx", relative_error(index, case[f"out/kernel{kernel}/idx"]), _EXACT))
    return checks


def _head(info: Mapping[str, Any], state: Mapping[str, Tensor]) -> MultiHmrHead:
    head = MultiHmrHead(
        info["embed_dim"], info["img_size"], info["patch_size"], info["num_betas"], info["xat_depth"],
        info["xat_num_heads"], info["dim_head"], info["dim"], info["mlp_dim"], True, info["camera_bands"],
        info["camera_max_resolution"], info["nearness"], info["person_center"],
    )  # fmt: skip
    head.load_state_dict(official.head_state(state))
    return head


def _outputs(people: People, placed: Placed) -> dict[str, Tensor]:
    """By the names of the cases."""
    return {
        "scores": people.scores, "offset": people.offset, "loc": people.location, "rotmat": people.rotations,
        "rotvec": axis_angle_from_matrix(people.rotations), "shape": people.betas, "expression": people.expression,
        "dist": people.depth[:, None], "dist_postprocessed": people.depth_value[:, None],
        "transl": people.translation, "transl_pelvis": placed.pelvis[:, None], "v3d": placed.v3d, "j3d": placed.j3d,
        "v2d": placed.v2d, "j2d": placed.j2d,
    }  # fmt: skip


def _compare(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], under: str, tolerance: float) -> list[Check]:
    return [
        Check(under + name, relative_error(ours[name].detach(), x), max(tolerance, _ROTVEC * (name == "rotvec")))
        for name, x in expected.items()
    ]


def run_multihmr_head(case: Case) -> list[Check]:
    head, model = _head(case.info, case.under("state")), _body(case)
    if case.info["mode"] == "training":
        return _training(case, head, model)
    patch, intrinsics = case["in/tokens"], case["in/K"]
    with torch.no_grad():
        scores = suppress(head.score_map(patch), case.info["nms_kernel_size"])
        people = head.decode(patch, intrinsics, detect(scores, case.info["det_thresh"]), scores)
        ours = _outputs(people, place_bodies(people, model, head.center))
    ours |= {"scores_map": scores[..., None], "camera_embedding": head.embedding(intrinsics)}
    cells = people.cells
    ours |= {"idx/image": cells.image, "idx/row": cells.row, "idx/column": cells.column}
    return _compare(ours, case.under("out"), "out/", FORWARD)


def _training(case: Case, head: MultiHmrHead, model: BodyModel) -> list[Check]:
    info = case.info
    patch, intrinsics = case["in/tokens"].clone().requires_grad_(), case["in/K"]
    image, person = torch.where(case["in/valid_humans"] > 0)
    names = {"left_hand": "left_hand_pose", "right_hand": "right_hand_pose"}
    truth = {p: case[f"in/smplx_{names.get(p, p + '_pose')}"][image, person] for p in PARTS}
    truth |= {"betas": case["in/smplx_shape"][image, person], "transl": case["in/smplx_transl"][image, person]}
    targets = make_targets(truth, image, person, case["in/valid_humans"].shape[1], intrinsics, model, head)
    kept = targets.cells.kept
    people = head.decode(patch, intrinsics, targets.cells)
    placed = place_bodies(people, model, head.center)
    w = info["loss_weights"]
    weights = LossWeights(**{k.removeprefix("alpha_"): v for k, v in w.items() if k != "start_2d_epoch"})
    found = losses(people, placed, targets, head.image_size, info["epoch"] >= w["start_2d_epoch"], weights)
    found["total"].backward()
    ours = {k: v[kept] for k, v in _outputs(people, placed).items()} | {"scores": people.score_map[..., None]}
    checks = _compare(ours, case.under("out"), "out/", FORWARD)
    cells, body = targets.cells, targets.body
    ratio = focal_ratio(intrinsics, head.image_size)[image]
    ours = {
        "offset": targets.offset, "loc": targets.location, "rotmat": targets.rotations,
        "rotvec": axis_angle_from_matrix(targets.rotations), "dist_postprocessed": targets.depth_value,
        "dist": depth_of(targets.depth_value, ratio, head.nearness),
        "shape": targets.betas, "transl": targets.translation, "transl_pelvis": body.pelvis,
        "v3d": body.v3d, "j3d": body.j3d, "v2d": body.v2d, "j2d": body.j2d, "idx/image": cells.image,
        "idx/row": cells.row, "idx/column": cells.column,
    }  # fmt: skip
    ours = {name: x[kept] for name, x in ours.items()} | {"scores": targets.scores}
    checks += _compare(ours, case.under("target"), "target/", FORWARD)
    checks += _compare(found, case.under("loss"), "loss/", FORWARD)
    gradients = {f"state/{name}": p.grad for name, p in head.named_parameters()} | {"in/tokens": patch.grad}
    return checks + compare(gradients, case.under("grad"), GRADIENT, "grad/")


def run_container(case: Case) -> list[Check]:
    """A whole released file: its encoder and its head."""
    info, path = case.info, case.path.parent / case.info["file"]
    content = read_container(path)
    assert official.recognize(content)
    head, model = official.read(content, path), _body(case)
    encoder = load_encoder(path, num_heads=info["vit"]["heads"])
    tokens = encode(encoder, case["in/image"])
    with torch.no_grad():
        people = head(tokens, case["in/K"], threshold=info["det_thresh"], nms=info["nms_kernel_size"])
        ours = _outputs(people, place_bodies(people, model, head.center)) | {"tokens": tokens.patch}
    return _compare(ours, case.under("out"), "out/", 1e-4)


def run_hmr_metrics(case: Case) -> list[Check]:
    errors = MeshErrors(case["in/joint_regressor"])
    checks, counts = [], []
    for i in range(case.info["images"]):
        given = case.under(f"in/{i}")
        sides = ((given[f"{s}_v3d"], given[f"{s}_v3d"][:, 0], given[f"{s}_j2d"]) for s in ("pred", "gt"))
        before = errors.counts.misses, errors.counts.false_positives
        pairs, wanted = errors.add(*sides), case[f"out/{i}/matches"]
        same = pairs.shape == wanted.shape and bool((pairs == wanted).all())
        checks.append(Check(f"{i}/matches", float(not same), _EXACT))
        after = errors.counts.misses, errors.counts.false_positives
        counts.append([len(given["gt_v3d"]), *(b - a for a, b in zip(before, after, strict=True))])
    checks.append(Check("counts", relative_error(torch.tensor(counts), case["out/counts"]), _EXACT))
    for name in ("pve", "pa_pve", "mpjpe", "pa_mpjpe"):
        ours = torch.tensor(errors.errors[name], dtype=torch.float64)
        checks.append(Check(name, relative_error(ours, case[f"out/{name}"]), 1e-4))
    result = errors.result()
    wanted = [case.info[name] for name in ("precision", "recall", "f1")]
    ours = [result[name] for name in ("precision", "recall", "f1")]
    return [*checks, Check("scores", relative_error(torch.tensor(ours), torch.tensor(wanted)), 1e-6)]


RUNNERS = {
    "smplx": run_smplx,
    "rot6d": run_rot6d,
    "multihmr_nms": run_multihmr_nms,
    "multihmr_head": run_multihmr_head,
    "hmr_metrics": run_hmr_metrics,
}
"""By kind; a container's case is run by what it holds: `CONTAINERS`."""

CONTAINERS = {"multihmr": run_container}
"""By `case.info["what"]`."""
