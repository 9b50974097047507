"""`--to radio`: the container of RADIO's releases: backbone, and a summary and a feature head for every teacher.

The heads of a run predict standardized features. Here the inverse of the standardization is folded into each head's
last linear layer, W' = A W and b' = A b + mean, so that the container gives features in the teacher's own scale.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from dune_fast.distill.phi_s_running import fold
from dune_fast.export.check import ExportError, Reader
from dune_fast.export.to_hf_radio import has_bias, statistics
from dune_fast.export.to_safetensors import PLAIN
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.nn.radio import CLIP_MEAN, CLIP_STD, RADIOConfig, RADIOViT
from dune_fast.load import DistilledModel
from dune_fast.projectors.heads import AttentionHead, HeadV1, HeadV2, SeparateHeads
from dune_fast.released_radio import load_released_radio
from dune_fast.teachers.containers import read_container

FILE = "radio.pth.tar"
GROUPS = {"cls": "_heads", "patch": "_feature_projections"}
_TIMM = {
    (192, 12, 3): "vit_tiny_patch16_224", (384, 12, 6): "vit_small_patch16_224", (768, 12, 12): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224", (1280, 32, 16): "vit_huge_patch16_224",
}  # fmt: skip
"""(channels, blocks, heads) -> the model that RADIO's code builds, timm's and a huge one of its own; `model_kwargs` say
all sizes besides. Others are built as the base model of other sizes, gated MLPs as DINOv2's giant."""
_GATED = "vit_giant_patch14_reg4_dinov2"


def refuse_unlike(encoder: nn.Module) -> RADIOConfig:
    """The architecture; ExportError if RADIO's containers cannot say it."""
    if not isinstance(encoder, RADIOViT):
        raise ExportError("RADIO's container needs a student of RADIO's family: train with student.family=radio")
    cfg = encoder.cfg
    demands = {
        "images normalised by CLIP's statistics (student.radio.conditioner=clip)":
            statistics(encoder) == (CLIP_MEAN, CLIP_STD),
        "a patch projection without bias, but for patches of 14 pixels (student.radio.patch_bias=false)":
            not has_bias(encoder) or cfg.patch_size == 14,
        "a position table for larger images than student.image_size (student.radio.cpe_max_size)": cfg.cropped,
    }  # fmt: skip
    for what, given in demands.items():
        if not given:
            raise ExportError(f"RADIO's container needs {what}: export this run to safetensors instead")
    return cfg


def timm_model(encoder: RADIOViT) -> tuple[str, dict[str, object]]:
    """Name and arguments of the model of timm that has this backbone's blocks."""
    cfg = encoder.cfg
    scale = cfg.layer_scale or 0.0  # none is 0: timm takes None for its own default
    kwargs = {
        "embed_dim": cfg.embed_dim, "depth": cfg.depth, "num_heads": cfg.num_heads, "patch_size": cfg.patch_size,
        "img_size": min(cfg.image_size, (cfg.table_side - 1) * cfg.patch_size), "init_values": scale,
    }  # fmt: skip
    if cfg.mlp == "swiglu":  # timm counts the rows of gate and value together
        return _GATED, {**kwargs, "mlp_ratio": encoder.blocks[0].mlp.w12.out_features / cfg.embed_dim}
    arch = _TIMM.get((cfg.embed_dim, cfg.depth, cfg.num_heads), _TIMM[768, 12, 12])
    return arch, {**kwargs, "mlp_ratio": cfg.mlp_ratio}


