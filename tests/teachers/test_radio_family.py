"""RADIO: numbers of the reference cases and of transformers, the container's arguments, and every mistake."""

from __future__ import annotations

import argparse

import pytest
import torch

import dune_fast
from bench.case import Case
from bench.cases import RUNNERS
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.teachers.clip import CLIP_MEAN, CLIP_STD
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.drift import measure_drift
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.radio import plain_weights, summary_tokens
from dune_fast.teachers.registry import build_teacher
from dune_fast.teachers.verify import inspect_file

TOLERANCE = 1e-5  # float32; two orders of summation
TEACHERS = [{"name": "clip"}, {"name": "sam", "use_summary": False}, {"name": "dino", "use_summary": True}]


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def config(path, tokens=("patch",), **fields):
    return TeacherConfig(
        **{"family": "radio", "weights": str(path), "patch_size": 8, "num_features": 32, "token_types": list(tokens),
           "mean": list(CLIP_MEAN), "std": list(CLIP_STD), **fields}
    )  # fmt: skip


def transformers_model():
    from transformers import RadioConfig, RadioModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8, "max_img_size": 64}
    model = RadioModel(RadioConfig(**sizes, num_cls_tokens=3, num_registers=5, summary_idxs=[0, 2])).eval()
    draw = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if "norm_" in key or "idxs" in key or "lambda" in key:
            continue
        offset = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        value.copy_(torch.randn(value.shape, generator=draw) * 0.2 + offset)
    return model


def container(model, **arguments):
    """transformers' weights in RADIO's container, a head beside them."""
    state = model.state_dict()
    found = {
        "base_model.patch_generator.pos_embed": state["embeddings.position_embedding"],
        "base_model.patch_generator.embedder.weight": state["embeddings.patch_projection.weight"],
        "base_model.patch_generator.cls_token.token": state["embeddings.cls_register_token"],
        "input_conditioner.norm_mean": torch.tensor(CLIP_MEAN).view(3, 1, 1),
        "input_conditioner.norm_std": torch.tensor(CLIP_STD).view(3, 1, 1), "_heads.0.fc1.weight": torch.zeros(2, 32),
    }  # fmt: skip
    for i in range(3):
        theirs, block = f"encoder.layer.{i}.", f"base_model.blocks.{i}."
        for kind in ("weight", "bias"):
            parts = [state[f"{theirs}attention.{x}_proj.{kind}"] for x in "qkv"]
            found[f"{block}attn.qkv.{kind}"] = torch.cat(parts)
            found[f"{block}attn.proj.{kind}"] = state[f"{theirs}attention.o_proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{block}{name}.{kind}"] = state[f"{theirs}{name}.{kind}"]
    args = {"cpe_max_size": 64, "teachers": TEACHERS, "model_kwargs": {"num_heads": 2}, **arguments}
    return {"state_dict": {k: v.clone() for k, v in found.items()}, "args": argparse.Namespace(**args), "epoch": 3}


def test_drift_is_measured(tmp_path):
    """Of the patches, and of the summary that shares their pass."""
    torch.save(container(transformers_model()), path := tmp_path / "radio.pth.tar")
    teachers = {"a": config(path, precision="bf16"), "b": config(path, ["cls"], precision="bf16", num_features=64)}
    drifts = measure_drift(TeacherEnsemble(teachers, 14), torch.randn(8, 3, 56, 84))
    assert [(drift.teacher, drift.token) for drift in drifts] == [("a", "patch"), ("b", "cls")]
    assert all(0.98 < drift.mean_cosine < 1 and not drift.forced for drift in drifts), drifts


@pytest.mark.parametrize("name", ["radio_tiny", "radio_tiny_named_ema", "radio_tiny_spectral"])
def test_reference_case(reference_dir, name):
    """The second has standardized features and averaged weights, the third spectral reparametrisation."""
    checks = RUNNERS["radio_model"](Case(reference_dir / "siblings" / f"{name}.safetensors"))
    assert len(checks) >= 2 and not [check for check in checks if not check.passed]


@pytest.mark.parametrize("size", [(64, 64), (32, 24), (72, 88)])
def test_transformers_radio(size, tmp_path):
    model = transformers_model()
    torch.save(container(model), tmp_path / "radio.pth.tar")
    teachers = {
        "patch": config(tmp_path / "radio.pth.tar"),
        "cls": config(tmp_path / "radio.pth.tar", ["cls"], num_features=64),
    }
    ensemble = TeacherEnsemble(teachers, 8)
    assert len(ensemble.trunks) == 1
    vit = ensemble.trunks[0].vit.cfg
    assert (vit.num_cls, vit.num_registers, vit.summaries, vit.num_heads) == (3, 5, (0, 2), 2)
    images = torch.rand(2, 3, *size)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    ours = ensemble((images - mean) / std)
    with torch.no_grad():
        theirs = model(images)
    assert relative(ours["patch"]["patch"], theirs.features) < TOLERANCE
    assert relative(ours["cls"]["cls"], theirs.summary) < TOLERANCE


def test_precisions_and_verify(images, tmp_path):
    torch.save(container(transformers_model()), tmp_path / "radio.pth")
    full = TeacherEnsemble({"a": config(tmp_path / "radio.pth")}, 14)(images)["a"]["patch"]
    for precision, limit in (("bf16", 3e-2), ("fp8", 0.3)):
        low = TeacherEnsemble({"a": config(tmp_path / "radio.pth", precision=precision)}, 14)(images)["a"]["patch"]
        assert 0 < relative(low.float(), full) < limit
    report = inspect_file(tmp_path / "radio.pth")
    assert report.family == "radio" and report.sound and report.fit.surplus == ["_heads.0.fc1.weight"]
    assert set(report.fingerprint) == {"patch"}  # the summary of two tokens is another teacher's
    encoder = dune_fast.load_encoder(tmp_path / "radio.pth")
    assert encoder.mean == CLIP_MEAN and encoder.cfg.image_size == 64  # at most what its table is for


