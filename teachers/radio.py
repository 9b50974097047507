"""RADIO's and C-RADIO's ViTs, out of their own container, without its heads for teachers ("adaptors").

Ranzinger et al., "AM-RADIO", CVPR 2024; "PHI-S", ICLR 2025; Heinrich et al., "RADIOv2.5", CVPR 2025. The arguments in
the container say how many summary tokens there are and which of them are the summary. Weights that were trained with
spectral reparametrisation are made plain as the release's loader does: after one more step of power iteration. What
normalises the features of layers before the last (`_intermediate_feature_normalizer`) is left out. The hybrid E-RADIO
is another network.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dune_fast.kernels.nn.block import product_dtype
from dune_fast.kernels.nn.radio import CLIP_MEAN, CLIP_STD, RADIOConfig, RADIOViT
from dune_fast.kernels.nn.spectral import power_iteration, spectral_weight
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.teachers.architecture import stored_architecture
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError, below, container_state
from dune_fast.teachers.dune import container_options
from dune_fast.teachers.encoder_names import encoder_state, from_timm
from dune_fast.teachers.foundation import with_patch_bias
from dune_fast.teachers.protocol import Trunk
from dune_fast.teachers.vit import ViTTeacher, plain_norm

BACKBONE = "base_model."
"""What stands before the backbone's names in a container."""
_TABLE = "base_model.patch_generator.pos_embed"
_ORIGINAL = ".parametrizations.weight.original"


class RADIOTeacher(ViTTeacher):
    """cls = the summary, its tokens one behind the other; patches = the features.

    A summary of several tokens has other channels than the patches: name two teachers of one file then, one with
    `token_types: [cls]`, one with `token_types: [patch]`. They share one forward pass.
    """

    statistics = (CLIP_MEAN, CLIP_STD)
    layer_scale = None
    cls_token = False  # the table has no position for one; the network's own tokens are `prefix_tokens`
    network = RADIOViT
    sizes = {768: (12, 12, 4), 1024: (24, 16, 4), 1152: (27, 16, 4304 / 1152), 1280: (32, 16, 4), 1536: (40, 24, 4)}

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        return _TABLE in keys or "prefix_tokens" in keys

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        if _TABLE not in state:
            return encoder_state(state, path)
        for name, published in (("norm_mean", CLIP_MEAN), ("norm_std", CLIP_STD)):
            found = state.get(f"input_conditioner.{name}")
            if found is not None and not torch.allclose(found.flatten().float(), torch.tensor(published), atol=1e-3):
                raise TeacherWeightsError(f"{path} normalises images by {name} {found.flatten().tolist()}, not CLIP's")
        inner = plain_weights(below(state, "base_model."), path)
        for old, new in (
            ("patch_generator.pos_embed", "pos_embed"), ("patch_generator.embedder.bias", "patch_embed.proj.bias"),
        ):  # fmt: skip
            if old in inner:
                inner[new] = inner.pop(old)
        for old, new, form in (
            ("patch_generator.embedder.weight", "patch_embed.proj.weight", _as_kernel),
            ("patch_generator.cls_token.token", "prefix_tokens", lambda x: x[None]),
        ):
            if old in inner:
                inner[new] = form(inner.pop(old))
        for name, ours in (("mean", "feature_mean"), ("tx", "feature_matrix")):
            if (found := state.get(f"_feature_normalizer.{name}")) is not None:
                inner[ours] = found
        return with_patch_bias(from_timm(inner))

    @classmethod
    def reads(cls, name: str) -> bool:
        return name.startswith(("base_model.", "_feature_normalizer.", "input_conditioner."))

    @classmethod
    def heads(cls, content: Mapping[str, Any], path: Path) -> int | None:
        found = model_arguments(content).get("num_heads")
        return found if type(found) is int and found > 0 else None

    @classmethod
    def variant(cls, plain: ViTConfig, state: Mapping[str, Tensor], cfg: TeacherConfig) -> ViTConfig:
        normalized = "feature_mean" in state
        fields = asdict(plain) | {"cls_token": True, "final_norm": "norm.weight" in state}
        return RADIOConfig(**fields, normalized=normalized)

    @classmethod
    def read_content(
        cls, content: Mapping[str, Any], path: Path, cfg: TeacherConfig
    ) -> tuple[ViTConfig, dict[str, Tensor]]:
        if _TABLE not in container_state(content, path):
            return cls._own(content, path, cfg)
        architecture, state = super().read_content(content, path, cfg)
        assert isinstance(architecture, RADIOConfig)
        args, prefix = container_options(content), state.get("prefix_tokens")
        if not args.get("cpe_max_size"):
            raise TeacherWeightsError(f"{path} does not say cpe_max_size; RADIO's own containers do")
        if prefix is None or prefix.ndim != 3:
            raise TeacherWeightsError(f"{path} lacks base_model.patch_generator.cls_token.token")
        count, summaries = summary_tokens(args, path)
        if count > prefix.shape[1]:
            raise TeacherWeightsError(f"{path} names {count} teachers, but has {prefix.shape[1]} tokens for them")
        registers = prefix.shape[1] - count
        nominal = model_arguments(content).get("img_size")
        cropped = type(nominal) is not int or nominal < architecture.image_size
        found = replace(
            architecture, num_cls=count, summaries=summaries, num_registers=registers, cropped=cropped
        )  # fmt: skip
        return found, state

    @classmethod
    def _own(cls, content: Mapping[str, Any], path: Path, cfg: TeacherConfig) -> tuple[ViTConfig, dict[str, Tensor]]:
        """The encoder of a run with `student.family=radio`."""
        if not isinstance(stored_architecture(path), RADIOConfig):
            raise TeacherWeightsError(
                f"{path} has the names of a student of RADIO's family, but does not say its architecture: give the "
                "run's folder or its encoder.safetensors"
            )
        return super().read_content(content, path, cfg)

    def build_trunk(self) -> Trunk:
        trunk = super().build_trunk()
        trunk.vit.plain()
        return trunk

    @classmethod
    def alike(cls, architecture: ViTConfig) -> Collection[str]:
        assert isinstance(architecture, RADIOConfig)
        return cls.token_types if len(architecture.summaries) == 1 else ("patch",)

    def channels(self) -> int:
        dim, count = self.trunk.num_features, len(self.trunk.vit.cfg.summaries)
        if "cls" not in self.config.token_types or count == 1:
            return dim
        if "patch" in self.config.token_types:
            raise ValueError(
                f"teachers.{self.name}: the summary has {count} tokens, {count * dim} channels, patches have {dim}; "
                "name two teachers of this file, one with token_types=[cls], one with token_types=[patch]"
            )
        return count * dim

    def tokens(self, features: dict[int, Tensor]) -> dict[str, Tensor]:
        vit, x = self.trunk.vit, features[self.block]
        if self.config.layer is not None:
            x = plain_norm(x) if self.config.norm else x
        elif vit.cfg.final_norm and self.config.norm:
            x = vit.norm(x, out_dtype=product_dtype(x))
        patches = x[:, vit.num_prefix_tokens :]
        if self.config.layer is None:
            patches = vit.standardized(patches)
        return {"cls": x[:, list(vit.cfg.summaries)].flatten(1), "patch": patches}


