"""Distilled encoders as teachers: every layout of names and containers, which tokens, other resolutions, mistakes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dune_fast
from bench.case import Case
from dune_fast.engine.warm_start import warm_start
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import build_student
from dune_fast.teachers.architecture import architecture_metadata, random_vit_state
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.encoder_names import encoder_state
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.registry import build_teacher
from dune_fast.teachers_cli import load_teacher_config

DUNE = ViTConfig(image_size=56, embed_dim=64, depth=2, num_heads=1)
UNIC = replace(DUNE, image_size=64, patch_size=16, num_registers=0, layer_scale=None)
STATES = {"dune": random_vit_state(DUNE, 1), "unic": random_vit_state(UNIC, 2)}
ARGS = argparse.Namespace(image_size=56, enc_args={"arch": "vit_tiny"}, lr_schedule=np.linspace(0.0, 1e-3, 5))


def chunked(state: dict) -> dict:
    return {key.replace("blocks.", "blocks.0.", 1): value for key, value in state.items()}


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def whole(state: dict) -> dict:
    """With what surrounds an encoder in a release."""
    return {
        **prefixed("encoder.", state),
        "projectors.a.blocks.0.norm1.weight": torch.ones(64),
        "projectors.a.linear.weight": torch.ones(24, 64),
        "teacher_norms.a.normalizers.cls.mean": torch.zeros(24),
        "encoder.mask_token": torch.zeros(1, 64),
    }


LAYOUTS = {
    "bare": lambda state: state,
    "bare, chunked": chunked,
    "released": lambda s: {"model": prefixed("module.", whole(chunked(s))), "args": ARGS, "iter": 7},
    "released, compiled": lambda s: {"model": prefixed("module._orig_mod.", whole(chunked(s))), "args": ARGS},
    "released, encoder alone": lambda s: {"model": prefixed("module.encoder.", chunked(s)), "args": ARGS},
    "flat blocks": lambda s: {"state_dict": whole(s)},
    "backbone": lambda s: {"state_dict": prefixed("backbone.", s), "epoch": 3},
    "encoder wrapped alone": lambda s: {"model": prefixed("encoder._orig_mod.module.", chunked(s))},
    "student and teacher": lambda s: {"student": random_vit_state(DUNE, 9), "teacher": prefixed("module.backbone.", s)},
    "student's encoder": lambda s: {"student": prefixed("student.encoder.", s)},
    "under encoder": lambda s: {"encoder": s, "optimizer": {"lr": 1e-3}},
    "two encoders": lambda s: {"model": prefixed("encoder.", s) | prefixed("ema.encoder.", random_vit_state(DUNE, 9))},
}  # fmt: skip


def teacher(path: Path, family: str = "dune", **fields) -> TeacherConfig:
    patch = {"dune": 14, "unic": 16}[family]
    return TeacherConfig(**{"family": family, "weights": str(path), "patch_size": patch, "num_features": 64, **fields})


def loaded(cfg: ViTConfig, state: dict) -> VisionTransformer:
    encoder = VisionTransformer(cfg).eval()
    encoder.load_state_dict(state)
    return encoder


def equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.fixture
def images():
    return torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", STATES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_teacher_encoder_and_warm_start(layout, family, tmp_path):
    path, state = tmp_path / "w.pth", STATES[family]
    torch.save(LAYOUTS[layout](state), path)
    trunk = build_teacher("a", teacher(path, family)).trunk
    assert equal(trunk.vit.state_dict(), state)
    assert equal(dune_fast.load_encoder(path).state_dict(), state)
    cfg = {"dune": DUNE, "unic": UNIC}[family]
    student = build_student(cfg, ProjectorConfig(), {"a": (24, ("cls",))}, 0)
    warm_start(student, str(path))
    assert equal(student.encoder.state_dict(), state)


def test_unic_starts_a_student_at_another_resolution(tmp_path, images):
    torch.save({"model": prefixed("module.", whole(chunked(STATES["unic"])))}, tmp_path / "unic.pth")
    student = build_student(replace(UNIC, image_size=112), ProjectorConfig(), {"b": (8, ("patch",))}, 0).eval()
    assert warm_start(student, str(tmp_path / "unic.pth")).projectors == []
    assert student.encoder.pos_embed.shape == (1, 1 + 49, 64)
    with torch.no_grad():
        ours, theirs = student.encoder(images), dune_fast.load_encoder(tmp_path / "unic.pth")(images)
    torch.testing.assert_close(ours["x_prenorm"], theirs["x_prenorm"])


def test_both_kinds_of_tokens_in_one_pass(tmp_path, images):
    torch.save(LAYOUTS["released"](STATES["dune"]), tmp_path / "w.pth")
    cfg = teacher(tmp_path / "w.pth", num_registers=4)
    ensemble = TeacherEnsemble({"normed": cfg, "raw": replace(cfg, norm=False), "first": replace(cfg, layer=1)}, 14)
    assert len(ensemble.trunks) == 1
    ours = ensemble(images)  # at twice the resolution of the weights
    encoder = loaded(DUNE, STATES["dune"])
    with torch.no_grad():
        features = encoder(images)
        cls, _, patches = encoder.split(features["x_prenorm"])
        ((early, _),) = encoder.get_intermediate_layers(images, [0], return_class_token=True, norm=False)
    close = torch.testing.assert_close
    close(ours["normed"], {"cls": features["x_norm_clstoken"], "patch": features["x_norm_patchtokens"]})
    close(ours["raw"], {"cls": cls, "patch": patches})
    close(ours["first"]["patch"], torch.nn.functional.layer_norm(early, (64,), eps=1e-6))
    assert ours["raw"]["patch"].norm() != ours["normed"]["patch"].norm()


def test_dbot_without_its_norm(tmp_path, images):
    state = random_vit_state(UNIC, 3)
    named = {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: v for key, v in state.items()}
    torch.save({"model": named}, tmp_path / "w.pth")
    cfg = replace(teacher(tmp_path / "w.pth", "unic"), family="dbotft", norm=False, interpolate_offset=0.1)
    ours = TeacherEnsemble({"a": cfg}, 16)(images)["a"]
    encoder = loaded(UNIC, state)
    with torch.no_grad():
        patches = encoder.split(encoder.forward_tokens(images))[2]
    torch.testing.assert_close(ours, {"cls": patches.mean(1), "patch": patches})


@pytest.mark.parametrize("file", ["encoder.safetensors", "student.safetensors"])
def test_files_of_a_run_say_their_own_architecture(file, tmp_path, images):
    """Three heads of 32 channels: the tensors would say a head of 64."""
    cfg = replace(DUNE, embed_dim=96, num_heads=3, interpolate_offset=0.0)
    state = random_vit_state(cfg, 4)
    stored = whole(state) if file.startswith("student") else state
    save_file(stored, tmp_path / file, metadata=architecture_metadata(cfg))
    ours = TeacherEnsemble({"a": teacher(tmp_path / file, num_features=96)}, 14)(images)["a"]
    with torch.no_grad():
        torch.testing.assert_close(ours["patch"], loaded(cfg, state)(images)["x_norm_patchtokens"])
    asked = build_teacher("a", teacher(tmp_path / file, num_features=96, interpolate_offset=0.1)).trunk.vit.cfg
    assert asked == replace(cfg, interpolate_offset=0.1)


def test_a_release_of_dune_gives_what_the_reference_says(reference_dir):
    case = Case(reference_dir / "checkpoint" / "official_ddp.safetensors")
    cfg = teacher(case.path.with_suffix(".pth"), num_features=192)
    ours = TeacherEnsemble({"a": cfg, "raw": replace(cfg, norm=False)}, 14)(case["image"])
    expected = {"cls": case["x_norm_clstoken"], "patch": case["x_norm_patchtokens"]}
    torch.testing.assert_close(ours["a"], expected, rtol=1e-4, atol=1e-5)
    raw = torch.cat([ours["raw"]["cls"][:, None], ours["raw"]["patch"]], dim=1)
    torch.testing.assert_close(raw, case["encoder_output"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("patch_embed.proj.weight"), "lacks the tensor patch_embed.proj.weight"),
        (lambda s: s.pop("pos_embed"), "lacks the encoder's tensor 'pos_embed'"),
        (lambda s: s.pop("blocks.1.attn.proj.bias"), "blocks.1.attn.proj.bias is missing"),
        (lambda s: s.pop("norm.weight"), "norm.weight is missing"),
        (lambda s: s.update({"cls_token": torch.zeros(1, 1, 3)}), "cls_token has shape"),
    ],
)
def test_what_is_missing_is_named(change, words, tmp_path):
    state = dict(STATES["dune"])
    change(state)
    torch.save({"model": prefixed("module.encoder.", chunked(state))}, tmp_path / "w.pth")
    for load in (
        lambda: build_teacher("a", teacher(tmp_path / "w.pth")),
        lambda: dune_fast.load_encoder(tmp_path / "w.pth"),
    ):
        with pytest.raises(TeacherWeightsError, match=words):
            load()


def test_several_encoders_of_equal_standing_are_refused():
    state = {**prefixed("left.", STATES["dune"]), **prefixed("right.", STATES["dune"])}
    with pytest.raises(TeacherWeightsError, match=r"several encoders, below 'left\.', 'right\.'"):
        encoder_state(state, "w.pth")


def test_a_student_without_transformer_projectors_is_for_load_encoder(tmp_path):
    state = prefixed("encoder.", STATES["unic"]) | {"teacher_norms.a.normalizers.cls.mean": torch.zeros(24)}
    torch.save({"model": state}, tmp_path / "unic.pth")
    with pytest.raises(TeacherWeightsError, match="for a; dune_fast.load_encoder reads its encoder alone"):
        dune_fast.load_model(tmp_path / "unic.pth")


def test_published_names_of_unic(tmp_path, monkeypatch):
    monkeypatch.setenv("DUNE_FAST_WEIGHTS", str(tmp_path))
    with pytest.raises(ValueError, match="put it at .*unic.pth"):
        dune_fast.load_encoder("unic")
    torch.save({"model": STATES["unic"]}, tmp_path / "unic.pth")
    assert dune_fast.load_encoder("unic").cfg.patch_size == 16


@pytest.mark.parametrize(
    ("name", "size", "patch", "channels", "registers"),
    [
        ("dune_vitbase14_336", 336, 14, 768, 4), ("dune_vitbase14_448", 448, 14, 768, 4),
        ("dune_vitbase14_448_paper", 448, 14, 768, 4), ("dune_vitsmall14_336", 336, 14, 384, 4),
        ("dune_vitsmall14_448", 448, 14, 384, 4), ("unic_vitb16", 224, 16, 768, 0),
        ("unic_vitl14", 336, 14, 1024, None),
    ],
)  # fmt: skip
def test_published_sizes(name, size, patch, channels, registers, monkeypatch, tmp_path):
    monkeypatch.setenv("DUNE_FAST_WEIGHTS", str(tmp_path))
    cfg = load_teacher_config(name)
    assert (cfg.image_size, cfg.patch_size, cfg.num_features, cfg.num_registers) == (size, patch, channels, registers)
    assert cfg.norm and cfg.url.endswith(Path(cfg.weights).name)