def test_summary_tokens():
    """Teachers of one name share a token. The place in the list says which; slots are of the heads alone."""
    shared = [{"name": "clip"}, {"name": "clip", "use_summary": False}, {"name": "dino", "token_slot": 1}]
    assert summary_tokens({"teachers": shared}, "f") == (2, (0, 1))
    assert summary_tokens({"teachers": shared, "cls_token_per_teacher": False}, "f") == (1, (0,))
    swapped = [{"name": "clip", "token_slot": 2}, {"name": "sam", "use_summary": False}, {"name": "dino"}]
    assert summary_tokens({"teachers": swapped}, "f") == (3, (0, 2))
    again = [{"name": "clip", "use_summary": False}, {"name": "clip"}, {"name": "dino", "use_summary": False}]
    assert summary_tokens({"teachers": again}, "f") == (2, (1,))
    for teachers in (None, [], [3], [{"use_summary": True}], [{"name": ["clip"]}], [{"name": ""}]):
        with pytest.raises(TeacherWeightsError, match="does not name the teachers"):
            summary_tokens({"teachers": teachers}, "f")
    for slot in (7, -1, "0"):
        with pytest.raises(TeacherWeightsError, match="has the summary tokens"):
            summary_tokens({"teachers": [*shared[:2], {"name": "a", "token_slot": slot}]}, "f")
    with pytest.raises(TeacherWeightsError, match="all its teachers have use_summary=False"):
        summary_tokens({"teachers": [{"name": "sam", "use_summary": False}]}, "f")


def test_of_trained_and_averaged_weights_the_average_is_read(tmp_path):
    """As the release's loader does, where a container has both."""
    content = container(transformers_model())
    trained = {key: value + 1 for key, value in content["state_dict"].items() if key.startswith("base_model.")}
    state = content["state_dict"]
    torch.save({**content, "state_dict": state | trained, "state_dict_ema": state}, tmp_path / "both.pth.tar")
    encoder = dune_fast.load_encoder(tmp_path / "both.pth.tar")
    assert torch.equal(encoder.pos_embed, state["base_model.patch_generator.pos_embed"])


def test_arguments_of_another_kind_say_nothing(tmp_path):
    torch.save(container(transformers_model(), model_kwargs="num_heads=2"), tmp_path / "radio.pth.tar")
    encoder = dune_fast.load_encoder(tmp_path / "radio.pth.tar", num_heads=2)
    assert encoder.num_heads == 2 and encoder.cfg.cropped and encoder.cfg.image_size == 64


def test_windows_of_no_side_are_refused(tmp_path):
    torch.save(container(transformers_model()), tmp_path / "radio.pth.tar")
    with pytest.raises(ValueError, match="windows of -2 x -2 patches: give a side of 1 patch or more"):
        dune_fast.load_encoder(tmp_path / "radio.pth.tar").in_windows(-2, 1)


def test_spectral_weights_are_scaled_to_their_gain():
    """With the true singular vectors sigma is exact: the largest singular value of the plain weight is the gain."""
    weight = torch.randn(6, 4)
    u, _, vh = torch.linalg.svd(weight)
    parts = {"scale": torch.tensor([[0.7]]), "_u": u[:, 0], "_v": vh[0]}
    under = "fc.parametrizations.weight"
    state = {f"{under}.original": weight, **{f"{under}.0.{name}": value for name, value in parts.items()}}
    assert torch.linalg.matrix_norm(plain_weights(state, "f")["fc.weight"], 2) == pytest.approx(0.7, rel=1e-5)
    state[f"{under}.0._sn_version"] = torch.tensor(2)
    expected = float(torch.nn.functional.softplus(torch.tensor(0.7))) + 0.05
    assert torch.linalg.matrix_norm(plain_weights(state, "f")["fc.weight"], 2) == pytest.approx(expected, rel=1e-5)
    del state[f"{under}.0._v"]
    with pytest.raises(TeacherWeightsError, match="fc is not reparametrised as RADIO does"):
        plain_weights(state, "f")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model.patch_generator.cls_token.token": None}, "lacks base_model.patch_generator.cls_token.token"),
        ({"base_model.patch_generator.cls_token.token": torch.zeros(2, 32)}, "names 3 teachers, but has 2 tokens"),
        ({"base_model.patch_generator.embedder.weight": torch.zeros(32, 100)}, "no ViT has"),
        ({"base_model.blocks.1.attn.k_norm.weight": torch.zeros(2)}, "k_norm.weight is not known"),
        ({"base_model.blocks.2.mlp.fc2.bias": None}, "blocks.2.mlp.fc2.bias is missing"),
        ({"_feature_normalizer.mean": torch.zeros(32)}, "feature_matrix is missing"),
        ({"input_conditioner.norm_mean": torch.zeros(3, 1, 1)}, "normalises images by norm_mean"),
    ],
)
def test_a_file_that_does_not_fit(change, message, tmp_path):
    content = container(transformers_model())
    state = content["state_dict"] | change
    torch.save({**content, "state_dict": {k: v for k, v in state.items() if v is not None}}, tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match=message):
        build_teacher("a", config(tmp_path / "w.pth"))


def test_wrong_configuration(tmp_path):
    torch.save(container(transformers_model()), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="the summary has 2 tokens, 64 channels, patches have 32; name two teachers"):
        build_teacher("a", config(tmp_path / "w.pth", ["cls", "patch"]))
    torch.save(container(transformers_model(), cpe_max_size=None), tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match="does not say cpe_max_size"):
        build_teacher("a", config(tmp_path / "w.pth"))
