"""ViT families: published containers against the reference cases, random weights against timm, and every mistake."""

from __future__ import annotations

import argparse

import pytest
import torch

from bench.case import Case
from bench.cases import RUNNERS
from bench.teacher_case import teacher_config
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.teachers.architecture import random_vit_state
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError, read_container
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.registry import build_teacher

CASES = ("dinov2_reg", "mast3r", "multihmr", "unic_dbotft", "unic_deit3", "unic_dino", "unic_ibot")
TOLERANCE = 2e-5  # float32; two orders of summation


@pytest.fixture
def images():
    return torch.randn(2, 3, 84, 112, generator=torch.Generator().manual_seed(0))


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", CASES)
def test_published_container(reference_dir, name):
    case = Case(reference_dir / "checkpoint" / f"{name}_tiny.safetensors")
    checks = RUNNERS["teacher"](case)
    assert {check.name.rsplit("/", 1)[-1] for check in checks} >= {"x_norm_patchtokens"}
    assert not [check for check in checks if not check.passed]


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_stays_near_float32(reference_dir, name, images):
    cfg = teacher_config(Case(reference_dir / "checkpoint" / f"{name}_tiny.safetensors"))
    full, low = (TeacherEnsemble({"a": cfg}, 14, dtype)(images)["a"] for dtype in (None, torch.bfloat16))
    for kind, x in full.items():
        assert relative(low[kind].float(), x) < 3e-2  # eight bits of mantissa, a few layers


@pytest.mark.parametrize("name", CASES)
def test_a_missing_tensor_is_named_and_a_surplus_one_only_within_the_encoder(reference_dir, name, tmp_path):
    case = Case(reference_dir / "checkpoint" / f"{name}_tiny.safetensors")
    cfg = teacher_config(case)
    content = read_container(cfg.weights)
    cfg.weights = str(tmp_path / "w.pth")
    entry = next((key for key in ("model", "model_state_dict", "state_dict") if key in content), None)
    state = content if entry is None else content[entry]
    state["aux_head.else"] = torch.zeros(2)
    torch.save(content, cfg.weights)
    build_teacher("a", cfg)
    kept = dict(state)
    last = [key for key in kept if key.endswith(".attn.proj.bias") and "dec_" not in key][-1]
    for key in (last, next(key for key in kept if key.endswith("patch_embed.proj.weight"))):
        del state[key]
        torch.save(content, cfg.weights)
        with pytest.raises(TeacherWeightsError, match=r"w\.pth .*(attn.proj.bias is missing|patch_embed.proj.weight)"):
            build_teacher("a", cfg)
        state[key] = kept[key]
    state[last.replace("attn.proj.bias", "attn.k_norm.weight")] = torch.ones(64)
    torch.save(content, cfg.weights)
    with pytest.raises(TeacherWeightsError, match="k_norm.weight is not known"):
        build_teacher("a", cfg)


def saved(tmp_path, **fields):
    """(state, teacher's configuration) of random weights in DINOv2's container."""
    cfg = ViTConfig(**{"depth": 3, "image_size": 518, **fields})
    state = random_vit_state(cfg, 0)
    torch.save(state, tmp_path / "w.pth")
    return state, TeacherConfig(
        family="dinov2", weights=str(tmp_path / "w.pth"), patch_size=cfg.patch_size, num_features=cfg.embed_dim
    )


@pytest.mark.parametrize("size", ["small", "base", "giant"])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_computes_what_timm_computes(size, registers, images, tmp_path):
    import timm

    dim = {"small": 384, "base": 768, "giant": 64}[size]  # ViT-g's blocks have SwiGLU, here of a small width
    own, timms = {}, {}
    if size == "giant":
        own, timms = {"mlp": "swiglu"}, {"embed_dim": 64, "num_heads": 1, "mlp_ratio": 5.5}
    state, cfg = saved(tmp_path, embed_dim=dim, num_heads=dim // 64, num_registers=registers, **own)
    if size == "giant":
        assert state["blocks.0.mlp.w12.weight"].shape == (352, 64)  # 2 x 176: 170.7 rounded up
        state = {k.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): v for k, v in state.items()}
    cfg.interpolate_offset, cfg.interpolate_antialias = 0.0, True  # timm knows no other way
    name = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
    model = timm.create_model(name, num_classes=0, depth=3, dynamic_img_size=True, **timms)
    if registers:  # timm has no position for cls: it is added to the token
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    model.load_state_dict(state)
    ours = TeacherEnsemble({"a": cfg}, 14)(images)["a"]
    with torch.no_grad():
        theirs = model.eval().forward_features(images)
    assert relative(ours["cls"], theirs[:, 0]) < TOLERANCE
    assert relative(ours["patch"], theirs[:, 1 + registers :]) < TOLERANCE


@pytest.mark.parametrize("family", ["dino", "ibot", "deit3", "dbotft"])
def test_unic_teachers_compute_what_timm_computes(family, tmp_path):
    import timm

    dim, name = (384, "deit3_small_patch16_224") if family == "deit3" else (192, "vit_tiny_patch16_224")
    options = {"global_pool": "avg"} if family == "dbotft" else {}
    model = timm.create_model(name, num_classes=0, depth=2, **options)
    generator = torch.Generator().manual_seed(0)
    state = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    published = {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in state.items()}
    entry = {"ibot": "state_dict", "deit3": "model", "dbotft": "model"}.get(family)
    torch.save({entry: published} if entry else published, tmp_path / "w.pth")
    cfg = TeacherConfig(family=family, weights=str(tmp_path / "w.pth"), patch_size=16, num_features=dim)
    images = torch.randn(2, 3, 224, 224, generator=generator)
    ours = TeacherEnsemble({"a": cfg}, 16)(images)["a"]
    with torch.no_grad():
        theirs = model.eval().forward_features(images)
        cls = model.forward_head(theirs, pre_logits=True) if family == "dbotft" else theirs[:, 0]
    assert relative(ours["cls"], cls) < TOLERANCE
    assert relative(ours["patch"], theirs[:, 1:]) < TOLERANCE


