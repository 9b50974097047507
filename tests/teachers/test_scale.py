"""Teachers on smaller images than the student's: what they see, and their tokens on the student's grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dune_fast.kernels.nn.routing import make_routes
from dune_fast.teachers.config import check_config, scaled_grid
from dune_fast.teachers.ensemble import TeacherEnsemble

PATCH = 14


@pytest.fixture
def images():
    return torch.randn(2, 3, 56, 84, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("patch_size", [14, 16, 8])
def test_images_are_made_smaller_and_tokens_laid_on_the_students_grid(toy_config, images, patch_size):
    ensemble = TeacherEnsemble({"a": toy_config(patch_size=patch_size, scale=0.5)}, PATCH)
    proj, lin = ensemble.trunks[0].module.proj, ensemble.trunks[0].module.lin
    smaller = F.interpolate(images, (2 * patch_size, 3 * patch_size), mode="bicubic", antialias=True)
    hidden = F.gelu(F.conv2d(smaller, proj.weight, proj.bias, stride=patch_size))  # [2, H, 2, 3]
    tokens = lin(hidden.permute(0, 2, 3, 1))  # [2, 2, 3, C]
    expected = F.interpolate(tokens.permute(0, 3, 1, 2), (4, 6), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
    found = ensemble(images)["a"]
    assert found["patch"].shape == (2, 24, 24) and found["patch"].is_contiguous()
    torch.testing.assert_close(found["patch"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["cls"], tokens.flatten(1, 2).mean(1), rtol=1e-5, atol=1e-5)


def test_a_token_stays_where_it_was(toy_config):
    """An image that brightens to the right by 1 a patch: in the middle of the grid tokens are those of the whole."""
    across = torch.arange(112.0).expand(1, 3, 112, 112) / PATCH
    outputs = {}
    for scale in (1.0, 0.5):
        ensemble = TeacherEnsemble({"a": toy_config(scale=scale)}, PATCH)
        module = ensemble.trunks[0].module
        for p in (module.proj.weight, module.proj.bias, module.lin.weight, module.lin.bias):
            p.zero_()
        module.proj.weight[0] = 1 / (3 * PATCH**2)  # the mean
        module.lin.weight[0, 0] = 1.0
        outputs[scale] = ensemble(across)["a"]["patch"][0, :, 0].view(8, 8)
    assert torch.equal(outputs[0.5][:, 2:6].argsort(1), torch.arange(4).expand(8, 4))
    torch.testing.assert_close(outputs[0.5][:, 2:6], outputs[1.0][:, 2:6], rtol=0, atol=0.05)


def test_one_network_at_two_scales_is_held_once_and_runs_twice(toy_config, images):
    configs = {"a": toy_config(scale=0.5), "b": toy_config(), "c": toy_config(scale=0.5, token_types=["patch"])}
    ensemble, calls = TeacherEnsemble(configs, PATCH), []
    ensemble.trunks[0].register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape[-2:])))
    outputs = ensemble(images)
    assert len(ensemble.trunks) == 1 and sorted(calls) == [(28, 42), (56, 84)]
    assert torch.equal(outputs["a"]["patch"], outputs["c"]["patch"])
    alone = TeacherEnsemble({"b": toy_config()}, PATCH)(images)["b"]
    assert torch.equal(outputs["b"]["patch"], alone["patch"]) and torch.equal(outputs["b"]["cls"], alone["cls"])


def test_a_scale_whose_grid_is_the_students_changes_nothing(toy_config, images):
    """0.95 of 4 x 6 patches is 4 x 6 patches."""
    found = TeacherEnsemble({"a": toy_config(scale=0.95)}, PATCH)(images)["a"]["patch"]
    expected = TeacherEnsemble({"a": toy_config()}, PATCH)(images)["a"]["patch"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_routed_images(toy_config, images):
    configs = {"a": toy_config(scale=0.5), "b": toy_config(scale=0.5, token_types=["patch"])}
    ensemble = TeacherEnsemble(configs, PATCH)
    whole = ensemble(images)
    routes = make_routes({"a": np.array([1]), "b": np.array([], np.int64)}, 2, images.device)
    routed = ensemble(images, routes)
    torch.testing.assert_close(routed["a"], {kind: x[1:] for kind, x in whole["a"].items()})
    assert routed["b"]["patch"].shape == (0, 24, 24)
    nothing = ensemble(images, make_routes(dict.fromkeys("ab", np.array([], np.int64)), 2, images.device))
    assert nothing["a"]["patch"].shape == (0, 24, 24) and nothing["a"]["cls"].shape == (0, 24)


@pytest.mark.parametrize(
    ("patches", "scale", "multiple", "found"),
    [(24, 0.5, 1, 12), (24, 1.0, 1, 24), (8, 0.75, 1, 6), (24, 0.6, 4, 16), (8, 0.1, 1, 1), (8, 0.1, 4, 4)],
)
def test_grids(patches, scale, multiple, found):
    assert scaled_grid(patches, scale, multiple) == found


def test_grid_multiple_holds_for_the_smaller_grid(toy_config):
    ensemble, seen = TeacherEnsemble({"a": toy_config(scale=0.5, grid_multiple=4)}, PATCH), []
    ensemble.trunks[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[-2:])))
    assert ensemble(torch.zeros(1, 3, 112, 168))["a"]["patch"].shape[1] == 8 * 12
    assert seen == [(56, 112)]  # 4 x 8 patches; 4 x 6 would be no multiples of 4


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5, float("nan")])
def test_a_scale_that_cannot_be_is_explained(toy_config, scale):
    with pytest.raises(ValueError, match=r"teachers.a.scale is .*; it must lie above 0, up to 1"):
        check_config("a", toy_config(scale=scale))
