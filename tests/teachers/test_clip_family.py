"""CLIP and OpenCLIP: numbers of the reference cases, of transformers and of timm, and every mistake."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from bench.case import Case
from bench.cases import RUNNERS
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.registry import build_teacher

TOLERANCE = 1e-5  # float32; two orders of summation


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def drawn(model):
    """The model with every weight drawn, norms' too."""
    draw = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            offset = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            value.copy_(torch.randn(value.shape, generator=draw) * 0.2 + offset)
    return model.eval()


def config(path, family="clip", **fields):
    """Images go in as they are: ImageNet's statistics, and the student's patch is the teacher's."""
    return TeacherConfig(
        **{"family": family, "weights": str(path), "patch_size": 8, "num_features": 32, "num_heads": 2,
           "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), **fields}
    )  # fmt: skip


@pytest.fixture
def clip(tmp_path):
    """(transformers' model, file) of a CLIP of three blocks at 32 px."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    made = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=12, hidden_act="quick_gelu")
    model = drawn(CLIPVisionModelWithProjection(made))
    text = {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    save_file({**model.state_dict(), **text}, tmp_path / "model.safetensors")
    return model, tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", ["clip_vision", "open_clip_visual"])
def test_reference_case(reference_dir, name):
    case = Case(reference_dir / "siblings" / f"{name}.safetensors")
    checks = RUNNERS[case.kind](case)
    assert len(checks) >= 2 and not [check for check in checks if not check.passed]


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_transformers_clip(clip, size):
    """Regression for the readings that Theia (before the norm) and RADIO (the projection) take, in one pass."""
    model, path = clip
    images = torch.randn(2, 3, *size)
    configs = {
        "both": config(path), "raw": config(path, token_types=["patch"], norm=False),
        "embeds": config(path, token_types=["cls"], projected=True, num_features=12),
    }  # fmt: skip
    ensemble = TeacherEnsemble(configs, 8)
    assert len(ensemble.trunks) == 1
    ours = ensemble(images)
    with torch.no_grad():
        theirs = model(images, interpolate_pos_encoding=True)
        last = theirs.last_hidden_state
        normed = model.vision_model.post_layernorm(last)
    assert relative(ours["raw"]["patch"], last[:, 1:]) < TOLERANCE
    assert relative(ours["both"]["cls"], normed[:, 0]) < TOLERANCE
    assert relative(ours["both"]["patch"], normed[:, 1:]) < TOLERANCE
    assert relative(ours["embeds"]["cls"], theirs.image_embeds) < TOLERANCE


def open_clip_names(state):
    """timm's names to OpenCLIP's."""
    renames = (
        ("patch_embed.proj.", "conv1."), ("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"),
        ("norm_pre.", "ln_pre."), ("blocks.", "transformer.resblocks."), (".norm1.", ".ln_1."), (".norm2.", ".ln_2."),
        (".attn.qkv.", ".attn.in_proj_"), (".attn.proj.", ".attn.out_proj."), (".mlp.fc1.", ".mlp.c_fc."),
        (".mlp.fc2.", ".mlp.c_proj."),
    )  # fmt: skip
    found = {}
    for key, value in state.items():
        if key == "head.weight":
            found["visual.proj"] = value.t().contiguous()
        elif key != "head.bias":
            key = "ln_post." + key.removeprefix("norm.") if key.startswith("norm.") else key
            for old, new in renames:
                key = key.replace(old, new)
            tables = ("class_embedding", "positional_embedding")
            found[f"visual.{key}"] = value.reshape(-1, value.shape[-1]).squeeze(0) if key in tables else value
    return found


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_timm_under_open_clips_names(activation, tmp_path):
    import timm

    quick = "quickgelu_" if activation == "quick_gelu" else ""
    options = {"embed_dim": 32, "num_heads": 2, "depth": 2, "img_size": 32, "patch_size": 8, "num_classes": 10}
    model = drawn(timm.create_model(f"vit_base_patch16_clip_{quick}224", **options))
    torch.nn.init.zeros_(model.head.bias)
    state = open_clip_names(model.state_dict())
    assert "visual.positional_embedding" in state and state["visual.positional_embedding"].ndim == 2
    torch.save({**state, "token_embedding.weight": torch.zeros(2, 2)}, tmp_path / "open_clip.bin")
    shared = {"family": "open_clip", "activation": activation}
    configs = {
        "patch": config(tmp_path / "open_clip.bin", token_types=["patch"], **shared),
        "cls": config(tmp_path / "open_clip.bin", token_types=["cls"], projected=True, num_features=10, **shared),
    }
    images = torch.randn(2, 3, 32, 32)
    ours = TeacherEnsemble(configs, 8)(images)
    with torch.no_grad():
        tokens = model.forward_features(images)
        pooled = model.head(tokens[:, 0])
    assert relative(ours["patch"]["patch"], tokens[:, 1:]) < TOLERANCE
    assert relative(ours["cls"]["cls"], pooled) < TOLERANCE


def test_open_clip_resizes_positions_with_antialias_and_clip_without(clip, tmp_path):
    _, path = clip
    assert build_teacher("a", config(path)).trunk.vit.cfg.interpolate_antialias is False
    architecture = build_teacher("a", config(path, interpolate_antialias=True)).trunk.vit.cfg
    assert architecture.interpolate_antialias is True and architecture.interpolate_offset == 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projected": True, "num_features": 12}, "cls has 12 channels after the projection, patches have 32; name"),
        ({"projected": True, "token_types": ["cls"]}, r"num_features is 32, but the weights .* have 12"),
        ({"projected": True, "token_types": ["cls"], "num_features": 12, "layer": 1}, "the projection reads the last"),
        ({"num_features": 12, "token_types": ["cls"]}, r"num_features is 12, but the weights .* have 32"),
        ({"activation": "relu"}, r"activation is 'relu'; choose gelu or quick_gelu"),
        ({"num_heads": 5}, "not divisible by num_heads 5"),
        ({"epilogue_gelu": True, "precision": "bf16"}, "epilogue_gelu is true, but its blocks have quick_gelu"),
    ],
)
def test_wrong_configuration(clip, fields, message):
    _, path = clip
    with pytest.raises(ValueError, match=message):
        TeacherEnsemble({"a": config(path, **fields)}, 8)


def test_weights_without_projection(clip, tmp_path):
    model, _ = clip
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("visual_projection")}
    save_file(state, tmp_path / "tower.safetensors")
    build_teacher("a", config(tmp_path / "tower.safetensors"))
    with pytest.raises(ValueError, match="has no projection; set it to false"):
        build_teacher("a", config(tmp_path / "tower.safetensors", token_types=["cls"], projected=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.layers.1.self_attn.k_proj.bias": None}, r"lacks the tensor blocks.1.attn.k_proj.bias"),
        ({"pre_layrnorm.bias": None}, "norm_pre.bias is missing"),
        ({"embeddings.position_embedding.weight": torch.zeros(7, 32)}, "6 patch positions"),
        ({"encoder.layers.0.self_attn.q_proj.weight": torch.zeros(())}, "do not go together"),
        ({"encoder.layers.0.adapter.weight": torch.zeros(2)}, "adapter.weight is not known"),
        ({"post_layernorm.weight": torch.full((32,), torch.nan)}, "not finite"),
    ],
)
def test_a_file_that_does_not_fit(clip, change, message, tmp_path):
    model, _ = clip
    state = dict(model.state_dict())
    for key, value in change.items():
        if value is None:
            del state[f"vision_model.{key}"]
        else:
            state[f"vision_model.{key}"] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(TeacherWeightsError, match=message):
        build_teacher("a", config(tmp_path / "w.safetensors"))


def test_pooling_by_attention_is_another_model(tmp_path):
    state = {"visual.class_embedding": torch.zeros(4), "visual.attn_pool.query": torch.zeros(2, 4)}
    torch.save(state, tmp_path / "coca.bin")
    with pytest.raises(TeacherWeightsError, match="CoCa"):
        build_teacher("a", config(tmp_path / "coca.bin", "open_clip"))


def test_other_families_refuse_clips_options():
    for option in ({"activation": "gelu"}, {"projected": True}):
        with pytest.raises(ValueError, match=r"the family 'dinov2' has no such choice; leave it out"):
            build_teacher("a", TeacherConfig("dinov2", "random:0", image_size=28, **option))
