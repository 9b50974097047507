"""Other weights for a student of RADIO's family: RADIO's own, or those of a plain ViT.

Position table and patch projection are resized bicubically, corners aligned. What RADIO's network has not is worked in
(LayerScale) or left out (a final norm). Every summary token starts as a plain ViT's cls token with its position, the
registers as its registers; those of RADIO's own keep to their kind. What the source has not keeps its initial weights.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from dune_fast.kernels.nn.radio import RADIOViT
from dune_fast.kernels.nn.radio_positions import resized_projection, resized_table
from dune_fast.teachers.radio import plain_weights

_TABLE, _PROJECTION, _TOKENS = "pos_embed", "patch_embed.proj", "prefix_tokens"
_LAST = {"ls1.gamma": ("attn.proj",), "ls2.gamma": ("mlp.fc2", "mlp.w3")}
"""LayerScale -> the layers that it may come after."""
_ORIGINAL = ".parametrizations.weight.original"
STARTED_ANEW = "gains of the spectral reparametrisation started anew"
"""Said where the student is reparametrised and the weights are plain: `start_spectral` has to follow."""


@torch.no_grad()
def fitted_to_radio(
    source: dict[str, Tensor], vit: RADIOViT, path: Path, summaries: int | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of an encoder by the student's names, and sentences on what was not taken as it stands.

    `summaries`: how many of the source's own tokens are summary tokens, where it is of RADIO's family; None for as many
    as the student's.

    What fits in no way stays as it is: the comparison with the student's own tensors says what is wrong with it.
    """
    state, said = dict(source), []
    wanted, cfg = vit.state_dict(), vit.cfg
    if any(_ORIGINAL in key for key in state):
        version = 2 if any(key.endswith("._sn_version") for key in state) else 1
        scaled = cfg.layer_scale is None and any(key.endswith(tuple(_LAST)) for key in state)
        if cfg.radio.spectral != version or scaled:  # a gain per channel is none of a whole weight's
            state = plain_weights(state, path)
            said.append("spectral reparametrisation worked into the weights")
    for name in ("mask_token", "feature_mean", "feature_matrix"):
        state.pop(name, None)
    cls, registers = state.pop("cls_token", None), state.pop("register_tokens", None)
    if cls is not None and state[_TABLE].ndim == 3:
        cls, state[_TABLE] = cls + state[_TABLE][:, :1], state[_TABLE][:, 1:]
    table, kernel = state.get(_TABLE), state.get(f"{_PROJECTION}.weight")
    if table is not None and table.ndim == 3 and 0 < table.shape[1] == math.isqrt(table.shape[1]) ** 2:
        state[_TABLE] = resized_table(table, cfg.table_side)
        if state[_TABLE].shape != table.shape:
            said.append(f"positions resized from {table.shape[1]} to {cfg.table_side**2} patches")
    if kernel is not None and kernel.ndim == 4:
        state[f"{_PROJECTION}.weight"] = resized_projection(kernel, cfg.patch_size)
        if kernel.shape[-1] != cfg.patch_size:
            said.append(f"patch projection resized from {kernel.shape[-1]} to {cfg.patch_size} pixels")
    bias = state.get(f"{_PROJECTION}.bias")
    if bias is not None and f"{_PROJECTION}.bias" not in wanted:
        del state[f"{_PROJECTION}.bias"]
        said += ["the bias of the patch projection left out"] if bias.any() else []
    elif bias is None and f"{_PROJECTION}.bias" in wanted:
        state[f"{_PROJECTION}.bias"] = torch.zeros(cfg.embed_dim)
    if not cfg.final_norm and any([state.pop(f"norm.{kind}", None) is not None for kind in ("weight", "bias")]):
        said.append("the final norm left out")
    if cfg.layer_scale is None and (count := _work_in_layer_scale(state)):
        said.append(f"{count} LayerScales worked into the layers before them")
    given, count = state.get(_TOKENS), vit.num_cls if summaries is None else summaries
    if given is not None and given.ndim == 3 and count != vit.num_cls and given.shape[-1] == cfg.embed_dim:
        cls, registers = given[:, :count], given[:, count:]
        state[_TOKENS] = tokens = wanted[_TOKENS].clone()
        kept, more = min(count, vit.num_cls), min(registers.shape[1], cfg.num_registers)
        tokens[:, :kept] = cls[:, :kept]
        tokens[:, vit.num_cls : vit.num_cls + more] = registers[:, :more]
        said.append(f"{kept} of {count} summary tokens taken, and {more} of {registers.shape[1]} registers")
        if drawn := tokens.shape[1] - kept - more:
            said.append(f"{drawn} summary tokens and registers drawn, the source has not as many")
    elif _TOKENS not in state or state[_TOKENS].shape != wanted[_TOKENS].shape:
        state[_TOKENS] = tokens = wanted[_TOKENS].clone()
        taken = 0
        if cls is not None and cls.shape == tokens[:, :1].shape:
            tokens[:, : vit.num_cls], taken = cls, vit.num_cls
            said.append(f"the cls token taken for each of {vit.num_cls} summary tokens")
        if taken and registers is not None and registers.shape[-1] == cfg.embed_dim:
            count = min(registers.shape[1], tokens.shape[1] - taken)
            tokens[:, taken : taken + count], taken = registers[:, :count], taken + count
        if drawn := tokens.shape[1] - taken:
            said.append(f"{drawn} summary tokens and registers drawn, the source has not as many")
    if cfg.radio.spectral and not any(_ORIGINAL in key for key in state):
        reparametrized = {key.removesuffix(_ORIGINAL) for key in wanted if key.endswith(_ORIGINAL)}
        for layer in reparametrized & {key.removesuffix(".weight") for key in state}:
            state[f"{layer}{_ORIGINAL}"] = state.pop(f"{layer}.weight")
        state |= {key: value for key, value in wanted.items() if ".parametrizations.weight.0." in key}
        said.append(STARTED_ANEW)
    return state, said


def _work_in_layer_scale(state: dict[str, Tensor]) -> int:
    """Takes every gamma out and multiplies the layer before it by it; how many there were."""
    gammas = [key for key in state if key.endswith(tuple(_LAST))]
    for key in gammas:
        block, part = key.split(".ls", 1)[0], "ls" + key.rsplit(".ls", 1)[1]
        gamma = state.pop(key)
        for name in (f"{block}.{layer}.{kind}" for layer in _LAST[part] for kind in ("weight", "bias")):
            if name in state and len(state[name]) == len(gamma):
                state[name] = state[name] * (gamma[:, None] if state[name].ndim == 2 else gamma)
    return len(gammas)
