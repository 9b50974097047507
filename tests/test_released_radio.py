"""RADIO's whole containers: heads against torch's own layers, the rules of their versions, and every mistake."""

from __future__ import annotations

import argparse

import pytest
import torch
import torch.nn.functional as F

import dune_fast
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.engine.warm_start import warm_start
from dune_fast.export import to_radio
from dune_fast.export.run import export
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.nn.radio import CLIP_MEAN, CLIP_STD, RADIOConfig, RADIOViT
from dune_fast.kernels.nn.radio_options import RADIOOptions
from dune_fast.kernels.nn.spectral import SpectralScale
from dune_fast.load import DistilledModel, ModelNotFoundError
from dune_fast.projectors.base import TeacherFeatures
from dune_fast.projectors.config import HeadShape, ProjectorConfig
from dune_fast.projectors.heads import HeadV1, build_head
from dune_fast.student import StudentConfig, build_student
from dune_fast.teachers.containers import TeacherWeightsError, read_container

DIM = 32
TEACHERS = [
    {"name": "siglip2.g", "fd_upsample_factor": 2},
    {"name": "sam", "use_summary": False, "mlp_version": "v1", "spatial_mlp_version": "v2", "token_slot": 0},
]


def normal(*shape):
    return torch.randn(*shape) * 0.3


def v1(outputs, hidden=6):
    return {
        "fc1.weight": normal(hidden, DIM), "fc1.bias": normal(hidden), "norm.weight": 1 + normal(hidden),
        "norm.bias": normal(hidden), "fc2.weight": normal(outputs, hidden), "fc2.bias": normal(outputs),
    }  # fmt: skip


def v2(outputs, hidden=6, inner=2, prenorm=False):
    sizes = {"fc1": (hidden, DIM), "final.2": (outputs, hidden)} | {
        f"blocks.{i}.2": (hidden,) * 2 for i in range(inner)
    }
    norms = (
        {"final.0": hidden} | {f"blocks.{i}.0": hidden for i in range(inner)} | ({"pre_norm.0": DIM} if prenorm else {})
    )
    state = {f"{name}.weight": normal(*size) for name, size in sizes.items()}
    state |= {f"{name}.bias": normal(size[0]) for name, size in sizes.items()}
    state |= {f"{name}.weight": 1 + normal(size) for name, size in norms.items()}
    return state | {f"{name}.bias": normal(size) for name, size in norms.items()}


def container(**arguments):
    """A backbone of two blocks, a v1 and three v2 heads; one of them gives 2 x 2 tokens for each patch."""
    torch.manual_seed(0)
    vit = RADIOViT(
        RADIOConfig(image_size=64, patch_size=8, embed_dim=DIM, depth=2, num_heads=2, num_registers=3, num_cls=2,
                    layer_scale=None, final_norm=False, summaries=(0, 1))
    ).init_weights()  # fmt: skip
    names = {"pos_embed": "patch_generator.pos_embed", "prefix_tokens": "patch_generator.cls_token.token"}
    state = {f"base_model.{names.get(k, k)}": v for k, v in vit.state_dict().items() if not k.startswith("patch_embed")}
    state["base_model.patch_generator.cls_token.token"] = vit.prefix_tokens.detach()[0]
    state["base_model.patch_generator.embedder.weight"] = vit.patch_embed.proj.weight.detach().flatten(1)
    for name, values in (("norm_mean", CLIP_MEAN), ("norm_std", CLIP_STD)):
        state[f"input_conditioner.{name}"] = torch.tensor(values).view(3, 1, 1)
    heads = {
        "_heads.siglip2.g": v2(5), "_feature_projections.siglip2.g": v2(4 * 7, prenorm=True),
        "_heads.1": v1(4), "_feature_projections.1": v2(6, inner=0),
    }  # fmt: skip
    state |= {f"{head}.{key}": value for head, tensors in heads.items() for key, value in tensors.items()}
    args = {
        "cpe_max_size": 64,
        "teachers": TEACHERS,
        "model_kwargs": {"num_heads": 2, "img_size": 32},
        "mlp_version": "v2",
    }
    return {"state_dict": state, "args": argparse.Namespace(**args | arguments), "epoch": 1}


def written(content, path, change=None):
    state = {k: v.clone() for k, v in (content["state_dict"] | (change or {})).items() if v is not None}
    torch.save({**content, "state_dict": state}, path)
    return path


def norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def head(x, state):
    """Both versions, by torch's functions."""
    if "fc2.weight" in state:
        return linear(norm(linear(x, state, "fc1"), state, "norm").relu(), state, "fc2")
    x = F.gelu(norm(x, state, "pre_norm.0")) if "pre_norm.0.weight" in state else x
    x = linear(x, state, "fc1")
    for i in range(sum(key.endswith(".2.weight") and key.startswith("blocks") for key in state)):
        x = x + linear(F.gelu(norm(x, state, f"blocks.{i}.0")), state, f"blocks.{i}.2")
    return linear(F.gelu(norm(x, state, "final.0")), state, "final.2")


def test_heads_of_a_container(tmp_path):
    """A teacher's own token and patches; versions by teacher, then file; a grid of 3 x 5 patches upsampled."""
    content = container()
    model, state = dune_fast.load_model(written(content, tmp_path / "radio.pth.tar")), content["state_dict"]
    assert model.teachers == ["siglip2_g_summary", "siglip2_g", "sam_summary", "sam"]
    assert (model.encoder.cfg.image_size, model.encoder.cfg.table_side, model.encoder.mean) == (32, 8, CLIP_MEAN)
    images = torch.randn(2, 3, 24, 40)
    features, found = model(images), model.projections(images, standardized=False)
    tokens, patches = features["x_prenorm"], features["x_norm_patchtokens"]
    torch.testing.assert_close(features["x_norm_clstoken"], tokens[:, 0])  # SAM has no summary

    def of(group):
        return {key.removeprefix(group + "."): value for key, value in state.items() if key.startswith(group + ".")}

    wanted = head(patches, of("_feature_projections.siglip2.g")).unflatten(1, (3, 5)).unflatten(-1, (2, 2, 7))
    wanted = wanted.transpose(2, 3).reshape(2, 6 * 10, 7)
    torch.testing.assert_close(found["siglip2_g"]["patch"], wanted)
    torch.testing.assert_close(found["siglip2_g_summary"]["cls"], head(tokens[:, 0], of("_heads.siglip2.g")))
    torch.testing.assert_close(found["sam"]["patch"], head(patches, of("_feature_projections.1")))
    torch.testing.assert_close(found["sam_summary"]["cls"], head(tokens[:, 0], of("_heads.1")))  # its slot is 0
    encoder = dune_fast.load_encoder(tmp_path / "radio.pth.tar")
    torch.testing.assert_close(encoder(images)["x_norm_patchtokens"], patches)
    windowed = encoder.in_windows(1, num_windowed=1)(images)["x_norm_patchtokens"]
    assert (windowed - patches).abs().max() > 1e-3


def test_newer_files_name_a_summary_heads_version_otherwise(tmp_path):
    teachers = [TEACHERS[0], {"name": "sam", "summary_mlp_version": "v1", "spatial_mlp_version": "v2"}]
    model = dune_fast.load_model(written(container(teachers=teachers), tmp_path / "radio.pth.tar"))
    assert isinstance(model.student.projectors["sam_summary"].cls, HeadV1)
    export(tmp_path / "radio.pth.tar", "radio", tmp_path / "again")
    entry = read_container(tmp_path / "again" / "radio.pth.tar")["args"].teachers[1]
    assert entry["mlp_version"] == entry["summary_mlp_version"] == "v1" and entry["spatial_mlp_version"] == "v2"


def test_teachers_of_one_name_are_one(tmp_path):
    """Trained in several partitions, a teacher is in the list once for each; its heads are the first entry's."""
    teachers = [*TEACHERS, {"name": "siglip2.g", "fd_upsample_factor": 2, "token_slot": 9}]
    model = dune_fast.load_model(written(container(teachers=teachers), tmp_path / "radio.pth.tar"))
    assert model.teachers == ["siglip2_g_summary", "siglip2_g", "sam_summary", "sam"]
    assert model.encoder.cfg.num_cls == 2 and model.student.projectors.slots["siglip2_g"] == 0


