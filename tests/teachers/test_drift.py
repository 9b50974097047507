"""The drift report: computed as it says, refused where it must be, at the start of a run and on the command line."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from bench.toy.conv_patchify import conv_patchify
from dune_fast.teachers.drift import LIMITS, DriftError, check_drift, drift_rows, measure_drift
from dune_fast.teachers.ensemble import TeacherEnsemble


@pytest.fixture
def images():
    return torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def offset_weights(tmp_path):
    """Features about 1000 with a deviation near 1, of which bfloat16 keeps no digit after the point."""

    def make(offset: float = 1000.0) -> str:
        state = conv_patchify(14, 24).state_dict()
        state["lin.bias"] += offset
        save_file(state, tmp_path / f"{offset:g}.safetensors")
        return str(tmp_path / f"{offset:g}.safetensors")

    return make


def test_it_is_the_token_cosine_of_standardized_features(toy_config, images):
    configs = {"a": toy_config(), "b": toy_config(weights="random:2", precision="fp32"), "c": toy_config(patch_size=16)}
    low = TeacherEnsemble(configs, 14, torch.bfloat16)
    full = TeacherEnsemble(configs, 14)
    found = measure_drift(low, images)
    assert [(d.teacher, d.token, d.precision) for d in found] == [
        ("a", "cls", "bf16"), ("a", "patch", "bf16"), ("c", "cls", "bf16"), ("c", "patch", "bf16"),
    ]  # fmt: skip
    for d in found:
        x, y = (e(images)[d.teacher][d.token].double().flatten(0, -2) for e in (full, low))
        cosine = F.cosine_similarity((y - x.mean(0)) / x.std(0), (x - x.mean(0)) / x.std(0), dim=-1)
        assert 1 - d.mean_cosine == pytest.approx(float(1 - cosine.mean()), rel=1e-3) and d.mean_cosine < 1
        assert 1 - d.min_cosine == pytest.approx(float(1 - cosine.min()), rel=1e-3)
        assert d.limit == LIMITS["bf16"] and d.mean_cosine >= d.min_cosine


def test_teachers_that_compute_in_float32_are_not_in_it(toy_config, images):
    assert measure_drift(TeacherEnsemble({"a": toy_config()}, 14), images) == []


def test_a_precision_too_coarse_for_a_teacher_is_refused(toy_config, offset_weights, images):
    coarse = toy_config(weights=offset_weights(), precision="bf16")
    ensemble = TeacherEnsemble({"good": toy_config(precision="bf16"), "far": coarse}, 14)
    found = measure_drift(ensemble, images)
    raw = F.cosine_similarity(*(e(images)["far"]["patch"].float() for e in (
        ensemble, TeacherEnsemble({"far": toy_config(weights=offset_weights())}, 14))), dim=-1)  # fmt: skip
    assert 1 - raw.mean() < 1e-5  # which raw features do not show
    assert {d.teacher for d in found if d.exceeds} == {"far"}
    with pytest.raises(DriftError, match=r"far's patch tokens in bf16 are 0\.\d+ from float32, at most 0.001.*"
                       r"set teachers.far.precision=fp32, or force_precision=true") as caught:  # fmt: skip
        check_drift(found)
    assert "good" not in str(caught.value)
    assert [row[-1] for row in drift_rows(found)] == ["ok", "ok", "refused", "refused"]


def test_what_is_forced_or_drawn_is_reported_and_not_refused(toy_config, offset_weights, images):
    forced = toy_config(weights=offset_weights(), precision="bf16", force_precision=True)
    vit = {"family": "dinov2", "num_features": 192, "image_size": 56, "layer": 4, "precision": "fp8"}
    found = measure_drift(TeacherEnsemble({"a": forced, "b": toy_config(**vit)}, 14), images)
    assert all(d.forced for d in found) and {d.teacher for d in found if d.exceeds} >= {"a"}
    assert {d.limit for d in found if d.teacher == "b"} == {5e-3}
    check_drift(found)


def test_features_that_are_not_finite_exceed_every_limit(toy_config, offset_weights, images):
    ensemble = TeacherEnsemble({"a": toy_config(weights=offset_weights(0.0), precision="bf16")}, 14)
    assert not any(d.exceeds for d in measure_drift(ensemble, images))
    ensemble.trunks[0].module.lin.weight[0, 0] = float("inf")
    found = measure_drift(ensemble, images)
    assert all(d.exceeds for d in found)
    with pytest.raises(DriftError, match="a's patch tokens in bf16 are nan from float32"):
        check_drift(found)


def test_one_image_has_no_deviation(toy_config, images):
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        measure_drift(TeacherEnsemble({"a": toy_config()}, 14, torch.bfloat16), images[:1])
