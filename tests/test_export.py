"""Exports: every target round-trips through the library it is for, a wrong one fails and leaves nothing behind."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench.toy.conv_patchify import toy_teacher
from dune_fast import cli
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.engine import checkpoints
from dune_fast.engine.config import RunConfig
from dune_fast.export import TARGETS, dinov2_alike, to_dune, to_hf, to_onnx, to_timm
from dune_fast.export.check import LIMIT, ExportError, compare, encoder_outputs, sizes
from dune_fast.export.run import export
from dune_fast.kernels.nn.preprocessing import Preprocessing
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.load import load_encoder, load_model
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import StudentConfig, build_student
from dune_fast.teachers.architecture import random_vit_state
from dune_fast.teachers.containers import read_container

TINY = ViTConfig(image_size=56, embed_dim=192, depth=12, num_heads=3)
SMALL = replace(TINY, embed_dim=128, depth=2, num_heads=2)


def write_run(folder: Path, encoder: ViTConfig, **projector) -> Path:
    """A finished run with random weights of which every one matters (LayerScale near 0.3)."""
    teachers = {
        "one": toy_teacher("random:1", num_features=24),
        "two": toy_teacher("random:2", num_features=40, token_types=["patch"]),
    }
    cfg = RunConfig(image_size=encoder.image_size, student=StudentConfig(**vars(encoder)), teachers=teachers)
    cfg.projector = ProjectorConfig(**projector)
    cfg.train.steps = 34
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features)
    student.encoder.load_state_dict(random_vit_state(encoder, seed=3))
    statistics = TeacherStatistics(cfg.teacher_features)
    for _, _, normalizer in statistics.items():
        torch.nn.init.normal_(normalizer.mean)
        torch.nn.init.uniform_(normalizer.std, 0.5, 2.0)
    folder.mkdir()
    checkpoints.export(folder, cfg, student, statistics)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are computed faster by one thread, many times so beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """Two blocks."""
    return write_run(tmp_path_factory.mktemp("runs") / "small", SMALL)


@pytest.fixture(scope="session")
def published_run(tmp_path_factory) -> Path:
    """As the published container knows it: ViT-Ti/14 with four registers."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", TINY)


def build(**changes) -> VisionTransformer:
    cfg = replace(SMALL, **changes)
    model = VisionTransformer(cfg)
    model.load_state_dict(random_vit_state(cfg, seed=5))
    return model.eval()


@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"radio", "theia"}))  # of other students, see their tests
def test_every_target_round_trips(run, published_run, target, tmp_path):
    if target == "hf":
        pytest.importorskip("transformers")
    before = os.umask(0o022)
    try:
        done = export(published_run if target == "dune" else run, target, tmp_path / "out")
    finally:
        os.umask(before)
    assert done.difference <= LIMIT / 10  # a correct mapping is far below the limit
    assert {path.name for path in done.files} == {path.name for path in (tmp_path / "out").iterdir()}
    assert done.every_size == (target in ("onnx", "safetensors", "dune"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing temporary is left
    # colleagues may read it: the safetensors library makes files that no other user may
    assert {oct(path.stat().st_mode & 0o777) for path in done.files} == {"0o644"}


@pytest.mark.parametrize("target", ["safetensors", "timm", "onnx", "dune"])
def test_an_average_is_marked(published_run, target, tmp_path):
    """As the run has marked its files (`train.ema`)."""
    folder = shutil.copytree(published_run, tmp_path / "run")
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            about = content.metadata()
        save_file(load_file(file), file, {**about, "ema": "0.99"})
    for source, mark in ((folder, "0.99"), (published_run, None)):
        (path,) = (p for p in export(source, target, tmp_path / "out").files if p.suffix != ".json")
        if target == "onnx":
            found = {p.key: p.value for p in pytest.importorskip("onnx").load(str(path)).metadata_props}
        elif target == "dune":
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(path, weights_only=True)
        else:
            found = safe_open(path, "pt").metadata()
        assert found.get("ema") == mark


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        *((target, changes) for target in (to_timm, to_hf) for changes in (
            {"num_registers": 0}, {"num_registers": 1, "mlp_ratio": 3.0}, {"patch_size": 8, "layer_scale": 0.1})),
        (to_timm, {"layer_scale": None}),
        (to_timm, {"interpolate_offset": 0.0, "interpolate_antialias": True}),
        (to_onnx, {"layer_scale": None}),
    ],
)  # fmt: skip
def test_other_architectures(target, changes, tmp_path):
    if target is to_hf:
        pytest.importorskip("transformers")
    encoder = build(**changes)
    target.write(encoder, tmp_path)
    native_only = target is not to_onnx and not dinov2_alike.resizes_alike(encoder.cfg)
    assert native_only == (target is not to_onnx and "interpolate_offset" not in changes)
    compare(target.read(tmp_path), partial(encoder_outputs, encoder), sizes(encoder, native_only), "other")


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_onnx_resizes_positions_as_we_do(offset, antialias, tmp_path):
    encoder = build(interpolate_offset=offset, interpolate_antialias=antialias, num_registers=2 if offset else 0)
    to_onnx.write(encoder, tmp_path)
    shapes = [(1, 56, 56), (4, 28, 98), (2, 14, 14), (1, 112, 56), (3, 70, 70)]
    assert compare(to_onnx.read(tmp_path), partial(encoder_outputs, encoder), shapes, "onnx") < LIMIT / 10


