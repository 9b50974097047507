"""DINOv3 and EUPE: numbers of the reference cases and of transformers, both layouts, and every mistake."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from bench.case import Case
from bench.cases import RUNNERS
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.registry import build_teacher

TOLERANCE = 1e-5  # float32; two orders of summation


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def config(path, family="dinov3", **fields):
    return TeacherConfig(
        **{"family": family, "weights": str(path), "patch_size": 8, "num_features": 32, "num_heads": 2, **fields}
    )


def transformers_model(gated):
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu"}
    made = DINOv3ViTConfig(**sizes, image_size=32, patch_size=8, num_register_tokens=4)
    model = DINOv3ViTModel(made).eval()
    draw = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        offset = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        value.copy_(torch.randn(value.shape, generator=draw) * 0.2 + offset)
    return model


def released(state, gated):
    """transformers' tensors as the release has them: packed qkv with a mask of its bias, angles' periods."""
    found = {
        "cls_token": state["embeddings.cls_token"], "storage_tokens": state["embeddings.register_tokens"],
        "mask_token": state["embeddings.mask_token"][0], "rope_embed.periods": 100.0 ** (torch.arange(4) / 4),
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.bias"],
        "norm.weight": state["norm.weight"], "norm.bias": state["norm.bias"],
        "local_cls_norm.weight": torch.ones(32), "local_cls_norm.bias": torch.zeros(32),
    }  # fmt: skip
    mlp = ("gate_proj", "up_proj", "down_proj") if gated else ("up_proj", "down_proj")
    ours = ("w1", "w2", "w3") if gated else ("fc1", "fc2")
    for i in range(3):
        theirs, block = f"model.layer.{i}.", f"blocks.{i}."
        q, k, v = (state[f"{theirs}attention.{x}_proj.weight"] for x in "qkv")
        found[f"{block}attn.qkv.weight"] = torch.cat([q, k, v])
        q, v = (state[f"{theirs}attention.{x}_proj.bias"] for x in "qv")
        found[f"{block}attn.qkv.bias"] = torch.cat([q, torch.full_like(q, 7.0), v])  # masked, whatever it is
        found[f"{block}attn.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(32)
        for kind in ("weight", "bias"):
            found[f"{block}attn.proj.{kind}"] = state[f"{theirs}attention.o_proj.{kind}"]
            for norm in ("norm1", "norm2"):
                found[f"{block}{norm}.{kind}"] = state[f"{theirs}{norm}.{kind}"]
            for ours_, theirs_ in zip(ours, mlp, strict=True):
                found[f"{block}mlp.{ours_}.{kind}"] = state[f"{theirs}mlp.{theirs_}.{kind}"]
        for n in (1, 2):
            found[f"{block}ls{n}.gamma"] = state[f"{theirs}layer_scale{n}.lambda1"]
    return {key: value.clone() for key, value in found.items()}


@pytest.mark.parametrize("name", ["eupe_tiny", "dinov3_tiny_swiglu"])
def test_reference_case(reference_dir, name):
    checks = RUNNERS["dinov3_vit"](Case(reference_dir / "siblings" / f"{name}.safetensors"))
    assert len(checks) >= 6 and not [check for check in checks if not check.passed]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("layout", ["release", "transformers", "published"])
def test_transformers_dinov3(gated, layout, tmp_path):
    model = transformers_model(gated)
    state = model.state_dict()
    if layout == "release":
        torch.save(released(state, gated), tmp_path / "w.pth")
    elif layout == "published":  # without the prefix that newer versions put there
        state = {key.removeprefix("model."): value for key, value in state.items()}
    path = tmp_path / ("w.pth" if layout == "release" else "w.safetensors")
    if layout != "release":
        save_file(state, path)
    images = torch.randn(2, 3, 40, 24)
    teachers = {name: config(path, family, num_registers=4) for name, family in (("a", "dinov3"), ("b", "eupe"))}
    ours = TeacherEnsemble(teachers, 8)(images)
    with torch.no_grad():
        theirs = model(images).last_hidden_state
    for tokens in ours.values():
        assert relative(tokens["cls"], theirs[:, 0]) < TOLERANCE
        assert relative(tokens["patch"], theirs[:, 5:]) < TOLERANCE


def test_rotation_leaves_cls_and_storage_tokens_alone(tmp_path):
    """A patch's angles are those of its centre: a grid twice as fine has its outermost centres further out."""
    torch.save(released(transformers_model(False).state_dict(), False), tmp_path / "w.pth")
    vit = build_teacher("a", config(tmp_path / "w.pth")).trunk.vit
    cos, sin = vit.rope(torch.zeros(1, 3, 16, 8))
    assert cos.shape == (5 + 2, 2, 4)
    assert torch.equal(cos[:5], torch.ones(5, 2, 4)) and not sin[:5].any()
    expected = 2 * torch.pi * torch.tensor([-0.5, 0.5])[:, None] / 100.0 ** (torch.arange(4) / 4)
    torch.testing.assert_close(sin[5:, 0], expected.sin())
    assert not sin[5:, 1].abs().max() > 1e-6  # one column: its centre is 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.attn.qkv.bias": None}, "bias_mask has no blocks.1.attn.qkv.bias"),
        ({"blocks.1.attn.qkv.bias_mask": torch.ones(4)}, "bias_mask has no blocks.1.attn.qkv.bias of its shape"),
        ({"blocks.1.attn.qkv.weight": torch.zeros(5, 32)}, r"qkv.weight has shape \[5, 32\]"),
        ({"storage_tokens": torch.zeros(1, 2, 32)}, "num_registers is 4, but .* has 2"),
        ({"rope_embed.periods": torch.ones(3)}, r"rope_periods has shape \[3\]"),
        ({"pos_embed": torch.zeros(1, 5, 32)}, "pos_embed is not known"),
    ],
)
def test_a_file_that_does_not_fit(change, message, tmp_path):
    state = released(transformers_model(False).state_dict(), False) | change
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match=message):
        build_teacher("a", config(tmp_path / "w.pth", num_registers=4))


def test_half_a_gated_mlp_is_named(tmp_path):
    state = released(transformers_model(True).state_dict(), True)
    del state["blocks.2.mlp.w2.bias"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match=r"lacks the tensor blocks\.2\.mlp\.w2\.bias"):
        build_teacher("a", config(tmp_path / "w.pth"))


def test_heads_that_rope_cannot_turn_are_refused(tmp_path):
    torch.save(released(transformers_model(False).state_dict(), False), tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match="16 heads of 2 channels, no multiple of 4; give num_heads"):
        build_teacher("a", config(tmp_path / "w.pth", num_heads=16))