def test_a_container_without_some_heads_is_exported_with_all_its_tokens(tmp_path):
    """A token that no head reads keeps its place in the list of teachers."""
    change = {key: None for key in container()["state_dict"] if key.startswith(("_heads.1", "_feature_projections.1"))}
    path = written(container(teachers=[TEACHERS[0], {"name": "sam"}]), tmp_path / "radio.pth.tar", change)
    assert export(path, "radio", tmp_path / "again").difference < 1e-6
    teachers = read_container(tmp_path / "again" / "radio.pth.tar")["args"].teachers
    assert [(t["name"], t["use_summary"], "token_slot" in t) for t in teachers] == [
        ("siglip2.g", True, True), ("unread_1", True, False)
    ]  # fmt: skip
    assert {t["type"] for t in teachers} == {"generic"}  # others have text towers in RADIO's code, by their names


@pytest.mark.parametrize(("mlp", "layer_scale"), [("gelu", None), ("gelu", 1e-5), ("swiglu", None), ("swiglu", 1e-5)])
def test_timm_builds_the_blocks_that_an_export_names(mlp, layer_scale, tmp_path):
    """RADIO's code builds them by these arguments, and leaves what a file lacks as timm has drawn it."""
    timm = pytest.importorskip("timm")
    cfg = StudentConfig(
        image_size=28, patch_size=14, embed_dim=48, depth=2, num_heads=3, layer_scale=layer_scale, final_norm=False,
        family="radio", cls_per_teacher=True, mlp=mlp, radio=RADIOOptions(cpe_max_size=70),
    )  # fmt: skip
    features, head = {"clip": TeacherFeatures(5, ("cls", "patch"))}, HeadShape(hidden_dim=8, num_inner=0)
    student = build_student(cfg, ProjectorConfig("heads", cls_head=head, patch_head=head), features)
    to_radio.write(DistilledModel(student, TeacherStatistics(features, "none")), tmp_path)
    content = read_container(tmp_path / "radio.pth.tar")
    with torch.device("meta"):
        wanted = timm.create_model(content["args"].model, **content["args"].model_kwargs).state_dict()
    found = {key.removeprefix("base_model."): x.shape for key, x in content["state_dict"].items()}
    assert {k: x for k, x in found.items() if k.startswith("blocks.")} == {
        k: x.shape for k, x in wanted.items() if k.startswith("blocks.")
    }
    if mlp == "swiglu" and layer_scale:
        assert export(tmp_path / "radio.pth.tar", "radio", tmp_path / "again").difference < 1e-6


def test_spectral_heads_and_a_shared_token(tmp_path):
    """`spectral_heads`: the weight is made after one more power iteration, as in the backbone."""
    content = container(cls_token_per_teacher=False, teachers=[t | {"token_slot": 5} for t in TEACHERS])
    weight = content["state_dict"].pop("_heads.1.fc1.weight")
    scale, name = SpectralScale(*weight.shape, 2), "_heads.1.fc1.parametrizations.weight"
    scale.start(weight)
    content["state_dict"] |= {
        f"{name}.original": 3 * weight,
        **{f"{name}.0.{k}": v for k, v in scale.state_dict().items()},
    }
    model = dune_fast.load_model(written(content, tmp_path / "radio.pth"))
    assert model.student.projectors.slots is None and model.encoder.cfg.num_registers == 4
    found = model.student.projectors["sam_summary"].cls.fc1.weight
    torch.testing.assert_close(found, weight, rtol=1e-2, atol=1e-3)


def test_feature_heads_with_attention(tmp_path):
    """C-RADIOv4's: two blocks before the MLP; `spatial_mlp_version` of the file."""
    content = container(spatial_mlp_version="attn", teachers=[{"name": "dino"}])
    torch.manual_seed(1)
    attention = build_head(HeadShape("attn", 8, 0), DIM, 6)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    state = {key: x for key, x in content["state_dict"].items() if not key.startswith(("_heads", "_feature_"))}
    state |= {f"_feature_projections.dino.{key}": x for key, x in attention.state_dict().items()}
    state["base_model.patch_generator.cls_token.token"] = normal(1 + 3, DIM)
    model = dune_fast.load_model(written({**content, "state_dict": state}, tmp_path / "radio.pth"))
    images = torch.randn(2, 3, 24, 40)
    wanted = attention(model(images)["x_norm_patchtokens"])
    assert model.teachers == ["dino"]
    torch.testing.assert_close(model.projections(images, standardized=False)["dino"]["patch"], wanted)


