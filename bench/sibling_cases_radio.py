"""Reference cases of RADIO's student: positions (CPE), windows, spectral reparametrisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.case import GRADIENT, Case, Check, compare
from bench.sibling_cases_teachers import run_radio
from dune_fast.kernels.nn.block import Block
from dune_fast.kernels.nn.draws import PositionDraws
from dune_fast.kernels.nn.radio import RADIOConfig, RADIOOptions, RADIOViT
from dune_fast.kernels.nn.radio_positions import (
    cropped_positions,
    resized_projection,
    resized_table,
    training_positions,
    whole_positions,
)
from dune_fast.kernels.nn.spectral import iterate_once
from dune_fast.kernels.nn.windows import drawn_window, window_period, windowed_outputs
from dune_fast.load import DistilledModel, load_encoder, load_model
from dune_fast.released_radio import SUMMARY
from dune_fast.teachers.containers import below, container_state, read_container


def run_cpe(case: Case) -> list[Check]:
    """`radio_cpe`: tokens before the first block, their gradients, in training by the case's own numbers."""
    info, state = case.info, case.under("state")
    patch = info["patch_size"]
    options = RADIOOptions(conditioner="", patch_bias=False, position_dropout=info.get("pos_dropout", 0.0))
    cropped = info.get("cpe_mode", True)
    cfg = RADIOConfig(
        image_size=info["table"][0] * patch, patch_size=patch, embed_dim=state["pos_embed"].shape[-1], depth=0,
        num_heads=1, num_registers=info["num_registers"], final_norm=False, num_cls=info["num_cls"], cropped=cropped,
        radio=options,
    )  # fmt: skip
    checks = []
    for i, grid in enumerate(info["grids"]):
        vit = RADIOViT(cfg)
        embedder = state["embedder.weight"].unflatten(1, (3, patch, patch))
        vit.load_state_dict(
            {"prefix_tokens": state["cls_token.token"][None], "pos_embed": state["pos_embed"],
             "patch_embed.proj.weight": embedder}
        )  # fmt: skip
        if info["mode"] == "train":
            draws = _draws(case, i, len(case[f"image{i}"]), info["video_frames"] or 1)
            positions = training_positions(vit.pos_embed, *grid, draws, options.position_dropout, cropped)
            vit.positions = lambda *grid, positions=positions: positions
        tokens = vit.embed(case[f"image{i}"])
        tokens.backward(case[f"tokens_grad{i}"])
        ours = {f"tokens{i}": tokens.detach()}
        if f"pos{i}" in case:
            table = cropped_positions if cropped else whole_positions
            ours[f"pos{i}"] = table(state["pos_embed"], *grid)
        checks += compare(ours, {name: case[name] for name in ours})
        found = {
            f"grad_pos{i}": vit.pos_embed.grad, f"grad_cls{i}": vit.prefix_tokens.grad[0],
            f"grad_embedder{i}": vit.patch_embed.proj.weight.grad.flatten(1),
        }  # fmt: skip
        gradients = {name: value for name, value in found.items() if name in case}
        checks += compare(gradients, {name: case[name] for name in gradients}, GRADIENT)
    return checks


def _draws(case: Case, i: int, images: int, frames: int) -> PositionDraws:
    """The case's uniform numbers, every clip's repeated for its frames; without a crop there is the dropout's alone."""
    found = {name: value.reshape(len(value), -1) for name, value in case.under(f"draw{i}").items()}
    clips = images // frames
    repeated = {
        name: found.get(name, torch.zeros(clips, columns)).repeat_interleave(frames, dim=0)
        for name, columns in (("scale", 1), ("aspect", 1), ("offset", 2))
    }
    return PositionDraws(repeated["scale"][:, 0], repeated["aspect"][:, 0], repeated["offset"], found["dropout"][:, 0])


def run_table_resize(case: Case) -> list[Check]:
    """`radio_table_resize`: positions and patch projection of other weights."""
    info = case.info
    source, target = info["source_patch"], info["target_patch"]
    ours = {
        "pos_out": resized_table(case["pos_in"], info["target_grid"][0]),
        "proj_out": resized_projection(case["proj_in"].unflatten(1, (3, source, source)), target).flatten(1),
    }
    return compare(ours, {name: case[name] for name in ours})


def run_vitdet_training(case: Case) -> list[Check]:
    """`radio_vitdet_training`: blocks with windows, summary tokens copied into each."""
    info, x = case.info, case["in"].clone().requires_grad_()
    depth = info["depth"]
    blocks = nn.ModuleList(Block(x.shape[-1], info["num_heads"], layer_scale=None) for _ in range(depth))
    blocks.load_state_dict(case.under("state"))
    period = window_period(depth, info["num_windowed"] or 0, info["num_global"] or 4)
    out = windowed_outputs(
        blocks, x, [depth - 1], info["num_prefix"], tuple(info["grid"]), info["window_size"], period, depth, True
    )[depth - 1]
    out.backward(case["out_grad"])
    checks = compare({"out": out.detach()}, {"out": case["out"]})
    checks += compare({"grad_in": x.grad}, {"grad_in": case["grad_in"]}, GRADIENT)
    gradients: dict[str, Tensor] = {name: parameter.grad for name, parameter in blocks.named_parameters()}
    return checks + compare(gradients, case.under("grad"), GRADIENT, "grad/")