def backbone_state(encoder: RADIOViT) -> dict[str, Tensor]:
    """The encoder's tensors by the names of the releases."""
    names = {
        "pos_embed": "patch_generator.pos_embed", "prefix_tokens": "patch_generator.cls_token.token",
        "patch_embed.proj.weight": "patch_generator.embedder.weight",
        "patch_embed.proj.bias": "patch_generator.embedder.bias",
    }  # fmt: skip
    found = {}
    for key, value in encoder.state_dict().items():
        if key.startswith("feature_") or (key == "patch_embed.proj.bias" and not has_bias(encoder)):
            continue
        shaped = value[0] if key == "prefix_tokens" else value.flatten(1) if key == "patch_embed.proj.weight" else value
        found[names.get(key, key).replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")] = shaped
    return found


def teacher_entries(model: DistilledModel) -> dict[str, dict[str, str]]:
    """source -> token type -> teacher that gives it; ExportError where two give the same."""
    sources: dict[str, dict[str, str]] = {}
    for name, projector in model.student.projectors.items():
        if not isinstance(projector, SeparateHeads):
            raise ExportError("RADIO's container needs projectors of the kind heads (projector=heads)")
        own = sources.setdefault(model.student.projectors.sources[name], {})
        for token in projector.token_types:
            if token in own:
                raise ExportError(
                    f"RADIO's container has one {token} head for a teacher; {own[token]} and {name} are of one source: "
                    "give them different ones (teachers.NAME.source)"
                )
            own[token] = name
    return sources


def folded(model: DistilledModel, name: str, token: str) -> dict[str, Tensor]:
    """A head's tensors, the inverse of its teacher's standardization worked into the last layer."""
    head = getattr(model.student.projectors[name], token)
    state = dict(head.state_dict())
    last = next(key for key, module in head.named_modules() if module is head.last)
    inverse = getattr(model.statistics, name).normalizers[token].inverse()
    weight, bias = fold(state[f"{last}.weight"], state.get(f"{last}.bias"), *inverse)
    return state | {f"{last}.weight": weight, f"{last}.bias": bias}


def _version(head: nn.Module) -> str:
    """The version's name, of a head that RADIO's code reads."""
    if isinstance(head, HeadV1) and len(head.inner):
        raise ExportError("RADIO's code reads no inner layers of a v1 head: set num_inner=0, or choose v2")
    mlp = head.mlp if isinstance(head, AttentionHead) else head
    if isinstance(mlp, HeadV2) and mlp.fc1.bias is None:
        raise ExportError("RADIO's heads have biases (projector.*_head.bias=true)")
    return {HeadV1: "v1", HeadV2: "v2", AttentionHead: "attn"}[type(head)]


def write(model: DistilledModel, folder: Path, step: int = 0, about: Mapping[str, str] = PLAIN) -> None:
    """Writes `radio.pth.tar`: {"state_dict", "args", "arch", "epoch"} and `about`.

    A teacher without a head of one kind has none in the container either. Its place in the list is its summary token's:
    tokens that no projector reads have a teacher without heads there.
    """
    cfg = refuse_unlike(model.encoder)
    if cfg.final_norm != model.student.normed:
        raise ExportError(
            "RADIO's heads read the tokens that the backbone gives, and this run's read them before the final norm: "
            "train with student.final_norm=false or student.normed=true, or export this run to safetensors instead"
        )
    state = {f"base_model.{key}": value for key, value in backbone_state(model.encoder).items()}
    if cfg.normalized:
        encoder = model.encoder
        state |= {"_feature_normalizer.mean": encoder.feature_mean, "_feature_normalizer.tx": encoder.feature_matrix}
    for name, values in (("norm_mean", CLIP_MEAN), ("norm_std", CLIP_STD)):
        state[f"input_conditioner.{name}"] = torch.tensor(values).view(3, 1, 1)
    teachers, slots = [], model.student.projectors.slots
    shared, sources = cfg.num_cls == 1, teacher_entries(model)
    unread = [] if shared else [f"unread_{i}" for i in range(len(sources), cfg.num_cls)]
    for i, (source, entries) in enumerate((sources | dict.fromkeys(unread, {})).items()):
        # by its type, RADIO's code would look for the text tower of an open_clip, siglip2 or pe_core
        entry = {"name": source, "type": "generic", "model": source, "pretrained": ""}
        entry["use_summary"] = "cls" in entries if shared else i in cfg.summaries
        entry |= {"token_slot": slots[next(iter(entries.values()))]} if slots and entries else {}
        for token, name in entries.items():
            head = getattr(model.student.projectors[name], token)
            names = ("mlp_version", "summary_mlp_version") if token == "cls" else ("spatial_mlp_version",)
            entry |= dict.fromkeys(names, _version(head))
            state |= {f"{GROUPS[token]}.{source}.{key}": x for key, x in folded(model, name, token).items()}
            if head.upsample > 1:
                entry["fd_upsample_factor"] = head.upsample
        teachers.append(entry)
    arch, kwargs = timm_model(model.encoder)
    args = argparse.Namespace(
        model=arch, model_kwargs=kwargs, teachers=teachers, cls_token_per_teacher=not shared,
        cpe_max_size=cfg.table_side * cfg.patch_size, register_multiple=None, cpe_num_registers=cfg.num_registers,
        mlp_version="v2", spatial_mlp_version=None, spectral_reparam=False, spectral_heads=False,
        model_norm=cfg.final_norm, dtype=torch.float32, pretrained=False, num_classes=None, in_chans=None,
        input_size=None, drop=0.0, drop_path=None, drop_block=None, gp=None, bn_momentum=None, bn_eps=None,
        torchscript=False, initial_checkpoint="", damp=None,
    )  # fmt: skip
    content = {
        "state_dict": {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}, "args": args,
        "arch": arch, "epoch": 0, "step": step, "preprocessing": asdict(model.encoder.transform), **about,
    }  # fmt: skip
    torch.save(content, folder / FILE)


def radio_outputs(model: DistilledModel, renamed: Mapping[tuple[str, str], tuple[str, str]]) -> Reader:
    """Summary and patches of the backbone, and every head's output in the teacher's own scale.

    `renamed`: (teacher, token type) -> those that the output is called after.
    """

    def run(images: Tensor) -> dict[str, Tensor]:
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        own_mean, own_std = (torch.tensor(x).view(3, 1, 1) for x in (model.encoder.mean, model.encoder.std))
        images = (images * std + mean - own_mean) / own_std
        features = model.encoder(images)
        projections = model.projections(images, standardized=False)
        named = {
            ".".join(renamed.get((name, token), (name, token))): x
            for name, tokens in projections.items()
            for token, x in tokens.items()
        }
        return {key: features[key] for key in ("x_norm_clstoken", "x_norm_patchtokens")} | named

    return run


def reference(model: DistilledModel) -> Reader:
    """What the container has to give, by the names of its sources."""
    renamed = {
        (name, token): (source, token)
        for source, entries in teacher_entries(model).items()
        for token, name in entries.items()
    }
    return radio_outputs(model, renamed)


def read(folder: Path) -> Reader:
    """The container, read as any of RADIO's."""
    path = folder / FILE
    model = DistilledModel(*load_released_radio(read_container(path), path)).eval()
    return reference(model)
