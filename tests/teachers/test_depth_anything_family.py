"""Depth Anything and its second version: numbers of the reference case and of transformers, and every mistake."""

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


def config(path, family="depth_anything", **fields):
    return TeacherConfig(
        **{"family": family, "weights": str(path), "patch_size": 8, "num_features": 5, "num_heads": 2,
           "token_types": ["patch"], **fields}
    )  # fmt: skip


def transformers_model(depth=4, stages=(1, 2, 3, 4)):
    """transformers' model with a backbone of 32 channels at 32 px."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=32, num_hidden_layers=depth, num_attention_heads=2, image_size=32, patch_size=8,
        out_indices=list(stages), apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    made = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 12, 16, 16], fusion_hidden_size=12,
        head_hidden_size=5, patch_size=8,
    )  # fmt: skip
    model = DepthAnythingForDepthEstimation(made).eval()
    draw = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        offset = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        value.copy_(torch.randn(value.shape, generator=draw) * 0.2 + offset)
    return model


def test_reference_case(reference_dir):
    checks = RUNNERS["depth_anything"](Case(reference_dir / "siblings" / "depth_anything.safetensors"))
    assert len(checks) == 6 and not [check for check in checks if not check.passed]


@pytest.mark.parametrize(
    ("family", "depth", "stages"),
    [
        ("depth_anything", 4, (1, 2, 3, 4)), ("depth_anything", 12, (9, 10, 11, 12)),
        ("depth_anything_v2", 12, (3, 6, 9, 12)),
    ],
)  # fmt: skip
def test_transformers_depth_anything(family, depth, stages, tmp_path):
    model = transformers_model(depth, stages)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    seen = []
    model.head.conv2.register_forward_hook(lambda module, args, out: seen.append(out))
    ensemble = TeacherEnsemble({"a": config(tmp_path / "w.safetensors", family)}, 8)
    for size in ((32, 32), (40, 56)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            model(images)
        feature = seen.pop()  # [B, 5, H, W]
        assert feature.shape[-2:] == size
        assert relative(ensemble.trunks[0].vit(images).detach(), feature) < TOLERANCE
        tokens = ensemble(images)["a"]["patch"]
        assert relative(tokens, feature[:, :, ::8, ::8].flatten(2).transpose(1, 2)) < TOLERANCE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": 2}, "leave layer null and norm true"),
        ({"norm": False}, "leave layer null and norm true"),
        ({"token_types": ["cls"]}, "has patch only"),
        ({"num_features": 32}, r"num_features is 32, but the weights .* have 5"),
        ({"weights": "random:0", "num_heads": None, "image_size": 32}, "num_heads must be one of 6, 12, 16"),
    ],
)
def test_wrong_configuration(fields, message, tmp_path):
    save_file(transformers_model().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=message):
        TeacherEnsemble({"a": config(tmp_path / "w.safetensors", **fields)}, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neck.convs.2.weight": None}, "convs.2.weight is missing"),
        ({"head.conv2.weight": torch.zeros(5)}, "head.conv2.weight is missing or no convolution's"),
        ({"neck.fusion_stage.layers.1.projection.bias": None}, "fusion.1.projection.bias is missing"),
        ({"neck.reassemble_stage.layers.3.resize.weight": torch.zeros(16, 16, 2, 2)}, r"has shape \[16, 16, 2, 2\]"),
        ({"neck.reassemble_stage.layers.0.readout.weight": torch.zeros(2)}, "readout.weight is not known"),
    ],
)
def test_a_file_that_does_not_fit(change, message, tmp_path):
    state = {**transformers_model().state_dict(), **change}
    save_file({k: v for k, v in state.items() if v is not None}, tmp_path / "w.safetensors")
    with pytest.raises(TeacherWeightsError, match=message):
        build_teacher("a", config(tmp_path / "w.safetensors"))


def test_a_backbone_of_three_blocks_is_too_shallow(tmp_path):
    state = {k: v for k, v in transformers_model().state_dict().items() if ".layer.3." not in k}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(TeacherWeightsError, match="has 3 blocks; Depth Anything's head reads four"):
        build_teacher("a", config(tmp_path / "w.safetensors"))
