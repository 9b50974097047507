"""MASt3R's and DUNE-MASt3R's released files: containers that name the network in a string, which is parsed.

    MASt3R       {'args': Namespace(model="AsymmetricMASt3R(...)"), 'model': state}   the encoder is inside, not read
    DUNE-MASt3R  {'dune_backbone_name', 'mast3r_model_str', 'model': state}           names below `mast3r.`, and `norm`

Sizes are read off the tensors; the string says what they do not show: heads of the attention and modes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dune_fast.heads.head import HeadError
from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.teachers.containers import TeacherWeightsError, check_storage, is_state
from dune_fast.teachers.mast3r import parse_call
from dune_fast.teachers.weights import build_loaded

_STRING, _ENCODER = "mast3r_model_str", "dune_backbone_name"
_EXPECTED = {"pos_embed": "RoPE100", "head_type": "catmlp+dpt"}
"""The only values that are built here."""
_UNUSED = ("patch_embed.", "enc_norm.", "enc_blocks.", "mask_token", "prediction_head.")
"""Parts of the released network that are no part of decoder and heads."""
_BESIDE_DUNE = ("dune_backbone", "imagenet")
_HEAD = "downstream_head1."


def recognize(content: Mapping[str, Any]) -> bool:
    """Whether this is one of the two containers."""
    state = content.get("model")
    if _STRING in content:
        return True
    return is_state(state) and any(key.startswith("dec_blocks.") for key in state)


def read(content: Mapping[str, Any], path: Path) -> Mast3rHead:
    """The head of a container, float32, frozen, in evaluation mode.

    Args:
        content: what `teachers.containers.read_container` gives.
        path: for messages.

    Raises:
        TeacherWeightsError: damaged, another network's, or a variant that is not built here.
    """
    path = Path(path)
    state = content.get("model")
    if not is_state(state):
        raise TeacherWeightsError(f"{path} has no state dict under 'model'; get the file again")
    check_storage(state, path)
    dune = _STRING in content
    argument = _STRING if dune else "args.model"
    text = content[_STRING] if dune else getattr(content.get("args"), "model", None)
    if text is None:
        raise TeacherWeightsError(f"{path} has no 'args.model', which says how its decoder is built; get it again")
    said = parse_call(text, path, argument)
    norm: dict[str, Tensor] = {}
    if dune:
        norm = {key: value for key, value in state.items() if key.startswith("norm.")}
        state = _below_mast3r(state, path)
    state = head_state({key: value for key, value in state.items() if not key.startswith(_UNUSED)}, path)
    if not any(key.startswith("dec_blocks2.") for key in state):
        again = {key.replace("dec_blocks.", "dec_blocks2.", 1): value for key, value in state.items()}
        state |= {key: value for key, value in again.items() if key.startswith("dec_blocks2.")}
    encoder = content.get(_ENCODER)
    options = _options(said, state, path) | {
        "own_norm": dune, "encoder_name": encoder if isinstance(encoder, str) else "",
    }  # fmt: skip
    named = {f"decoder.{key}" if key.startswith("dec") else key: value for key, value in state.items()} | norm
    try:
        built = build_loaded(lambda: Mast3rHead(**options), named, path)
    except HeadError as error:
        raise TeacherWeightsError(f"{path}: {error}") from error
    assert isinstance(built, Mast3rHead)
    return built


def head_state(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Tensors of released heads without those that are there twice or unused; see `dpt`.

    TeacherWeightsError if the two of a pair differ.
    """
    kept = {}
    for key, value in state.items():
        if "scratch.refinenet4.resConfUnit1." in key:
            continue
        if twin := re.fullmatch(r"(.*scratch\.)layer([1-4])_rn\.weight", key):
            other = f"{twin[1]}layer_rn.{int(twin[2]) - 1}.weight"
            if other not in state:
                key = other
            elif not torch.equal(state[other], value):
                raise TeacherWeightsError(f"{path}: {key} and {other} are one tensor, and differ; get the file again")
            else:
                continue
        kept[key] = value
    return kept


