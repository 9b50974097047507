"""What CLIP, SigLIP, DINOv3 and SAM have in common: precision, drift, `verify`, and where their files do not belong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import dune_fast
from bench.eager_step import check_plain
from dune_fast.engine import start
from dune_fast.engine.cache_fingerprint import fingerprint as cache_fingerprint
from dune_fast.engine.config import ConfigError, RunConfig
from dune_fast.engine.flops import count_flops, published_network, teacher_flops, vit_flops
from dune_fast.engine.warm_start import WarmStartError, warm_start
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.planner.calibrate import _random_teachers
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import build_student
from dune_fast.teacher_files import load_teacher_config
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.drift import measure_drift
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.registry import build_teacher, family_class
from dune_fast.teachers.verify import inspect_file
from tests.teachers.test_clip_family import drawn, open_clip_names
from tests.teachers.test_depth_anything_family import transformers_model as depth_anything_model
from tests.teachers.test_dinov3_family import released as dinov3_file
from tests.teachers.test_dinov3_family import transformers_model as dinov3_model
from tests.teachers.test_sam_family import released as sam_file
from tests.teachers.test_sam_family import transformers_encoder as sam_encoder

FAMILIES = ("clip", "open_clip", "siglip", "dinov3", "sam", "depth_anything")


def _clip():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = drawn(CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)))
    return {k if k.startswith("vision_model.") else f"vision_model.{k}": v for k, v in model.state_dict().items()}


def _open_clip():
    import timm

    options = {"embed_dim": 32, "num_heads": 2, "depth": 3, "img_size": 32, "patch_size": 8, "num_classes": 10}
    return open_clip_names(drawn(timm.create_model("vit_base_patch16_clip_224", **options)).state_dict())


def _siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = drawn(SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8)))
    return {f"vision_model.{key}": value for key, value in model.state_dict().items()}


CHANNELS = {"depth_anything": 5}
MAKERS = {
    "clip": _clip, "open_clip": _open_clip, "siglip": _siglip,
    "dinov3": lambda: dinov3_file(dinov3_model(False).state_dict(), False),
    "depth_anything": lambda: depth_anything_model().state_dict(),
    "sam": lambda: sam_file(sam_encoder().state_dict()),
}  # fmt: skip


@pytest.fixture
def published(tmp_path):
    """`published(family)` is the configuration of a small file of its layout."""

    def make(family, **fields):
        path = tmp_path / f"{family}.safetensors"
        save_file({key: value.contiguous() for key, value in MAKERS[family]().items()}, path)
        kind = family_class(family)
        return TeacherConfig(
            **{"family": family, "weights": str(path), "patch_size": 8, "num_features": CHANNELS.get(family, 32),
               "num_heads": 2,
               "token_types": list(kind.token_types), "mean": list(kind.statistics[0]), "std": list(kind.statistics[1]),
               **fields}
        )  # fmt: skip

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_precisions(family, published, images):
    """Images come from a student of patch 14, resized and normalised as the family wants them."""
    cfg = published(family)
    full = TeacherEnsemble({"a": cfg}, 14)(images)["a"]
    assert set(full) == set(cfg.token_types)
    assert full["patch"].shape == (2, 4 * 6, cfg.num_features)
    for precision, limit in (("bf16", 3e-2), ("fp8", 0.3)):
        ensemble = TeacherEnsemble({"a": TeacherConfig(**{**vars(cfg), "precision": precision})}, 14)
        for kind, x in ensemble(images)["a"].items():
            error = float((x.float() - full[kind]).norm() / full[kind].norm())
            assert 0 < error < limit, (precision, kind, error)


@pytest.mark.parametrize("family", FAMILIES)
def test_drift_is_measured(family, published):
    """The gate compares with float32; random weights of 32 channels are rougher than trained ones of 768."""
    images = torch.randn(8, 3, 56, 84)
    drifts = measure_drift(TeacherEnsemble({"a": published(family, precision="bf16")}, 14), images)
    assert {drift.token for drift in drifts} == set(family_class(family).token_types)
    assert all(0.98 < drift.mean_cosine < 1 and not drift.forced for drift in drifts), drifts


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_recognises_the_file(family, published):
    cfg = published(family)
    report = inspect_file(cfg.weights, num_heads=2)
    assert (report.family, report.sound, report.unplaced) == (family, True, []), report
    assert report.config.num_features == cfg.num_features and report.config.mean == cfg.mean
    assert set(report.fingerprint) == set(cfg.token_types)
    unused = {"dinov3": {"mask_token", "local_cls_norm.weight", "local_cls_norm.bias"}}
    unused["sam"] = {"mask_decoder.iou_token.weight"}
    unused["depth_anything"] = {"head.conv3.weight", "head.conv3.bias"}
    assert set(report.fit.surplus) == unused.get(family, set())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_students_encoder_is_another_network(family, published):
    cfg = published(family)
    with pytest.raises(TeacherWeightsError, match=f"is of the family {family}, whose network is another"):
        dune_fast.load_encoder(cfg.weights)
    small = ViTConfig(image_size=56, embed_dim=32, depth=1, num_heads=2)
    student = build_student(small, ProjectorConfig(num_heads=2), {"a": (32, ["patch"])})
    with pytest.raises(WarmStartError, match=f"is of the family {family}, whose network is another"):
        warm_start(student, cfg.weights)


@pytest.mark.parametrize(
    ("name", "grid"), [("clip_vitl14", 16), ("siglip2_vitb16_224", 14), ("dinov3_vitb16", 16), ("sam_vitb16", 64)]
)
def test_operations_of_published_sizes(name, grid):
    """Counted on tensors without data; a ViT by its formula, SAM, whose windows save most of the attention, itself."""
    cfg = load_teacher_config(name)
    network = published_network(name, cfg)
    counted = teacher_flops(name, cfg, grid)
    if cfg.family == "sam":
        assert counted < 0.8 * vit_flops(network.cfg, grid)
    else:
        assert counted == vit_flops(network.cfg, grid)
        assert abs(count_flops(network, (grid * cfg.patch_size,) * 2) - counted) < 0.02 * counted


def test_a_student_cannot_start_from_another_network(published):
    teacher = build_teacher("a", published("clip"))
    opened = SimpleNamespace(
        cfg=SimpleNamespace(start=SimpleNamespace(teacher="a")), teachers=SimpleNamespace(teachers={"a": teacher})
    )
    with pytest.raises(ConfigError, match="start.teacher='a' is of family clip, no network of a student"):
        start._check(opened)
    with pytest.raises(ValueError, match="the eager baseline has plain ViT teachers only; a is of another family"):
        check_plain(None, None, {"a": teacher})


def test_calibration_draws_what_the_configuration_says():
    """Readings with channels of their own do not say the network's size."""
    names = ("clip_vitl14", "open_clip_dfn5b_vith14_378_summary", "sam_vith16_neck", "dinov3_vitb16")
    cfg = SimpleNamespace(
        teachers={name: load_teacher_config(name) for name in names}, image_size=224,
        student=SimpleNamespace(patch_size=14),
    )  # fmt: skip
    drawn = {name for name, teacher in _random_teachers(cfg).items() if teacher.weights.startswith("random:")}
    assert drawn == {"clip_vitl14", "dinov3_vitb16"}


def test_a_cache_of_an_older_version_is_still_known():
    """Fields that it does not have are left out of its fingerprint where they are empty."""
    teacher = TeacherConfig("clip", "random:0", 16, 768, image_size=32)
    run = RunConfig(teachers={"a": teacher})
    plain = cache_fingerprint(run, [], torch.device("cpu"))
    assert not {key for key in plain if "activation" in key or "projected" in key}
    teacher.activation = "gelu"
    other = cache_fingerprint(run, [], torch.device("cpu"))
    assert {key for key in other if plain.get(key) != other[key]} == {"teachers.a.activation"}


def test_drawn_weights_need_an_image_size_and_no_projection():
    cfg = TeacherConfig("clip", "random:0", 16, 768)
    for fields, message in (({}, "image_size"), ({"image_size": 32, "projected": True}, "the file is needed")):
        with pytest.raises(ValueError, match=message):
            build_teacher("a", TeacherConfig(**{**vars(cfg), **fields}))
