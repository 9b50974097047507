"""Projectors that fit before the first step."""

from __future__ import annotations

import pytest
import torch

from dune_fast.distill.projector_fit import fit_projectors
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.kernels.distill_loss import standardize
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import Student, build_student

TEACHERS = {"one": (8, ("cls", "patch")), "two": (12, ("patch",))}
IMAGES = 48


def student(kind: str) -> Student:
    cfg = ViTConfig(28, 14, 16, 2, 2, num_registers=1, layer_scale=1.0)
    return build_student(cfg, ProjectorConfig(kind=kind, hidden_dim=32, last_hidden_dim=32), TEACHERS)


def hidden_linear_maps(student: Student, images: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Features that a last layer can give: the projections of a student whose last layers are other ones."""
    with torch.no_grad():
        for projector in student.projectors.values():
            for layer in set(projector.last_layers().values()):
                torch.nn.init.normal_(layer.weight)
                torch.nn.init.normal_(layer.bias)
        return {name: {k: 3 * x + 5 for k, x in tokens.items()} for name, tokens in student(images).items()}


def batches(images, features, rows=None):
    rows = rows or {name: torch.arange(16) for name in TEACHERS}
    for at in range(0, IMAGES, 16):
        part = {name: {k: x[at : at + 16] for k, x in tokens.items()} for name, tokens in features.items()}
        yield images[at : at + 16], part, rows


@pytest.mark.parametrize("kind", ["tp", "sp", "lp"])
@pytest.mark.parametrize("convention", ["dune", "phi_s"])
def test_features_that_a_last_layer_can_give_are_found(kind, convention, monkeypatch):
    """Up to the penalty, and to cls and patches having means of their own where they share a layer."""
    monkeypatch.setattr("dune_fast.distill.projector_fit.PENALTY", 1e-9)
    images = torch.randn(IMAGES, 3, 28, 28)
    features = hidden_linear_maps(student(kind), images)
    fitted, statistics = student(kind), TeacherStatistics(TEACHERS, convention)
    if convention == "phi_s":
        statistics.estimate([features])
    explained = fit_projectors(fitted, batches(images, features), statistics)
    assert set(explained) == set(TEACHERS) and explained["two"] > 0.98
    assert explained["one"] > (0.98 if kind == "lp" else 0.3)
    with torch.no_grad():
        found = fitted(images)["two"]["patch"]
    if convention == "dune":
        statistics.update(features, 1.0)
    wanted = standardize(statistics.rotated(features)["two"]["patch"], *statistics.running()["two"]["patch"])
    assert (found - wanted).square().mean() < 0.02 * wanted.square().mean()


def test_shared_layers_are_the_best_for_cls_and_patches_in_equal_parts():
    """No step away from the solution makes the penalised error of the standardized features smaller."""
    images = torch.randn(IMAGES, 3, 28, 28)
    torch.manual_seed(1)
    features = {
        name: {k: torch.randn(IMAGES, *([4] if k == "patch" else []), channels) for k in tokens}
        for name, (channels, tokens) in TEACHERS.items()
    }
    fitted, statistics = student("tp"), TeacherStatistics(TEACHERS)
    fit_projectors(fitted, batches(images, features), statistics)
    statistics.update(features, 1.0)
    standard = statistics.running()["one"]

    def error() -> float:
        with torch.no_grad():
            found = fitted(images)["one"]
        parts = [(found[k] - standardize(features["one"][k], *standard[k])).square().mean() for k in found]
        return (sum(parts) / len(parts)).item()

    layer = fitted.projectors["one"].linear
    best, bias = error(), layer.bias.data.clone()
    for shift in (0.05, -0.05):
        layer.bias.data = bias + shift
        assert error() > best


def test_images_that_do_not_count_for_a_teacher_are_left_out():
    images = torch.randn(IMAGES, 3, 28, 28)
    features = hidden_linear_maps(student("tp"), images)
    spoiled = {name: {k: x.clone() for k, x in tokens.items()} for name, tokens in features.items()}
    for at in range(0, IMAGES, 16):
        spoiled["two"]["patch"][at + 8 : at + 16] = 1e6
    rows = {"one": torch.arange(16), "two": torch.arange(8)}
    whole, part = student("tp"), student("tp")
    fit_projectors(whole, batches(images, features, rows), TeacherStatistics(TEACHERS))
    fit_projectors(part, batches(images, spoiled, rows), TeacherStatistics(TEACHERS))
    torch.testing.assert_close(part.projectors["two"].linear.weight, whole.projectors["two"].linear.weight)