def _below_mast3r(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors under `mast3r.`, without it; TeacherWeightsError for a name that no DUNE-MASt3R file has."""
    unknown = [key for key in state if not key.startswith(("mast3r.", "norm.", *_BESIDE_DUNE))]
    if unknown:
        raise TeacherWeightsError(f"{path} has the tensor {unknown[0]}, which no DUNE-MASt3R file has; get it again")
    return {key.removeprefix("mast3r."): value for key, value in state.items() if key.startswith("mast3r.")}


def _options(said: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The options of `Mast3rHead` that the string and the tensors tell; TeacherWeightsError if they disagree."""
    for key, value in _EXPECTED.items():
        if said.get(key, value) != value:
            raise TeacherWeightsError(f"{path} was made with {key}={said[key]!r}; {value!r} is supported")
    if f"{_HEAD}head_local_features.fc1.weight" not in state:
        raise TeacherWeightsError(
            f"{path} has no {_HEAD}head_local_features, which make descriptors: it is DUSt3R's or another network's; "
            "use MASt3R's file"
        )
    output = said.get("output_mode", "pts3d+desc24")
    desc = re.fullmatch(r"pts3d\+desc([1-9]\d{0,3})", output) if isinstance(output, str) else None
    if desc is None:
        raise TeacherWeightsError(f"{path} was made with output_mode={output!r}; pts3d+descN is supported")
    if "dec_num_heads" not in said:
        raise TeacherWeightsError(f"{path} does not say dec_num_heads, its decoder's attention heads; get it again")
    two_confs = said.get("two_confs", False)
    if type(two_confs) is not bool:
        raise TeacherWeightsError(f"{path} says two_confs={two_confs!r}; it is True or False")
    channels = int(desc[1]) + int(two_confs)
    dpt = f"{_HEAD}dpt."
    try:
        dim, width = state["decoder_embed.weight"].shape
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("dec_blocks."))
        hidden = state["dec_blocks.0.mlp.fc1.weight"].shape[0]
        layer_dims = [state[f"{dpt}act_postprocess.{i}.0.weight"].shape[0] for i in range(4)]
        feature_dim = state[f"{dpt}scratch.layer_rn.0.weight"].shape[0]
        last_dim = state[f"{dpt}head.0.weight"].shape[0]
        pixels = state[f"{_HEAD}head_local_features.fc2.weight"].shape[0] / channels
    except (KeyError, ValueError, IndexError) as error:
        raise TeacherWeightsError(f"{path} lacks a tensor that says a size, or its shape is wrong: {error}") from error
    if depth > sum(key.startswith("dec_blocks.") and key.endswith(".norm1.weight") for key in state):
        raise TeacherWeightsError(f"{path} has a block {depth - 1} of the decoder, but not all before it; get it again")
    patch = math.isqrt(int(pixels))
    if patch**2 != pixels:
        raise TeacherWeightsError(
            f"{path} gives {pixels:g} pixels a patch for {channels} channels, which is no square: its output_mode or "
            "two_confs is another network's"
        )
    for key, found in (("enc_embed_dim", width), ("dec_embed_dim", dim), ("dec_depth", depth)):
        if said.get(key, found) != found:
            raise TeacherWeightsError(f"{path} says {key}={said[key]!r}, but its tensors have {found}; get it again")
    return {
        "width": width, "patch_size": patch, "dec_dim": dim, "dec_depth": depth, "mlp_ratio": hidden / dim,
        "dec_heads": said["dec_num_heads"], "desc_dim": int(desc[1]), "layer_dims": layer_dims,
        "feature_dim": feature_dim, "last_dim": last_dim, "two_confs": two_confs,
        "depth_mode": said.get("depth_mode", ("exp", None, None)),
        "conf_mode": said.get("conf_mode", ("exp", 1, None)), "desc_conf_mode": said.get("desc_conf_mode"),
    }  # fmt: skip
