"""The one transformer against timm's, an implementation that nobody here wrote, and its properties."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn.functional import interpolate

from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig


def tiny(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    settings = {"image_size": 56, "embed_dim": 48, "depth": 3, "num_heads": 3} | changes
    model = VisionTransformer(ViTConfig(**settings)).init_weights()
    for name, parameter in model.named_parameters():
        if "gamma" in name or "norm" in name:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.5, 0.3)
    return model.eval()


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", [56, 84])
def test_equals_timm(registers, size):
    """timm interpolates by size with antialias, and its registers stand between cls and patches too."""
    ours = tiny(num_registers=registers, interpolate_offset=0.0, interpolate_antialias=True)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=56, patch_size=14, embed_dim=48, depth=3, num_heads=3, init_values=1e-4, reg_tokens=registers,
        no_embed_class=True, num_classes=0, global_pool="", dynamic_img_size=True,
    ).eval()  # fmt: skip
    state = {k.replace("register_tokens", "reg_token"): v for k, v in ours.state_dict().items()}
    # timm's table holds patches alone: the position of cls goes into the token
    table = state.pop("pos_embed")
    state |= {"pos_embed": table[:, 1:], "cls_token": state["cls_token"] + table[:, :1]}
    theirs.load_state_dict(state)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours.norm(ours.forward_tokens(x)), theirs.forward_features(x), rtol=1e-5, atol=1e-5)


def test_offset_interpolation_samples_at_the_published_points():
    model = tiny(num_registers=0)
    table = model.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    by_factor = interpolate(table, scale_factor=(6.1 / 4, 3.1 / 4), mode="bicubic")
    by_size = interpolate(table, size=(6, 3), mode="bicubic")
    ours = model.positions(6, 3)[:, 1:].transpose(1, 2).unflatten(2, (6, 3))
    torch.testing.assert_close(ours, by_factor)
    assert (ours - by_size).abs().max() > 1e-4


def test_table_is_used_as_it_is_only_for_its_own_square():
    model = tiny()
    assert model.positions(4, 4) is model.pos_embed
    assert model.positions(2, 8) is not model.pos_embed  # as many patches, another shape


def test_positions_receive_gradients_at_other_sizes():
    model = tiny()
    model.forward_tokens(torch.randn(1, 3, 84, 28)).square().sum().backward()
    assert model.pos_embed.grad.abs().sum() > 0


def test_block_outputs_run_no_further_than_asked():
    model = tiny()
    ran = []
    for i, block in enumerate(model.blocks):
        block.attn.register_forward_hook(lambda *_, i=i: ran.append(i))
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        outputs = model.block_outputs(x, [-1, 1])
        torch.testing.assert_close(outputs[-1], model.embed(x))
    assert ran == [0, 1] and sorted(outputs) == [-1, 1]


def test_intermediate_layers_reshape_row_major():
    model = tiny()
    x = torch.randn(1, 3, 28, 56)
    with torch.no_grad():
        ((grid, cls),) = model.get_intermediate_layers(x, 1, reshape=True, return_class_token=True)
        features = model(x)
    assert grid.shape == (1, 48, 2, 4)
    torch.testing.assert_close(grid[0, :, 1, 2], features["x_norm_patchtokens"][0, 6])
    torch.testing.assert_close(cls, features["x_norm_clstoken"])


def test_rope_encoder_runs_on_rectangles():
    model = tiny(pos_embed="rope2d", num_registers=0, cls_token=False, layer_scale=None)
    assert "pos_embed" not in model.state_dict()
    features = model(torch.randn(1, 3, 42, 70))
    assert features["x_norm_patchtokens"].shape == (1, 15, 48) and "x_norm_clstoken" not in features


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 3, 60, 56), "height 60.*56 and 70"), ((1, 3, 56, 13), "width 13.*14"), ((3, 56, 56), r"\[B, 3, H, W\]")],
)
def test_wrong_image_sizes_are_explained(shape, words):
    with pytest.raises(ValueError, match=words):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 100}, "98 and 112"),
        ({"num_heads": 5}, "not divisible"),
        ({"pos_embed": "sine"}, "learned.*rope2d"),
        ({"pos_embed": "rope2d", "num_registers": 4}, "no position for cls"),
    ],
)
def test_wrong_configurations_are_explained(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny(**changes)(torch.zeros(1, 3, 56, 56))


def test_parameter_counts_are_those_of_the_papers():
    with torch.device("meta"):
        count = {
            name: sum(p.numel() for p in VisionTransformer(ViTConfig(518, 14, dim, depth, heads)).parameters()) / 1e6
            for name, dim, depth, heads in (("S", 384, 12, 6), ("B", 768, 12, 12), ("L", 1024, 24, 16))
        }
    assert round(count["S"]) == 22 and round(count["B"]) in (86, 87) and round(count["L"]) == 304