def model_arguments(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a container's arguments say of the backbone's sizes; empty where they say nothing."""
    found = container_options(content).get("model_kwargs")
    return found if isinstance(found, Mapping) else {}


def _as_kernel(weight: Tensor) -> Tensor:
    """A linear layer's weight [D, 3 p p] as a convolution's [D, 3, p, p]; as it is where it is none."""
    side = int((weight.shape[-1] // 3) ** 0.5) if weight.ndim == 2 else 0
    return weight.unflatten(1, (3, side, side)) if side and 3 * side**2 == weight.shape[1] else weight


def summary_tokens(args: Mapping[str, Any], path: Path) -> tuple[int, tuple[int, ...]]:
    """(summary tokens, indices of those that are the summary) by the arguments of a container.

    Teachers of one name share a token. The summary is of the teachers with `use_summary`. The token of each has its
    place in the list, whatever `token_slot` says. Where names repeat, a place may lie beyond the tokens: then
    `token_slot` counts, or else the place among the names. TeacherWeightsError if the arguments name no teachers, or
    none has a summary.
    """
    teachers = args.get("teachers")
    named = isinstance(teachers, list) and teachers
    if not named or not all(isinstance(t, Mapping) and isinstance(t.get("name"), str) and t["name"] for t in teachers):
        raise TeacherWeightsError(f"{path} does not name the teachers that its summary tokens are for, each by a text")
    if not args.get("cls_token_per_teacher", True):
        return 1, (0,)
    names = list(dict.fromkeys(teacher["name"] for teacher in teachers))
    first: dict[str, int] = {}
    for i, teacher in enumerate(teachers):
        if teacher.get("use_summary", True):
            place = i if i < len(names) else teacher.get("token_slot", names.index(teacher["name"]))
            first.setdefault(teacher["name"], place)
    if not first:
        raise TeacherWeightsError(f"{path} has no summary: all its teachers have use_summary=False")
    if not all(type(place) is int and 0 <= place < len(names) for place in first.values()):
        raise TeacherWeightsError(f"{path} has the summary tokens {list(first.values())} of {len(names)}")
    return len(names), tuple(sorted(set(first.values())))


def plain_weights(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A state dict whose spectrally reparametrised weights are plain ones; see the top of the file.

    TeacherWeightsError if something that belongs to one is missing.
    """
    found = {key: value for key, value in state.items() if ".parametrizations." not in key}
    for key in [key for key in state if key.endswith(_ORIGINAL)]:
        layer = key.removesuffix(_ORIGINAL)
        inner = {k: v for k, v in below(state, f"{layer}.parametrizations.weight.0.").items()}
        parts = sorted({int(name.split(".")[1]) for name in inner if name.startswith("parts.")})
        groups = [below(inner, f"parts.{i}.") for i in parts] or [inner]
        try:
            rows = state[key].float().chunk(len(groups))
            found[f"{layer}.weight"] = torch.cat([_spectral(w, g) for w, g in zip(rows, groups, strict=True)])
        except (KeyError, RuntimeError) as error:
            raise TeacherWeightsError(f"{path}: {layer} is not reparametrised as RADIO does ({error})") from error
    return found


def _spectral(weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """W times its gain over its largest singular value, estimated by one more step."""
    u, v = power_iteration(weight, parts["_v"].float())
    return spectral_weight(weight, parts["scale"].float(), u, v, 2 if "_sn_version" in parts else 1)
