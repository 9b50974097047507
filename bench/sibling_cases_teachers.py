"""Reference cases of the teachers that RADIO's and Theia's recipes read: published layouts, every token they take.

Each goes through registry and ensemble, as in a run. Cases that hold their weights as tensors are written to a file
first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from bench.case import Case, Check, compare
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.nn.foundation_vit import centred_angles
from dune_fast.kernels.nn.sam import relative_table
from dune_fast.kernels.nn.vit import VisionTransformer, resize_positions
from dune_fast.teachers.clip import CLIP_MEAN, CLIP_STD
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.ensemble import TeacherEnsemble


def run_clip(case: Case) -> list[Check]:
    """`clip_vision`: un-normalised patches, cls after the last norm, and after the projection."""
    readings = {"last": {"norm": False}, "pooled": {"token_types": ["cls"]}}
    width, embedding = case["last_hidden_state"].shape[-1], case["image_embeds"].shape[-1]
    readings["embeds"] = {"token_types": ["cls"], "projected": True, "num_features": embedding}
    shared = {"activation": case.info["hidden_act"], "num_heads": case.info["num_attention_heads"]}
    found = _tokens(case, "clip", case.under("state"), width, readings, **shared)
    ours = {
        "last_hidden_state": found["last"]["patch"], "pooler_output": found["pooled"]["cls"],
        "image_embeds": found["embeds"]["cls"],
    }  # fmt: skip
    expected = {name: case[name] for name in ours} | {"last_hidden_state": case["last_hidden_state"][:, 1:]}
    return compare(ours, expected)


def run_open_clip(case: Case) -> list[Check]:
    """`open_clip_visual`: patches after the last norm, cls after the projection."""
    readings = {"patch": {"token_types": ["patch"]}}
    readings["pooled"] = {"token_types": ["cls"], "projected": True, "num_features": case.info["output_dim"]}
    activation = "quick_gelu" if case.info["quick_gelu"] else "gelu"
    found = _tokens(
        case, "open_clip", case.under("state"), case["tokens"].shape[-1], readings, activation=activation,
        num_heads=case.info["heads"],
    )  # fmt: skip
    ours = {"tokens": found["patch"]["patch"], "pooled": found["pooled"]["cls"]}
    return compare(ours, {name: case[name] for name in ours})


def run_siglip(case: Case) -> list[Check]:
    """`siglip_vision`: patches after the last norm and the pooled output; positions resized in both conventions."""
    source = Case(case.path.parent / case.info["state_of"]) if "state_of" in case.info else case
    checks = []
    for under, offset in (("", 0.0), ("legacy/", 0.1)):
        if f"{under}last_hidden_state" not in case:
            continue
        (found,) = _tokens(
            case, "siglip", source.under("state"), case["last_hidden_state"].shape[-1], {"both": {}},
            patch_size=source.info["patch_size"], num_heads=source.info["num_attention_heads"],
            interpolate_offset=offset,
        ).values()  # fmt: skip
        ours = {"last_hidden_state": found["patch"], "pooler_output": found["cls"]}
        checks += compare(ours, {name: case[under + name] for name in ours}, under=under)
    return checks


def run_dinov3(case: Case) -> list[Check]:
    """`dinov3_vit`, EUPE's files too: tokens, storage tokens, and angles in the release's order."""
    info, checks = case.info, []
    for i, _ in enumerate(info["images"]):
        fields = {"num_heads": info["num_heads"], "num_registers": info["storage_tokens"]}
        found, vit = _network(case, "dinov3", _file(case), info["embed_dim"], f"image{i}", **fields)
        inputs = case[f"image{i}"]
        cos, sin = centred_angles(*vit.grid(inputs), vit.rope_periods)
        with torch.no_grad():
            network = vit(inputs)
        ours = {
            f"out{i}/x_norm_clstoken": found["cls"], f"out{i}/x_norm_patchtokens": found["patch"],
            f"out{i}/x_prenorm": network["x_prenorm"], f"out{i}/x_storage_tokens": network["x_norm_regtokens"],
            f"rope{i}/cos": cos.flatten(1).repeat(1, 2), f"rope{i}/sin": sin.flatten(1).repeat(1, 2),
        }  # fmt: skip
        checks += compare(ours, {name: case[name] for name in ours})
    return checks


def run_sam(case: Case) -> list[Check]:
    """`sam_encoder`: the map after every block, before and after the neck."""
    info, depth = case.info, case.info["depth"]
    readings: dict[str, dict[str, Any]] = {f"block{i}": {"layer": i + 1, "norm": False} for i in range(depth)}
    readings |= {"prenorm_last": {}, "neck": {"projected": True, "num_features": info["out_chans"]}}
    shared = {"token_types": ["patch"], "num_heads": info["num_heads"]}
    found = _tokens(case, "sam", _file(case), info["embed_dim"], readings, **shared)
    ours = {name: tokens["patch"].transpose(1, 2).unflatten(2, case[name].shape[-2:]) for name, tokens in found.items()}
    return compare(ours, {name: case[name] for name in ours})


def run_depth_anything(case: Case) -> list[Check]:
    """`depth_anything`: the head's feature before its last ReLU, whole and at the nearest pixels of a grid."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.safetensors")
        save_file({key: value.contiguous() for key, value in case.under("state").items()}, path)
        cfg = TeacherConfig(
            "depth_anything", path, case.info["patch_size"], case.info["head"], ["patch"], num_heads=case.info["heads"]
        )
        vit = TeacherEnsemble({"teacher": cfg}, cfg.patch_size).trunks[0].vit
    with torch.no_grad():
        feature = vit(case["image"])
        tokens = VisionTransformer.block_outputs(vit, case["image"], vit.cfg.outputs)
    ours = {f"backbone/{i}": vit.norm(x) for i, x in enumerate(tokens.values())}
    size = case["nearest_16"].shape[-2:]
    ours |= {"head_feature": feature, "nearest_16": F.interpolate(feature, size=size, mode="nearest")}
    return compare(ours, {name: case[name] for name in ours})