def test_release_decides_the_positions_unless_the_configuration_does(tmp_path, images):
    offsets = {}
    for registers in (0, 4):
        _, cfg = saved(tmp_path, embed_dim=64, num_heads=1, num_registers=registers)
        vit = build_teacher("a", cfg).trunk.vit.cfg
        offsets[registers] = (vit.interpolate_offset, vit.interpolate_antialias)
    assert offsets == {0: (0.1, False), 4: (0.0, True)}
    cfg.interpolate_offset, cfg.interpolate_antialias = 0.1, False
    own = TeacherEnsemble({"a": cfg}, 14)(images)["a"]["patch"]
    cfg.interpolate_offset = cfg.interpolate_antialias = None
    release = TeacherEnsemble({"a": cfg}, 14)(images)["a"]["patch"]
    assert 1e-4 < relative(own, release) < 0.5


def test_teachers_of_one_file_share_a_trunk_unless_they_read_it_differently(tmp_path):
    _, cfg = saved(tmp_path, embed_dim=64, num_heads=1, num_registers=0)
    other = TeacherConfig(**{**vars(cfg), "layer": 1, "token_types": ["patch"]})
    resized = TeacherConfig(**{**vars(cfg), "interpolate_offset": 0.0})
    assert len(TeacherEnsemble({"a": cfg, "b": other}, 14).trunks) == 1
    assert len(TeacherEnsemble({"a": cfg, "b": resized}, 14).trunks) == 2


def test_registers_that_the_configuration_names_must_be_there(tmp_path):
    _, cfg = saved(tmp_path, embed_dim=64, num_heads=1, num_registers=0)
    cfg.num_registers = 4
    with pytest.raises(TeacherWeightsError, match="num_registers is 4, but .* has 0"):
        build_teacher("a", cfg)


@pytest.mark.parametrize(
    "key", ["cls_token", "pos_embed", "norm.weight", "blocks.1.norm1.weight", "blocks.0.ls1.gamma"]
)
def test_what_the_architecture_is_read_from_may_not_be_missing(key, tmp_path):
    state, cfg = saved(tmp_path, embed_dim=64, num_heads=1, num_registers=0)
    del state[key]
    torch.save(state, cfg.weights)
    with pytest.raises(TeacherWeightsError, match=rf"{key}|norm1.weight"):
        build_teacher("a", cfg)


@pytest.mark.parametrize("name", ["dinov2_vitg14", "dinov2_vitg14_reg"])
def test_vit_g_has_the_published_sizes(name):
    from dune_fast.kernels.nn.vit import VisionTransformer
    from dune_fast.teachers.architecture import infer_vit
    from dune_fast.teachers.dinov2 import DINOv2Teacher
    from dune_fast.teachers_cli import load_teacher_config

    architecture = DINOv2Teacher.architecture(load_teacher_config(name))
    assert (architecture.depth, architecture.num_heads, architecture.mlp) == (40, 24, "swiglu")
    with torch.device("meta"):
        vit = VisionTransformer(architecture)
    assert vit.blocks[0].mlp.w12.weight.shape == (8192, 1536) and vit.blocks[0].mlp.w3.weight.shape == (1536, 4096)
    assert round(sum(p.numel() for p in vit.parameters()) / 1e6) in (1136, 1137)
    resizing = architecture.interpolate_offset, architecture.interpolate_antialias
    assert infer_vit(vit.state_dict(), name, None, *resizing) == architecture


def test_heads_that_no_one_tells_are_asked_for(tmp_path):
    _, cfg = saved(tmp_path, embed_dim=96, num_heads=3, num_registers=0)
    with pytest.raises(TeacherWeightsError, match="96 channels.*give num_heads"):
        build_teacher("a", cfg)
    cfg.num_heads = 3
    assert build_teacher("a", cfg).trunk.vit.cfg.num_heads == 3


def test_mast3r_takes_its_heads_from_the_container(reference_dir):
    cfg = teacher_config(Case(reference_dir / "checkpoint" / "mast3r_tiny.safetensors"))
    content = read_container(cfg.weights)
    assert isinstance(content["args"], argparse.Namespace) and "enc_num_heads=2" in content["args"].model
    cfg.num_heads = None
    assert build_teacher("a", cfg).trunk.vit.cfg.num_heads == 2


@pytest.mark.slow
@pytest.mark.parametrize("size", [336, 448])
def test_vit_large_teachers_of_dune_build_and_run(size):
    from dune_fast.teachers_cli import load_teacher_config

    configs = {}
    for name in ("dinov2_vitl14_reg", "mast3r_vitl16", "multihmr_vitl14_672"):
        configs[name] = load_teacher_config(name)
        configs[name].weights = "random:0"
    configs["multihmr_vitl14_672"].token_types = ["patch"]
    for name, cfg in configs.items():  # one at a time: 1.2 GB each
        outputs = TeacherEnsemble({name: cfg}, 14)(torch.randn(1, 3, size, size))[name]
        assert outputs["patch"].shape == (1, (size // 14) ** 2, 1024)
        assert set(outputs) == set(cfg.token_types) and all(torch.isfinite(x).all() for x in outputs.values())
