"""Linear heads as DINOv2's authors publish them, and as `dune-fast evaluate` has written them before heads had options.

Such a file holds tensors alone: `decode_head.conv_seg.*` with `decode_head.bn.*`, or `decode_head.conv_depth.*`. What
they do not say is taken from the result that `evaluate` has left beside its file. Without one it is what DINOv2's files
are, by their channels and names, such as `dinov2_vitb14_kitti_linear4_head.pth`: one or four blocks of an encoder with
a class token and patches of 14 px. Four blocks are the last ones in segmentation ("ms", windows of 640 px), evenly
spread ones in depth.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dune_fast.heads.head import HeadError
from dune_fast.heads.linear.depth import DEPTH_BINS, DepthHead
from dune_fast.heads.linear.layers import LinearHead
from dune_fast.heads.linear.segmentation import SegmentationHead
from dune_fast.teachers.containers import below, container_state, is_state
from dune_fast.teachers.weights import build_loaded

logger = logging.getLogger(__name__)

_PREFIX = "decode_head."
_UNUSED = (f"{_PREFIX}conv_seg.",)  # of DINOv2's depth files: mmseg makes it, nothing reads it
_NORM = ("weight", "bias", "running_mean", "running_var")
_WIDTHS = {"s": 384, "b": 768, "l": 1024, "g": 1536}
"""Channels of the published encoders, by the letter in their names."""
_RANGES = {"nyu": 10.0, "kitti": 80.0}
"""Data set in the name of a depth file -> its largest depth, in metres."""
_LARGE_WINDOW, _LARGE_STRIDE = 640, 320
"""Of the segmentation heads of four blocks, in pixels."""


def recognize(content: Mapping[str, Any]) -> bool:
    """Whether a container holds a linear head, or another one of DINOv2's for these tasks, which `read` refuses."""
    state = content if is_state(content) else content.get("state_dict")
    return is_state(state) and any(f"{_PREFIX}{name}.weight" in state for name in ("conv_seg", "conv_depth"))


def read(content: Mapping[str, Any], path: Path) -> LinearHead:
    """The head of such a container. HeadError or TeacherWeightsError if it is damaged or of another shape."""
    state = container_state(content, path)
    depth = f"{_PREFIX}conv_depth.weight" in state
    weight = state[f"{_PREFIX}conv_{'depth' if depth else 'seg'}.weight"]
    if weight.ndim != 4 or weight.shape[2:] != (1, 1) or (depth and weight.shape[0] != DEPTH_BINS):
        raise HeadError(f"{path} is no linear head: its convolution has weights of shape {list(weight.shape)}")
    if depth:
        state = {key: value for key, value in state.items() if not key.startswith(_UNUSED)}
    own = below(state, _PREFIX)
    _check_parts(own, depth, path)
    outputs, channels = weight.shape[:2]
    known = _beside(path) or _published(path, channels, depth)
    layers, with_cls = known.pop("layers"), known.pop("with_cls", True)
    parts = layers * (1 + (depth and with_cls))
    if channels % parts:
        raise HeadError(f"{path} reads {channels} channels, which are not those of {parts} equal parts")
    for other in ("window", "stride") if depth else ("max_depth",):
        known.pop(other, None)

    def build() -> LinearHead:
        if depth:
            return DepthHead(channels // parts, layers=layers, with_cls=with_cls, **known)
        return SegmentationHead(channels // parts, outputs, layers=layers, **known)

    return build_loaded(build, own, path)


def _check_parts(own: Mapping[str, Tensor], depth: bool, path: Path) -> None:
    """HeadError for the tensors of another kind of head."""
    parts = ["conv_depth"] if depth else ["bn", "conv_seg"]
    if other := [name for name in own if name.partition(".")[0] not in parts]:
        raise HeadError(
            f"{path} holds more than a linear head, such as {_PREFIX}{other[0]}: of DINOv2's heads the linear ones are "
            "read, not DPT or Mask2Former"
        )
    if not depth and (missing := [name for name in _NORM if f"bn.{name}" not in own]):
        raise HeadError(
            f"{path} lacks {_PREFIX}bn.{missing[0]}: DINOv2's segmentation heads have a BatchNorm before their "
            "convolution; save the head with it"
        )


def _published(path: Path, channels: int, depth: bool) -> dict[str, Any]:
    """What a published file is, by its channels and its name; says what the file leaves open."""
    layers = _layers_of(path, channels // (2 if depth else 1))
    found: dict[str, Any] = {"layers": layers}
    what = "the last block" if layers == 1 else "evenly spread blocks" if depth else "the last blocks"
    said = f"{layers} x {channels // layers // (2 if depth else 1)} channels of {what}"
    if depth:
        data = next((name for name in _RANGES if name in path.name.lower()), "")
        found["max_depth"] = _RANGES.get(data, _RANGES["nyu"])
        said += f", depths up to {found['max_depth']:g} m ({data or 'a guess: its name has neither nyu nor kitti'})"
    elif layers == 4:
        found |= {"last_blocks": True, "window": _LARGE_WINDOW, "stride": _LARGE_STRIDE}
    logger.info("%s says nothing of what it reads; taken as DINOv2's: %s", path, said)
    return found


def _layers_of(path: Path, channels: int) -> int:
    """1 or 4: how many blocks of a published encoder make `channels`; 1 if none does. HeadError if both may."""
    fitting = [layers for layers in (1, 4) if channels / layers in _WIDTHS.values()]
    if named := re.search(rf"vit([{''.join(_WIDTHS)}])", path.name.lower()):
        fitting = [layers for layers in fitting if channels == layers * _WIDTHS[named[1]]] or fitting
    if len(fitting) > 1:
        raise HeadError(
            f"{path} may read one block of {channels} channels or four of {channels // 4}, and neither its tensors nor "
            "its name say which: give it its published name, such as dinov2_vits14_nyu_linear4_head.pth"
        )
    return fitting[0] if fitting else 1


def _beside(path: Path) -> dict[str, Any]:
    """What the result beside NAME.head.safetensors, NAME.json, says of the head; empty where there is none."""
    result = path.with_name(f"{path.name.removesuffix('.head.safetensors')}.json")
    if not path.name.endswith(".head.safetensors") or not result.is_file():
        return {}
    try:
        found = json.loads(result.read_text())
        reading, options, recipe = found["reading"], found["options"], found["recipe"]
        known = {"layers": options["layers"], "projector": reading["projector"], "max_depth": options["max_depth"]}
        known |= {"window": recipe["size"], "stride": recipe["stride"]}
        if "architecture" in reading:
            known["with_cls"] = reading["architecture"]["cls_token"]
            known["patch_size"] = reading["architecture"]["patch_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HeadError(f"{result}, which belongs to {path}, cannot be read: {error}") from error
    return known
