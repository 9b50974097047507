"""ViT families: published containers against the reference cases, random weights against timm, and every mistake."""

from __future__ import annotations

import argparse

import pytest
import torch
from safetensors.torch import save_file

import dune_fast
from bench.case import Case
from bench.cases import RUNNERS
from bench.teacher_case import teacher_config
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.teachers.architecture import random_vit_state
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError, read_container
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.registry import build_teacher
from dune_fast.teachers.verify import inspect_file

CASES = ("dinov2_reg", "mast3r", "multihmr", "unic_dbotft", "unic_deit3", "unic_dino", "unic_ibot")
TOLERANCE = 2e-5  # float32; two orders of summation


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
def test_dinov2_under_timms_names_computes_what_timm_computes(size, registers, images, tmp_path):
    import timm

    options = {"embed_dim": 64, "num_heads": 1, "mlp_ratio": 5.5} if size == "giant" else {}
    name = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
    model = timm.create_model(name, num_classes=0, depth=3, dynamic_img_size=True, **options).eval()
    model.load_state_dict({key: torch.randn_like(value) * 0.05 for key, value in model.state_dict().items()})
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # the folder is as timm's hub has it
    # timm knows one way to resize positions, which is that of the release with registers
    resizing = {} if registers else {"interpolate_offset": 0.0, "interpolate_antialias": True}
    cfg = TeacherConfig("dinov2", str(tmp_path), 14, model.num_features, **resizing)
    ours, encoder = TeacherEnsemble({"a": cfg}, 14)(images)["a"], dune_fast.load_encoder(tmp_path, **resizing)
    with torch.no_grad():
        theirs = model.forward_features(images)
        assert relative(ours["cls"], theirs[:, 0]) < TOLERANCE
        assert relative(ours["patch"], theirs[:, 1 + registers :]) < TOLERANCE
        assert relative(encoder.norm(encoder(images)["x_prenorm"]), theirs) < TOLERANCE
    report = inspect_file(tmp_path)
    assert report.family == "dinov2" and report.sound and not report.fit.surplus
    if size == "giant":
        assert encoder.blocks[0].mlp.w12.weight.shape == (352, 64)  # 2 x 176: 170.7 rounded up


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
