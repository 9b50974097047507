"""Released Multi-HMR files: `{'model_state_dict': ..., 'args': Namespace}`, of which the head is read here.

The encoder in them is read by `dune_fast.teachers.multihmr`. Files for the body model Anny hold another architecture.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dune_fast.heads.head import HeadError
from dune_fast.heads.multihmr.head import MultiHmrHead
from dune_fast.heads.multihmr.hph import NUM_EXPRESSION, NUM_ROTATIONS
from dune_fast.teachers.containers import TeacherWeightsError, container_state
from dune_fast.teachers.weights import build_loaded

_PARTS = ("mlp_classif.", "mlp_offset.", "x_attention_head.")
_UNUSED = "x_attention_head.init_betas_kid"
_SIGN = "x_attention_head.cross_queries_x"
_LAYER = "x_attention_head.transformer.transformer.layers."
_PATCH = 14


def recognize(content: Mapping[str, Any]) -> bool:
    """Whether a container, see `teachers.containers.read_container`, is a Multi-HMR."""
    return any(_SIGN in state for state in (content, content.get("model_state_dict")) if isinstance(state, Mapping))


def read(content: Mapping[str, Any], path: Path) -> MultiHmrHead:
    """The head of a released file, float32.

    HeadError for files of another architecture, HeadError or TeacherWeightsError for those whose tensors do not fit one
    another.
    """
    args = content.get("args")
    args = dict(vars(args)) if isinstance(args, Namespace) else dict(args) if isinstance(args, Mapping) else {}
    state = head_state(container_state(content, path))
    body = str(args.get("train_return_type", "smplx"))
    if "anny" in f"{body} {args.get('body_model', '')} {path.stem}".lower() or any("anny" in key for key in state):
        raise HeadError(
            f"{path} is a Multi-HMR for the body model Anny, another architecture, which is not read here: take a "
            "release for SMPL-X, such as multiHMR_896_L"
        )
    if body != "smplx":
        raise HeadError(f"{path} predicts {body!r} bodies, this head SMPL-X: take a release for SMPL-X")
    try:
        options = options_of(state, args)
        head = build_loaded(lambda: MultiHmrHead(**options), state, path)
    except TeacherWeightsError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise HeadError(f"{path} is not a Multi-HMR head as published: {reason}; get the file again") from error
    assert isinstance(head, MultiHmrHead)
    return head


def head_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's tensors in float32, without the encoder, the body model and what nothing reads."""
    return {k: v.float() for k, v in state.items() if k.startswith(_PARTS) and k != _UNUSED and _in_head(k)}


def _in_head(key: str) -> bool:
    """Whether a name has a place in the head: releases hold others, which are ignored."""
    names = ("transformer.", "cross_queries_", "cross_values_", "init_", "decpose.", "decshape.", "deccam.",
             "decexpression.")  # fmt: skip
    inner = key.removeprefix("x_attention_head.")
    return inner == key or inner.startswith(names)


def options_of(state: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `MultiHmrHead`: sizes by the tensors' shapes, the rest by `args` or as published."""
    grid, context_dim = state[_SIGN].shape
    width = state["mlp_classif.0.weight"].shape[1]
    depth = 1 + max(int(key.removeprefix(_LAYER).split(".")[0]) for key in state if key.startswith(_LAYER))
    if depth > sum(key.startswith(_LAYER) for key in state):
        raise ValueError(f"it has a layer {depth - 1} of the transformer, but not all before it")
    heads = int(args.get("xat_num_heads", 8))
    inner, dim = state[f"{_LAYER}0.1.fn.to_q.weight"].shape
    if inner % heads:
        raise ValueError(f"xat_num_heads {heads} does not divide {inner} channels")
    size = args.get("img_size", grid * _PATCH)
    size = int(size[0] if isinstance(size, (list, tuple)) else size)
    if size != grid * _PATCH:
        raise ValueError(f"img_size {size} has not the {grid} patches a side of its tables")
    if state["x_attention_head.decpose.weight"].shape[0] != 6 * NUM_ROTATIONS:
        raise ValueError(f"decpose is not for {NUM_ROTATIONS} rotations")
    if state["x_attention_head.decexpression.weight"].shape[0] != NUM_EXPRESSION:
        raise ValueError(f"decexpression is not for {NUM_EXPRESSION} coefficients")
    camera = args.get("camera_embedding", "geometric" if context_dim > width else None)
    if camera not in ("geometric", None):
        raise ValueError(f"camera_embedding {camera!r} is unknown")
    bands = int(args.get("camera_embedding_num_bands", 16))
    if context_dim != width + (3 + 6 * bands if camera else 0):
        raise ValueError(f"tables of {context_dim} channels are not for {width} and {bands} bands")
    return {
        "width": width, "image_size": size, "patch_size": _PATCH, "depth": depth, "heads": heads,
        "num_betas": state["x_attention_head.decshape.weight"].shape[0], "head_dim": inner // heads, "dim": dim,
        "hidden": state[f"{_LAYER}0.2.fn.net.0.weight"].shape[0], "camera": camera is not None,
        "bands": bands, "max_resolution": int(args.get("camera_embedding_max_resolution", 64)),
        "nearness": bool(args.get("nearness", True)), "center": str(args.get("person_center", "head")),
    }  # fmt: skip