def test_a_student_starts_from_a_container(tmp_path):
    """Tokens included; its images are normalised by ImageNet's statistics, the container's by CLIP's."""
    path = written(container(), tmp_path / "radio.pth")
    cfg = StudentConfig(
        image_size=32, patch_size=8, embed_dim=DIM, depth=2, num_heads=2, num_registers=3, layer_scale=None,
        final_norm=False, family="radio", cls_per_teacher=True, radio=RADIOOptions(cpe_max_size=64, spectral=2),
    )  # fmt: skip
    features = {"clip": TeacherFeatures(5, ("cls",)), "sam": TeacherFeatures(6, ("patch",))}
    student = build_student(cfg, ProjectorConfig("heads"), features)
    found = warm_start(student, str(path))
    assert found.fitted == ["gains of the spectral reparametrisation started anew"]
    assert set(found.not_taken) == {"_heads", "_feature_projections", "input_conditioner"}
    pixels, encoder = torch.rand(2, 3, 32, 40), dune_fast.load_encoder(path)
    mean, std, clip_mean, clip_std = (
        torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD, CLIP_MEAN, CLIP_STD)
    )
    ours, theirs = student.encoder((pixels - mean) / std), encoder((pixels - clip_mean) / clip_std)
    torch.testing.assert_close(ours["x_prenorm"], theirs["x_prenorm"], rtol=1e-3, atol=1e-4)


def test_published_names(tmp_path, monkeypatch):
    monkeypatch.setenv("DUNE_FAST_WEIGHTS", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"radio_v2.5-b are not here: get radio-v2.5-b_half.pth.tar from"):
        dune_fast.load_encoder("radio_v2.5-b")
    written(container(cpe_max_size=64), tmp_path / "radio-v2.5-b_half.pth.tar")
    assert dune_fast.load_encoder("radio_v2.5-b").transform.image_size == 64  # 768 px, but its table is for 64
    with pytest.raises(ModelNotFoundError, match=r"none of|radio_v2.5-b"):
        dune_fast.load_encoder("radio_v9")


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"_heads.1.fc2.weight": None}, {}, "head of sam: a head of version v1 has 'fc2.weight'"),
        ({"_heads.1.fc1.bias": None}, {}, "fc1.bias is missing"),
        ({"_heads.1.fc2.weight": torch.zeros(4, 9)}, {}, r"fc2.weight has shape \[4, 9\] instead of \[4, 6\]"),
        ({"_heads.siglip2.g.blocks.900.2.weight": torch.zeros(6, 6)}, {}, "has a layer blocks.900, but not"),
        ({"_heads.siglip2.g.fc1.weight": torch.zeros(0, DIM)}, {}, "0 hidden and 5 output channels are impossible"),
        ({"_heads.siglip2.g.extra": torch.zeros(2)}, {}, "cls.extra is not known"),
        ({"_heads.siglip2.g.fc1.bias": torch.full((6,), torch.nan)}, {}, "not finite"),
        ({}, {"mlp_version": "v9"}, "a head of version 'v9'; known are v1, v2, attn"),
        ({}, {"mlp_version": "attn"}, "head of siglip2.g: it has attention"),
        ({}, {"teachers": [TEACHERS[0] | {"fd_upsample_factor": 3}, TEACHERS[1]]}, "impossible with 3 x 3 tokens"),
        ({}, {"teachers": [TEACHERS[0] | {"fd_upsample_factor": -1}, TEACHERS[1]]}, "fd_upsample_factor is -1"),
        ({}, {"teachers": [{"name": 3}, {"name": "sam"}]}, "does not name the teachers"),
        ({}, {"teachers": [TEACHERS[0], TEACHERS[1] | {"token_slot": 7}]}, "sam reads the summary token 7 of 2"),
        ({}, {"teachers": [{"name": "x"}, {"name": "y", "token_slot": [1]}]}, r"y reads the summary token \[1\] of 2"),
        ({}, {"teachers": [{"name": "other"}]}, "has a backbone without heads"),
    ],
)  # fmt: skip
def test_containers_that_contradict_themselves(change, arguments, message, tmp_path):
    content = container(**arguments)
    if "other" in str(arguments):
        change = {key: None for key in content["state_dict"] if key.startswith(("_heads.", "_feature_"))}
    with pytest.raises(TeacherWeightsError, match=message) as caught:
        dune_fast.load_model(written(content, tmp_path / "radio.pth", change))
    assert "\n" not in str(caught.value)
