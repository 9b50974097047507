"""An encoder under every spelling of its names; what has no place in it is refused, not dropped."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import dune_fast
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.teachers.architecture import random_vit_state
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError, strip_wrappers
from dune_fast.teachers.encoder_names import beside_encoder
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.registry import build_teacher
from dune_fast.teachers.verify import inspect_file

SMALL = ViTConfig(image_size=56, embed_dim=64, depth=2, num_heads=1)
STATE = random_vit_state(SMALL, 1)
IMAGES = torch.randn(1, 3, 84, 70, generator=torch.Generator().manual_seed(0))


def features(cfg: ViTConfig, state: dict, images=IMAGES) -> torch.Tensor:
    encoder = VisionTransformer(cfg).eval()
    encoder.load_state_dict(state)
    with torch.no_grad():
        return encoder(images)["x_prenorm"]


def in_blocks(part: str):
    return lambda key: key.replace("blocks.0.", f"blocks.0.{part}.").replace("blocks.1.", f"blocks.1.{part}.")


WRAPPED = {
    "activation checkpointing": in_blocks("_checkpoint_wrapped_module"),
    "FSDP": lambda key: "_fsdp_wrapped_module." + in_blocks("_fsdp_wrapped_module")(key),
    "older FSDP": lambda key: f"_fsdp_wrapped_module._fpw_module.{key}",
    "both": in_blocks("_fsdp_wrapped_module._checkpoint_wrapped_module"),
    "compiled blocks": in_blocks("_orig_mod"),
    "compiled part": lambda key: key.replace(".attn.", ".attn._orig_mod."),
    "DDP, compiled": lambda key: f"module._orig_mod.{key}",
    "compiled, DDP": lambda key: f"_orig_mod.module.{key}",
    "DDP in DDP": lambda key: f"module.module.{key}",
    "Lightning": lambda key: f"model._orig_mod.{key}",
    "Lightning with DeepSpeed": lambda key: f"_forward_module.model.{key}",
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_of_wrappers_come_off(wrapper, tmp_path):
    torch.save({"state_dict": {WRAPPED[wrapper](key): value for key, value in STATE.items()}}, tmp_path / "w.pth")
    loaded = dune_fast.load_encoder(tmp_path / "w.pth").state_dict()
    assert loaded.keys() == STATE.keys() and all(torch.equal(loaded[key], STATE[key]) for key in STATE)


def test_a_tensor_wrapped_and_not_is_refused():
    with pytest.raises(TeacherWeightsError, match="two tensors a.b, wrapped and not"):
        strip_wrappers({"a.b": torch.zeros(1), "a._orig_mod.b": torch.ones(1)}, "w.pth")


UNKNOWN = [
    "blocks.0.attn.q_norm.weight", "blocks.1.attn.lora_A.weight", "blocks.0.mlp.norm.bias",
    "blocks.0.attn.inner.weight",
    "blocks.1.norm3.weight", "blocks.0.attn.relative_position_bias_table", "storage_tokens", "dist_token",
    "norm_pre.weight", "rope_embed.periods", "cls_norm.weight", "patch_embed.norm.weight", "pos_embed_spatial",
    "ln_pre.weight", "pre_layrnorm.bias", "stem.0.weight", "conv_stem.weight", "rel_pos_bias.table", "position.weight",
    "cross_blocks.0.norm1.weight", "blocks_token_only.0.norm1.weight", "reg_tokens", "adaptor.fc.weight",
]  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("prefix", ["", "encoder.", "module.backbone."])
def test_a_tensor_that_has_no_place_is_an_error(name, prefix, tmp_path):
    """Query and key norms, LoRA, other registers: the features would differ by 2 to 66 %."""
    path = tmp_path / "w.pth"
    torch.save({prefix + key: value for key, value in {**STATE, name: torch.zeros(64)}.items()}, path)
    cfg = TeacherConfig(family="dune", weights=str(path), num_features=64)
    for load in (lambda: dune_fast.load_encoder(path), lambda: build_teacher("a", cfg)):
        with pytest.raises(TeacherWeightsError, match=f"{name} is not known.*its features would be others"):
            load()
    report = inspect_file(path)
    assert report.unplaced == [name] and not report.sound


def test_what_stands_beside_an_encoder_may_be_there(tmp_path):
    beside = ["head.weight", "heads.0.bias", "fc_norm.weight", "mask_token", "decoder_embed.weight",
              "decoder_pos_embed",
              "decoder_blocks.0.norm1.weight", "n_averaged", "attn_pool.q.weight", "aux_head.weight",
              "criterion.center", "classifier.weight"]  # fmt: skip
    assert all(map(beside_encoder, beside))
    torch.save({**STATE, **dict.fromkeys(beside, torch.zeros(1))}, tmp_path / "w.pth")
    loaded = dune_fast.load_encoder(tmp_path / "w.pth").state_dict()
    assert all(torch.equal(loaded[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("prefix", ["", "encoder.", "backbone."])
def test_a_plain_safetensors_loads_as_the_same_pth(prefix, tmp_path):
    state = {prefix + key: value for key, value in STATE.items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    one, other = (dune_fast.load_encoder(tmp_path / f"w.{kind}") for kind in ("pth", "safetensors"))
    assert one.cfg == other.cfg and torch.equal(one(IMAGES)["x_prenorm"], other(IMAGES)["x_prenorm"])
    torch.testing.assert_close(one(IMAGES)["x_prenorm"], features(SMALL, STATE))


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("mask", [False, True])
def test_load_encoder_and_verify_resize_positions_alike(registers, mask, tmp_path):
    """DINOv2's release with registers, told by its mask token, resizes by size and with antialias; 3.7 % otherwise."""
    cfg = ViTConfig(image_size=56, embed_dim=64, depth=2, num_heads=1, num_registers=registers)
    state = random_vit_state(cfg, 1)
    torch.save({**state, "mask_token": torch.zeros(1, 64)} if mask else state, tmp_path / "w.pth")
    report, encoder = inspect_file(tmp_path / "w.pth"), dune_fast.load_encoder(tmp_path / "w.pth")
    assert report.architecture == encoder.cfg and report.sound
    release = (0.0, True) if registers and mask else (0.1, False)
    assert (encoder.cfg.interpolate_offset, encoder.cfg.interpolate_antialias) == release
    cfg = TeacherConfig(family=report.family, weights=str(tmp_path / "w.pth"), num_features=64)
    teacher = TeacherEnsemble({"a": cfg}, 14)(IMAGES)["a"]["patch"]
    torch.testing.assert_close(encoder(IMAGES)["x_norm_patchtokens"], teacher)
    own = dune_fast.load_encoder(tmp_path / "w.pth", interpolate_offset=0.0, interpolate_antialias=False)
    assert (own.cfg.interpolate_offset, own.cfg.interpolate_antialias) == (0.0, False)
