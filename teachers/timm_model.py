"""Any model of timm: CLIP, SigLIP, SAM, DINOv3, RADIO, ConvNeXt, ... with weights out of a local file.

The model is built without its classifier. A ViT's output is read as tokens, anything else's as a map. `layer` reads a
ViT, SAM's too, after one of its blocks, before the final norm or the neck. Nothing is downloaded: `weights` is a file
in timm's own names, as its published `model.safetensors` have, or "random:SEED".
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from dune_fast.teachers.protocol import Teacher, Trunk, map_tokens
from dune_fast.teachers.torchvision_operators import declare
from dune_fast.teachers.vit import plain_norm
from dune_fast.teachers.weights import build_foreign, random_seed, weights_path

CLASSIFIERS = ("head.", "fc.", "classifier.", "head_dist.", "pre_logits.")


class TimmTrunk(Trunk):
    """Images [B, 3, H, W] -> place of reading -> tokens by type: {"patch": [B, N, C]} and, where the model has such a
    token, "cls". A place is a number of blocks, or None for the model's output."""

    def __init__(self, model: nn.Module, patch_size: int) -> None:
        super().__init__()
        self.model = model
        self.patch_size = patch_size
        self.num_features = model.num_features
        self.num_prefix_tokens = int(getattr(model, "num_prefix_tokens", 0))
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self.has_cls = has_cls(model)
        self.depth = len(model.blocks) if hasattr(model, "blocks") and hasattr(model, "forward_intermediates") else 0
        """Blocks that can be read; 0 where there are none."""
        self.own_size: int | None = None
        """Side of the images that the model is made for, where it may refuse others."""
        self.layers: set[int | None] = set()
        """Places that teachers read."""

    def forward(self, images: Tensor) -> dict[int | None, dict[str, Tensor]]:
        blocks = sorted(self.layers - {None})
        if not blocks:
            return {None: self._output(self.model.forward_features(images))}
        last = None in self.layers
        options: dict[str, Any] = {"return_prefix_tokens": True} if self.num_prefix_tokens else {}
        found = self.model.forward_intermediates(
            images, [block - 1 for block in blocks], norm=False, stop_early=not last, intermediates_only=not last,
            **options,
        )  # fmt: skip
        output, found = found if last else (None, found)
        tokens = {block: self._intermediate(x) for block, x in zip(blocks, found, strict=True)}
        return {**tokens, None: self._output(output)} if last else tokens

    def _output(self, features: Any) -> dict[str, Tensor]:
        if isinstance(features, dict):  # packed inputs of flexible ViTs come back with their masks
            features = features["patches"]
        if features.ndim == 4:
            return {"patch": map_tokens(features, self.channels_last)}
        tokens = {"patch": features[:, self.num_prefix_tokens :]}
        return {"cls": features[:, 0], **tokens} if self.has_cls else tokens

    def _intermediate(self, found: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Of a map [B, C, H, W], with its prefix tokens [B, P, C] where the model has such."""
        patches, prefix = found if self.num_prefix_tokens else (found, None)
        tokens = {"patch": map_tokens(patches)}
        return {"cls": prefix[:, 0], **tokens} if self.has_cls else tokens


class TimmTeacher(Teacher):
    """`model` is the name in timm, `model_args` go to its factory; `mean` and `std` are the model's own."""

    trunk: TimmTrunk

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        name, cfg = self.name, self.config
        if "cls" in cfg.token_types and not self.trunk.has_cls:
            raise ValueError(
                f"teachers.{name}.token_types asks for cls, but {cfg.model} has no cls token; give [patch]"
            )
        if cfg.layer is None and not cfg.norm:
            raise ValueError(f"teachers.{name}.norm is false: of a model of timm, `layer` must name the block to read")
        self.trunk.layers.add(cfg.layer)

    def build_trunk(self) -> Trunk:
        cfg = self.config
        seed = random_seed(self.name, cfg.weights)
        path = None if seed is not None else weights_path(cfg.weights)  # before a large model is built in vain
        options = dict(cfg.model_args)
        if cfg.image_size is not None:
            options.setdefault("img_size", cfg.image_size)
        model = build_foreign(lambda: create(self.name, cfg.model, options), seed, path, cfg.model, CLASSIFIERS)
        trunk = TimmTrunk(model, patch_size(model, cfg.patch_size))
        if model.pretrained_cfg.get("fixed_input_size"):
            trunk.own_size = int(options.get("img_size") or model.pretrained_cfg["input_size"][-1])
        return trunk

    def channels(self) -> int:
        """Of the output or of a block, which may differ; ValueError for a block that there is not."""
        layer, depth = self.config.layer, self.trunk.depth
        if layer is None:
            return self.trunk.num_features
        if layer > depth:
            blocks = f"{depth} blocks" if depth else "no blocks that can be read; give null"
            raise ValueError(f"teachers.{self.name}.layer is {layer}; {self.config.model} has {blocks}")
        return int(self.trunk.model.embed_dim)

    def tokens(self, features: dict[int | None, dict[str, Tensor]]) -> dict[str, Tensor]:
        found = features[self.config.layer]
        if self.config.layer is None or not self.config.norm:
            return found
        return {kind: plain_norm(x) for kind, x in found.items()}


def import_torchvision() -> ModuleType:
    """torchvision: built for CUDA, its import looks for two operators that a CPU torch has not."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        declare()
        return importlib.import_module("torchvision")


def import_timm() -> ModuleType:
    """timm, which imports torchvision."""
    try:
        import_torchvision()
        return importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(f"teachers of the family timm need the package timm ({error}); pip install timm") from error


def create(name: str, model: str, options: dict[str, Any]) -> nn.Module:
    """timm's model without classifier and without weights, for any image size where the architecture allows it.

    ValueError if there is no such model, or it does not take these arguments.
    """
    timm = import_timm()
    if not model or not timm.is_model(model):
        close = timm.list_models(f"*{model.partition('.')[0]}*")[:5] if model else []
        hint = f"; do you mean {', '.join(close)}?" if close else "; timm.list_models() has the names"
        raise ValueError(f"teachers.{name}.model is {model!r}, which timm does not know{hint}")
    # "img_size" fixes positions to one size unless the model resizes them itself; CNNs take neither
    attempts = [{"dynamic_img_size": True, **options}, options, {k: v for k, v in options.items() if k != "img_size"}]
    for attempt in attempts:
        try:
            return timm.create_model(model, pretrained=False, num_classes=0, **attempt)
        except TypeError as error:
            refused = error
    raise ValueError(f"teachers.{name}.model_args {options} do not suit {model}: {refused}") from refused


def has_cls(model: nn.Module) -> bool:
    """Whether a model has a class token."""
    owners = (model, getattr(model, "embeds", None))  # flexible ViTs keep it beside their patch embedding
    return any(getattr(owner, "cls_token", None) is not None for owner in owners)


def patch_size(model: nn.Module, configured: int) -> int:
    """Pixels a token stands for, as the model says; the configuration's where it does not."""
    info = getattr(model, "feature_info", None)
    if info and not hasattr(model, "num_prefix_tokens"):  # hierarchical: the last map's stride
        return int(info[-1]["reduction"])
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return int(size[0]) if size is not None else configured