def run_vitdet_draws(case: Case) -> list[Check]:
    """`radio_vitdet_draws`: the published generator's numbers through our rule; a run's come from Philox."""
    info, generator, windows = case.info, np.random.default_rng(42), []
    sizes, grid, probability = info["window_sizes"], tuple(info["grid"]), info["prob"]
    for _ in case["window"]:
        first = generator.random()
        second = 0.0 if first > probability else (generator.choice(len(sizes)) + 0.5) / len(sizes)
        windows.append(drawn_window(sizes, grid, probability, (first, second)))
    return compare({"window": torch.tensor(windows)}, {"window": case["window"]})


def run_model(case: Case) -> list[Check]:
    """`radio_model`: the backbone as a teacher's, all outputs of the loaded model, windows, and weights in training."""
    info, path = case.info, case.path.parent / case.info["file"]
    checks, model = run_radio(case), load_model(path)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.encoder.mean, model.encoder.std))
    for i, (height, width) in enumerate(info["images"]):
        x = (case[f"image{i}"] - mean) / std
        ours, rows = _outputs(model, x), height // info["patch_size"]
        for name, value in ours.items():
            checks += compare({name: value}, {name: case[f"out{i}/NLC/{name}"]}, under=f"out{i}/NLC/")
            if f"out{i}/NCHW/{name}" in case:  # rows and columns are the reader's own
                above = round((value.shape[1] / (height * width // info["patch_size"] ** 2)) ** 0.5)
                image = value if value.ndim == 2 else value.transpose(1, 2).unflatten(2, (rows * above, -1))
                checks += compare({name: image}, {name: case[f"out{i}/NCHW/{name}"]}, under=f"out{i}/NCHW/")
    if "windowed" in info:
        windows = info["windowed"]
        encoder = model.encoder.in_windows(
            windows["window_size"], windows["num_windowed"] or 0, windows["num_global"] or 4
        )
        found = encoder((case["windowed/image"] - mean) / std)
        ours = {"summary": found["x_norm_clstoken"], "features": found["x_norm_patchtokens"]}
        checks += compare(ours, case.under("windowed/backbone"), under="windowed/")
    if _reparametrized(path):
        checks += _spectral_training(case, path)
    return checks


def _outputs(model: DistilledModel, x: Tensor) -> dict[str, Tensor]:
    """Everything that a loaded container gives, by the names of the cases."""
    features, projections = model(x), model.projections(x, standardized=False)
    named = {"backbone/summary": features["x_norm_clstoken"], "backbone/features": features["x_norm_patchtokens"]}
    for name, tokens in projections.items():
        own = name.removesuffix(SUMMARY) if "cls" in tokens else name
        named |= {f"{own}/{'summary' if token == 'cls' else 'features'}": x for token, x in tokens.items()}
    return named


def _reparametrized(path: Path) -> bool:
    return any(".parametrizations." in key for key in container_state(read_container(path), path))


def _spectral_training(case: Case, path: Path) -> list[Check]:
    """The container's own gains and vectors in a network that trains: its first step iterates as the release does."""
    plain = load_encoder(path)
    versions = [key for key in container_state(read_container(path), path) if key.endswith("_sn_version")]
    cfg = dataclasses.replace(plain.cfg, radio=dataclasses.replace(plain.cfg.radio, spectral=2 if versions else 1))
    vit = RADIOViT(cfg)
    state = below(container_state(read_container(path), path), "base_model.")
    wanted = vit.state_dict()
    own = {key: value for key, value in state.items() if key in wanted}
    vit.load_state_dict(own | {key: value for key, value in plain.state_dict().items() if key in wanted})
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (plain.mean, plain.std))
    iterate_once(vit)
    found = vit((case["image0"] - mean) / std)
    ours = {"summary": found["x_norm_clstoken"].detach(), "features": found["x_norm_patchtokens"].detach()}
    return compare(ours, {name: case[f"out0/NLC/backbone/{name}"] for name in ours}, under="training/")


RUNNERS: dict[str, Callable[[Case], list[Check]]] = {
    "radio_cpe": run_cpe,
    "radio_table_resize": run_table_resize,
    "radio_vitdet_training": run_vitdet_training,
    "radio_vitdet_draws": run_vitdet_draws,
    "radio_model": run_model,
}
"""Kind of a case -> what recomputes it."""