def test_the_published_container_has_the_published_names(published_run, tmp_path):
    export(published_run, "dune", tmp_path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(tmp_path / "dune.pth", weights_only=True)
    state = content["model"]
    assert content["iter"] == 34 and content["args"].teachers == ["one", "two"]
    options = {"layerscale_init": 1e-4, "qkv_bias": True, "ln_affine": True}
    encoder = {"arch": "vit_tiny", "patch_size": 14, "num_register_tokens": 4, **options}
    assert content["args"].enc_args == encoder and content["args"].image_size == 56
    assert content["args"].proj_args == {"num_blocks": 1, "num_heads": 3, "scale": 1.0, **options}
    assert "encoder.blocks.0.11.attn.qkv.weight" in state and not state["encoder.mask_token"].any()
    assert "projectors.two.blocks.0.norm1.weight" in state and "teacher_norms.one.normalizers.cls.std" in state
    back = load_model(tmp_path / "dune.pth")
    for key, value in load_model(published_run).state_dict().items():
        assert torch.equal(value, back.state_dict()[key]), key


def swapped(state: dict[str, torch.Tensor], pair: str) -> dict[str, torch.Tensor]:
    """Two tensors of equal shape under each other's name: it loads strictly and computes something else."""
    start, one, other, end = re.fullmatch(r"(.*){(\w+),(\w+)}(.*)", pair).groups()
    one, other = start + one + end, start + other + end
    return {**state, one: state[other], other: state[one]}


@pytest.mark.parametrize(
    ("target", "owner", "function", "pair"),
    [
        ("timm", to_timm, "timm_state", "blocks.1.norm1.{weight,bias}"),
        ("hf", to_hf, "hf_state", "encoder.layer.1.attention.attention.{query,value}.weight"),
        ("dune", to_dune, "published_state", "teacher_norms.one.normalizers.cls.{mean,std}"),
    ],
)
def test_a_wrong_mapping_fails_and_removes_what_it_wrote(
    run, published_run, target, owner, function, pair, tmp_path, monkeypatch
):
    if target == "hf":
        pytest.importorskip("transformers")
    right = getattr(owner, function)
    monkeypatch.setattr(owner, function, lambda model: swapped(right(model), pair))
    with pytest.raises(ExportError, match=f"the {target} export is wrong and was removed: .* differs by"):
        export(published_run if target == "dune" else run, target, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_wrong_graph_fails(run, tmp_path, monkeypatch):
    monkeypatch.setattr(to_onnx, "_CUBIC", -0.5)  # right at the native size, wrong at every other
    with pytest.raises(ExportError, match="the onnx export is wrong"):
        export(run, "onnx", tmp_path / "out")


def test_a_missing_tensor_is_named_and_an_earlier_export_stays(run, tmp_path, monkeypatch):
    export(run, "timm", tmp_path)
    before = (tmp_path / dinov2_alike.WEIGHTS).read_bytes()
    right = to_timm.timm_state
    monkeypatch.setattr(to_timm, "timm_state", lambda e: {k: v for k, v in right(e).items() if k != "norm.bias"})
    with pytest.raises(ExportError, match="timm does not take[\\s\\S]*norm.bias"):
        export(run, "timm", tmp_path)
    assert (tmp_path / dinov2_alike.WEIGHTS).read_bytes() == before and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("target", "changes", "words"),
    [
        (to_hf, {"layer_scale": None}, "always has LayerScale"),
        (to_timm, {"mlp": "swiglu"}, "gated MLPs"),
        (to_onnx, {"mlp": "swiglu"}, "GELU's MLP alone"),
        (to_hf, {"pos_embed": "rope2d", "cls_token": False, "num_registers": 0}, "rotary"),
        (to_timm, {"final_norm": False}, "final norm"),
    ],
)
def test_what_a_target_cannot_express_is_refused(target, changes, words, tmp_path):
    with pytest.raises(ExportError, match=words):
        target.write(build(**changes), tmp_path)


@pytest.mark.parametrize(
    ("encoder", "projector", "words"),
    [
        (SMALL, {}, "one of the encoders vit_tiny"),
        (TINY, {"kind": "sp", "hidden_dim": 32}, "transformer projectors"),
        (replace(TINY, interpolate_offset=0.0), {}, "offset 0.1"),
        (TINY, {"num_heads": 6}, "as many attention heads as the encoder"),
        (TINY, {"mlp_ratio": 2.0}, "MLP of ratio 4"),
    ],
)
def test_the_published_container_refuses_other_models(encoder, projector, words, tmp_path):
    with pytest.raises(ExportError, match=words):
        export(write_run(tmp_path / "run", encoder, **projector), "dune")
    assert not (tmp_path / "run" / "export").exists()


def test_command_line(run, tmp_path, caplog):
    assert cli.main(["export", str(run), "--to", "safetensors", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "encoder.safetensors").is_file()
    assert cli.main(["export", str(run), "--to", "tflite"]) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="is a file"):
        export(run, "timm", tmp_path / "file")
    with pytest.raises(ExportError, match="timm, hf, onnx, safetensors, radio, theia, dune"):
        export(run, "tflite")


def photo() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((90, 70), Image.BICUBIC)


def test_transformers_takes_the_folder_images_and_all(run, tmp_path):
    """AutoImageProcessor and pipeline failed for want of preprocessor_config.json."""
    transformers = pytest.importorskip("transformers")
    export(run, "hf", tmp_path)
    encoder = load_encoder(run)
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path)(photo(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0], encoder.transform(photo()), rtol=0, atol=2 / 255 / 0.22)  # two levels
    with torch.no_grad():
        ours = encoder_outputs(encoder, pixels)["tokens"]
        theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    features = transformers.pipeline("image-feature-extraction", model=str(tmp_path))(photo())
    torch.testing.assert_close(torch.tensor(features), ours, rtol=1e-3, atol=1e-3)


