"""SAM: numbers of the reference cases and of transformers, both readings and layouts, and every mistake."""

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


def config(path, **fields):
    return TeacherConfig(
        **{"family": "sam", "weights": str(path), "patch_size": 8, "num_features": 32, "num_heads": 2,
           "token_types": ["patch"], **fields}
    )  # fmt: skip


def transformers_encoder():
    """SAM's encoder of a grid of 10, windows of 4, the second and the last block global."""
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    sizes = {"hidden_size": 32, "mlp_dim": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "window_size": 4}
    made = SamVisionConfig(**sizes, image_size=80, patch_size=8, output_channels=6, global_attn_indexes=[1, 3])
    made._attn_implementation = "eager"
    model = SamVisionEncoder(made).eval()
    draw = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        offset = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        value.copy_(torch.randn(value.shape, generator=draw) * 0.2 + offset)
    return model


def released(state):
    """transformers' tensors under the release's names, the decoder's beside them."""
    renames = (
        (".layer_norm", ".norm"), ("layers.", "blocks."), ("patch_embed.projection.", "patch_embed.proj."),
        ("neck.conv1.", "neck.0."), ("neck.norm1.", "neck.1."), ("neck.conv2.", "neck.2."), ("neck.norm2.", "neck.3."),
    )  # fmt: skip
    found = {"mask_decoder.iou_token.weight": torch.zeros(1, 4)}
    for key, value in state.items():
        for old, new in renames:
            key = key.replace(old, new)
        found[f"image_encoder.{key}"] = value
    return found


@pytest.mark.parametrize("name", ["sam_tiny", "sam_table_resize"])
def test_reference_case(reference_dir, name):
    case = Case(reference_dir / "siblings" / f"{name}.safetensors")
    checks = RUNNERS[case.kind](case)
    assert len(checks) >= 4 and not [check for check in checks if not check.passed]


@pytest.mark.parametrize("layout", ["release", "transformers"])
def test_transformers_sam(layout, tmp_path):
    """Windows that the grid of 10 does not fill, before and after the neck, in one pass."""
    model = transformers_encoder()
    state = released(model.state_dict())
    if layout == "transformers":
        state = {f"vision_encoder.{key}": value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    configs = {
        "before": config(tmp_path / "w.pth"), "neck": config(tmp_path / "w.pth", projected=True, num_features=6),
        "first": config(tmp_path / "w.pth", layer=1, norm=False),
    }  # fmt: skip
    ensemble = TeacherEnsemble(configs, 8)
    assert len(ensemble.trunks) == 1
    images = torch.randn(2, 3, 80, 80)
    ours = ensemble(images)
    seen = {}
    for i in (0, 3):
        model.layers[i].register_forward_hook(lambda module, args, out, i=i: seen.update({i: out}))
    with torch.no_grad():
        neck = model(images).last_hidden_state
    first, last = (x[0] if isinstance(x, tuple) else x for x in (seen[0], seen[3]))
    assert relative(ours["first"]["patch"], first.flatten(1, 2)) < TOLERANCE
    assert relative(ours["before"]["patch"], last.flatten(1, 2)) < TOLERANCE
    assert relative(ours["neck"]["patch"], neck.flatten(2).transpose(1, 2)) < TOLERANCE


def test_timms_own_file_and_other_sizes(tmp_path):
    """timm resizes positions and tables of a rectangle in the same way."""
    import timm

    options = {"embed_dim": 32, "num_heads": 2, "depth": 3, "img_size": 80, "patch_size": 8, "window_size": 4}
    model = timm.create_model("samvit_base_patch16", num_classes=0, global_attn_indexes=(1,), **options).eval()
    state = {key: torch.randn_like(value) * 0.2 for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    save_file(state, tmp_path / "model.safetensors")
    cfg = config(tmp_path / "model.safetensors", projected=True, num_features=256)
    ensemble = TeacherEnsemble({"a": cfg}, 8)
    assert ensemble.trunks[0].vit.cfg.global_blocks == (1,) and ensemble.trunks[0].vit.cfg.window == 4
    for size in ((80, 80), (48, 64)):
        images = torch.randn(1, 3, *size)
        other = timm.create_model(
            "samvit_base_patch16", num_classes=0, global_attn_indexes=(1,), **{**options, "img_size": size}
        ).eval()
        resized = dict(state)
        height, width = size[0] // 8, size[1] // 8
        table = state["pos_embed"].permute(0, 3, 1, 2)
        if size != (80, 80):
            table = torch.nn.functional.interpolate(table, size=(height, width), mode="bicubic")
            for axis, side in (("h", height), ("w", width)):
                key = f"blocks.1.attn.rel_pos_{axis}"
                rows = torch.nn.functional.interpolate(state[key].t()[None], size=2 * side - 1, mode="linear")
                resized[key] = rows[0].t()
        resized["pos_embed"] = table.permute(0, 2, 3, 1)
        other.load_state_dict(resized)
        with torch.no_grad():
            theirs = other.forward_features(images).flatten(2).transpose(1, 2)
        assert relative(ensemble(images)["a"]["patch"], theirs) < TOLERANCE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projected": True}, r"num_features is 32, but the weights .* have 6"),
        ({"projected": True, "num_features": 6, "layer": 2}, "the neck reads the last block"),
        ({"token_types": ["cls"]}, "has patch only"),
        ({"attention": "math"}, "adds positions to its scores"),
    ],
)
def test_wrong_configuration(fields, message, tmp_path):
    torch.save(released(transformers_encoder().state_dict()), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        TeacherEnsemble({"a": config(tmp_path / "w.pth", **fields)}, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.attn.rel_pos_h": torch.zeros(5, 16)}, r"tables of relative positions of \[5, 7\] rows"),
        ({"blocks.0.attn.rel_pos_w": None}, "blocks.0.attn.rel_pos_w is missing"),
        ({"pos_embed": torch.zeros(1, 10, 9, 32)}, r"positions of \[1, 10, 9, 32\]; a square map"),
        ({"neck.3.bias": None}, "neck.3.bias is missing"),
        ({"blocks.x.attn.rel_pos_h": torch.zeros(7, 16)}, "no ViT has|not known"),
    ],
)
def test_a_file_that_does_not_fit(change, message, tmp_path):
    state = released(transformers_encoder().state_dict())
    state |= {f"image_encoder.{key}": value for key, value in change.items()}
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match=message):
        build_teacher("a", config(tmp_path / "w.pth"))


def test_an_encoder_without_neck(tmp_path):
    state = {k: v for k, v in released(transformers_encoder().state_dict()).items() if ".neck." not in k}
    torch.save(state, tmp_path / "w.pth")
    build_teacher("a", config(tmp_path / "w.pth"))
    with pytest.raises(ValueError, match="has no neck; set it to false"):
        build_teacher("a", config(tmp_path / "w.pth", projected=True, num_features=6))
