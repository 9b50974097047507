"""Published checkpoints: what is missing is an error, what could run code is refused."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dune_fast
from dune_fast.engine.warm_start import warm_start
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.released import load_released
from dune_fast.student import build_student
from dune_fast.teachers.architecture import random_vit_state
from dune_fast.teachers.containers import read_container
from dune_fast.teachers.weights import TeacherWeightsError


@pytest.fixture
def container(reference_dir):
    return read_container(reference_dir / "checkpoint" / "official_ddp.pth")


def test_compiled_and_unwrapped_names_load_too(container, tmp_path):
    model = {k.replace("module.", "module._orig_mod."): v for k, v in container["model"].items()}
    model["module.something_else.weight"] = torch.zeros(1)
    torch.save({"model": model, "args": container["args"], "epoch": 3}, tmp_path / "compiled.pth")
    student, statistics = load_released(tmp_path / "compiled.pth")
    assert student.encoder.cfg.depth == 12 and len(list(statistics.buffers())) == 8


def test_a_missing_tensor_is_named(container, tmp_path):
    del container["model"]["module.encoder.blocks.0.3.attn.proj.bias"]
    torch.save(container, tmp_path / "short.pth")
    with pytest.raises(TeacherWeightsError, match="blocks.3.attn.proj.bias is missing"):
        load_released(tmp_path / "short.pth")


def test_another_kind_of_checkpoint_is_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(TeacherWeightsError, match="not a DUNE checkpoint"):
        load_released(tmp_path / "other.pth")


def block(x, state, name, heads):
    """A pre-norm block in plain torch, with whatever of norms' weights, qkv bias and LayerScale the state has."""
    dim, get = x.shape[-1], lambda key: state.get(f"{name}.{key}")
    norm = lambda x, n: F.layer_norm(x, (dim,), get(f"{n}.weight"), get(f"{n}.bias"), 1e-6)  # noqa: E731
    gain = lambda y, n: y if get(f"{n}.gamma") is None else y * get(f"{n}.gamma")  # noqa: E731
    qkv = F.linear(norm(x, "norm1"), get("attn.qkv.weight"), get("attn.qkv.bias"))
    q, k, v = qkv.unflatten(-1, (3, heads, dim // heads)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + gain(F.linear(out, get("attn.proj.weight"), get("attn.proj.bias")), "ls1")
    hidden = F.gelu(F.linear(norm(x, "norm2"), get("mlp.fc1.weight"), get("mlp.fc1.bias")))
    return x + gain(F.linear(hidden, get("mlp.fc2.weight"), get("mlp.fc2.bias")), "ls2")


def published(options: dict, enc_args: dict | None = None) -> dict:
    """A container as the published trainer writes it, optimizer and all, of a small encoder with these `proj_args`."""
    dim, count = 64, options.get("num_blocks", 1)
    encoder = random_vit_state(ViTConfig(image_size=28, embed_dim=dim, depth=2, num_heads=1), 1)
    blocks = random_vit_state(ViTConfig(image_size=28, embed_dim=dim, depth=count, num_heads=1), 2)
    projector = {key: value for key, value in blocks.items() if key.startswith("blocks.")}
    projector |= {"linear.weight": torch.randn(24, dim), "linear.bias": torch.randn(24)}
    if options.get("scale") == 0.0:
        projector["scale"] = torch.tensor([1.7])
    for state, chosen in ((projector, options), (encoder, enc_args or {})):
        if not chosen.get("qkv_bias", True):
            [state.pop(key) for key in list(state) if key.endswith("qkv.bias")]
        if not chosen.get("ln_affine", True):
            [state.pop(key) for key in list(state) if "norm" in key]
        if not chosen.get("layerscale_init", 1e-4):
            [state.pop(key) for key in list(state) if key.endswith("gamma")]
    model = {f"module.encoder.{k.replace('blocks.', 'blocks.0.')}": v for k, v in encoder.items()}
    model |= {f"module.projectors.a.{k}": v for k, v in projector.items()}
    norms = [f"{token}.{kind}" for token in ("cls", "patch") for kind in ("mean", "std")]
    model |= {f"module.teacher_norms.a.normalizers.{name}": torch.ones(24) for name in norms}
    model["module.encoder.mask_token"] = torch.zeros(1, dim)
    args = argparse.Namespace(
        image_size=28, enc_args=enc_args or {}, proj_args={**options, "num_heads": 1}, teachers=["a"],
        dune_args="{'last_enc_norm':False}", lr_schedule=np.linspace(0, 1e-3, 4),
    )  # fmt: skip
    optimizer = {"param_groups": [{"lr": args.lr_schedule[2], "params": [0]}], "state": {}}  # a numpy scalar
    return {"model": model, "optimizer": optimizer, "iter": 3, "args": args}


OPTIONS = [
    {}, {"num_blocks": 2}, {"scale": 0.3}, {"scale": 0.0}, {"qkv_bias": False}, {"ln_affine": False},
    {"layerscale_init": 0.0}, {"num_blocks": 3, "scale": 2.0, "qkv_bias": False, "ln_affine": False},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_projectors_of_every_option_compute_what_torch_does(options, tmp_path):
    """Blocks beyond the first and the scale were left out without a word: off by up to 2.7 of the maximum."""
    content = published(options)
    torch.save(content, tmp_path / "w.pth")
    student, _ = load_released(tmp_path / "w.pth")
    images = torch.randn(2, 3, 28, 28)
    state = {k.removeprefix("module.projectors.a."): v for k, v in content["model"].items() if ".projectors." in k}
    with torch.no_grad():
        x = student.tokens(images)[1]
        for i in range(options.get("num_blocks", 1)):
            x = block(x, state, f"blocks.{i}", 1)
        scale = state["scale"] if options.get("scale") == 0.0 else options.get("scale", 1.0)
        expected = scale * F.linear(x, state["linear.weight"], state["linear.bias"])
        ours = student(images)["a"]
    torch.testing.assert_close(ours["cls"], expected[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours["patch"], expected[:, 1:], rtol=1e-4, atol=1e-4)
    other = build_student(student.encoder.cfg, infer(options), {"a": (24, ("cls", "patch"))}, 5)
    assert warm_start(other, str(tmp_path / "w.pth")).projectors == ["a"]
    with torch.no_grad():
        torch.testing.assert_close(other(images)["a"], ours)


def infer(options: dict) -> ProjectorConfig:
    gain = 1e-4 if options.get("layerscale_init", 1e-4) else None
    return ProjectorConfig(num_blocks=options.get("num_blocks", 1), layer_scale=gain)


@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"ln_affine": False}, {"layerscale_init": 0.0}], ids=str)
def test_encoders_of_every_option_compute_what_torch_does(options, tmp_path):
    content = published({}, options)
    torch.save(content, tmp_path / "w.pth")
    for encoder in (dune_fast.load_encoder(tmp_path / "w.pth"), load_released(tmp_path / "w.pth")[0].encoder):
        images = torch.randn(2, 3, 28, 28)
        state = {k.removeprefix("module.encoder."): v for k, v in content["model"].items() if ".encoder." in k}
        with torch.no_grad():
            x = encoder.embed(images)
            for i in range(2):
                x = block(x, state, f"blocks.0.{i}", 1)
            torch.testing.assert_close(encoder(images)["x_prenorm"], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["args"].proj_args.update(drop_path=0.1), "proj_args drop_path, which are not known here"),
        (lambda c: c["args"].enc_args.update(window=3), "enc_args window, which are not known here"),
        (lambda c: c["args"].proj_args.update(num_blocks=2), "has 1 blocks, its proj_args say num_blocks=2"),
        (lambda c: c["args"].proj_args.update(scale=0.0), "lacks projectors.a.scale"),
        (lambda c: c["model"].update({"module.projectors.a.neck.weight": torch.ones(1)}), "neck.weight is not known"),
        (lambda c: c["model"].update({"module.encoder.blocks.0.0.attn.q_norm.weight": torch.ones(1)}), "q_norm"),
    ],
)
def test_options_and_tensors_that_are_not_known_are_refused(change, words, tmp_path):
    content = published({})
    change(content)
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match=words):
        load_released(tmp_path / "w.pth")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TeacherWeightsError, match="there is no checkpoint"):
        load_released(tmp_path / "nothing.pth")