def test_timm_takes_the_folder_images_and_all(run, tmp_path):
    import timm

    export(run, "timm", tmp_path)
    encoder, model = load_encoder(run), timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert (config["crop_pct"], config["interpolation"], list(config["input_size"])) == (1.0, "bicubic", [3, 56, 56])
    image = timm.data.create_transform(**config, is_training=False)(photo())
    torch.testing.assert_close(image, encoder.transform(photo()))
    with torch.no_grad():
        ours = encoder_outputs(encoder, image[None])["tokens"]
        torch.testing.assert_close(model.forward_features(image[None]), ours, rtol=1e-4, atol=1e-4)
    written = json.loads((tmp_path / dinov2_alike.CONFIG).read_text())
    assert written["architecture"] == "vit_small_patch14_reg4_dinov2"


@pytest.mark.parametrize("target", ["onnx", "safetensors", "dune"])
def test_every_file_says_how_images_become_its_input(run, published_run, target, tmp_path):
    source = published_run if target == "dune" else run
    (path,) = export(source, target, tmp_path).files
    if target == "onnx":
        import onnx

        found = json.loads({p.key: p.value for p in onnx.load(path).metadata_props}["preprocessing"])
    elif target == "safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as handle:
            found = json.loads(handle.metadata()["preprocessing"])
    else:
        found = read_container(path)["preprocessing"]
    assert Preprocessing(**{**found, "mean": tuple(found["mean"]), "std": tuple(found["std"])}) == Preprocessing(56)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"num_registers": 0}, {"num_register_tokens": 0}),
        ({"patch_size": 16, "image_size": 64}, {"patch_size": 16}),
        ({"image_size": 70, "num_registers": 2}, {"num_register_tokens": 2}),
    ],
)
def test_the_published_loader_builds_the_model_from_the_options(changes, options, tmp_path):
    """Without registers it crashed; patch 16 was written as the loader's default, 14."""
    encoder = replace(TINY, **changes)
    done = export(write_run(tmp_path / "run", encoder, num_blocks=2), "dune", tmp_path / "out")
    args = read_container(done.files[0])["args"]
    assert args.image_size == encoder.image_size and options.items() <= args.enc_args.items()
    assert args.proj_args["num_blocks"] == 2 and "TEACHER_CFG there knows one, two" in done.notes[0]


def test_a_container_that_its_loader_would_build_otherwise_fails(published_run, tmp_path, monkeypatch):
    monkeypatch.setitem(to_dune.ENCODER_OPTIONS, "num_register_tokens", 3)  # what the loader takes by default
    right = torch.save

    def without_registers(content, path):
        content["args"].enc_args.pop("num_register_tokens")
        right(content, path)

    monkeypatch.setattr(torch, "save", without_registers)
    with pytest.raises(ExportError, match=r"does not fit the published model: encoder.register_tokens has shape \[1"):
        export(published_run, "dune", tmp_path / "out")