def run_radio(case: Case) -> list[Check]:
    """`radio_model`, the backbone's summary and features of whole attention, as a teacher reads them."""
    info, path = case.info, _file(case)
    summary = case["out0/NLC/backbone/summary"].shape[-1]
    width = case["out0/NLC/backbone/features"].shape[-1]
    shared = {"num_heads": info["num_heads"], "num_registers": info["num_registers"]}
    shared |= {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)}
    configs = {
        kind: TeacherConfig("radio", path, info["patch_size"], channels, [kind], **shared)
        for kind, channels in (("cls", summary), ("patch", width))
    }
    ensemble = TeacherEnsemble(configs, info["patch_size"])
    assert len(ensemble.trunks) == 1
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    checks = []
    for i, _ in enumerate(info["images"]):
        found = ensemble((case[f"image{i}"] - mean) / std)
        ours = {"summary": found["cls"]["cls"], "features": found["patch"]["patch"]}
        under = f"out{i}/NLC/backbone/"
        checks += compare(ours, {name: case[under + name] for name in ours}, under=under)
    return checks


def run_sam_table_resize(case: Case) -> list[Check]:
    """`sam_table_resize`: positions of another grid, relative tables of another side."""
    height, width = case.info["target_grid"]
    ours = {}
    for name, value in case.under("in").items():
        if name == "pos_embed":
            ours[name] = resize_positions(value.flatten(1, 2), height, width, 0, 0.0).unflatten(1, (height, width))
        else:  # a window's keeps its side, the grid's follows it
            whole = len(value) == 2 * case.info["source_grid"][0] - 1
            side = (height if name.endswith("_h") else width) if whole else (len(value) + 1) // 2
            ours[name] = relative_table(value, side)
    return compare(ours, case.under("out"), under="out/")


def _file(case: Case) -> str:
    return str(case.path.parent / case.info["file"])


def _tokens(
    case: Case, family: str, weights: dict[str, Tensor] | str, width: int, readings: dict[str, dict[str, Any]],
    patch_size: int | None = None, **shared: Any,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """Tokens of teachers of one file, by reading, of the case's image, which is normalised already."""
    with tempfile.TemporaryDirectory() as folder:
        if not isinstance(weights, str):
            path = str(Path(folder) / "model.safetensors")
            save_file({key: value.contiguous() for key, value in weights.items()}, path)
            weights = path
        patch = patch_size or case.info["patch_size"]
        base = {"family": family, "weights": weights, "patch_size": patch, "num_features": width, **shared}
        # the ensemble then leaves the image as it is
        base |= {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
        ensemble = TeacherEnsemble({name: TeacherConfig(**{**base, **own}) for name, own in readings.items()}, patch)
    assert len(ensemble.trunks) == 1
    return ensemble(case["image"])


def _network(case: Case, family: str, weights: str, width: int, image: str, **fields: Any) -> tuple[Any, Any]:
    """A teacher's tokens of one of the case's images, and its network."""
    cfg = TeacherConfig(family, weights, case.info["patch_size"], width, **fields)
    ensemble = TeacherEnsemble({"teacher": cfg}, cfg.patch_size)
    return ensemble(case[image])["teacher"], ensemble.teachers["teacher"].trunk.vit


TEACHER_RUNNERS: dict[str, Callable[[Case], list[Check]]] = {
    "clip_vision": run_clip,
    "open_clip_visual": run_open_clip,
    "siglip_vision": run_siglip,
    "dinov3_vit": run_dinov3,
    "sam_encoder": run_sam,
    "depth_anything": run_depth_anything,
    "sam_table_resize": run_sam_table_resize,
}
"""Kind of a case -> what recomputes it."""
