"""Linear heads as DINOv2's authors publish them, and as `dune-fast evaluate` has written them before heads had options.

Such a file holds tensors alone: `decode_head.conv_seg.*` with `decode_head.bn.*`, or `decode_head.conv_depth.*`. What
they do not say is taken from the result that `evaluate` has left beside its file, else it is the published heads': the
last block of an encoder with a class token and patches of 14 px, depths up to 10 m.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dune_fast.heads.head import HeadError
from dune_fast.heads.linear.depth import DEPTH_BINS, DepthHead
from dune_fast.heads.linear.layers import LinearHead
from dune_fast.heads.linear.segmentation import SegmentationHead
from dune_fast.teachers.containers import below, container_state, is_state
from dune_fast.teachers.weights import build_loaded

_PREFIX = "decode_head."
_UNUSED = (f"{_PREFIX}conv_seg.",)  # of DINOv2's depth files: mmseg makes it, nothing reads it


def recognize(content: Mapping[str, Any]) -> bool:
    """Whether a container holds a linear head."""
    state = content if is_state(content) else content.get("state_dict")
    return is_state(state) and any(f"{_PREFIX}{name}.weight" in state for name in ("conv_seg", "conv_depth"))


def read(content: Mapping[str, Any], path: Path) -> LinearHead:
    """The head of such a container. HeadError or TeacherWeightsError if it is damaged or of another shape."""
    state = container_state(content, path)
    depth = f"{_PREFIX}conv_depth.weight" in state
    weight = state[f"{_PREFIX}conv_{'depth' if depth else 'seg'}.weight"]
    if weight.ndim != 4 or weight.shape[2:] != (1, 1) or (depth and weight.shape[0] != DEPTH_BINS):
        raise HeadError(f"{path} is no linear head: its convolution has weights of shape {list(weight.shape)}")
    outputs, channels = weight.shape[:2]
    known = _beside(path)
    layers, with_cls = known.get("layers", 1), known.get("with_cls", True)
    parts = layers * (1 + (depth and with_cls))
    if channels % parts:
        raise HeadError(f"{path} reads {channels} channels, which are not those of {parts} equal parts")
    how = {key: known[key] for key in ("patch_size", "projector", "window", "stride", "max_depth") if key in known}
    if depth:
        how = {key: value for key, value in how.items() if key not in ("window", "stride")}
        state = {key: value for key, value in state.items() if not key.startswith(_UNUSED)}
    else:
        how.pop("max_depth", None)

    def build() -> LinearHead:
        if depth:
            return DepthHead(channels // parts, layers=layers, with_cls=with_cls, **how)
        return SegmentationHead(channels // parts, outputs, layers=layers, **how)

    return build_loaded(build, below(state, _PREFIX), path)


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
