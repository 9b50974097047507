"""Teachers with an input of their own: another size than the student's, several images on one canvas, an own grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dune_fast.kernels.nn.routing import make_routes
from dune_fast.teachers.config import check_config, given_patches, seen
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.inputs import Mosaic, fit_longest, on_grid

PATCH = 14


@pytest.fixture
def squares():
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def applied(ensemble: TeacherEnsemble, images: torch.Tensor) -> torch.Tensor:
    """The toy teacher's patch tokens of images that are its input, [B, h, w, C], by torch's own operations."""
    module, patch = ensemble.trunks[0].module, ensemble.teachers["a"].config.patch_size
    return module.lin(F.gelu(F.conv2d(images, module.proj.weight, module.proj.bias, stride=patch)).permute(0, 2, 3, 1))


@pytest.mark.parametrize("size", [84, 42])
def test_a_teacher_runs_at_its_own_size_whatever_the_students(toy_config, squares, size):
    ensemble = TeacherEnsemble({"a": toy_config(input_size=size, grid_multiple=3)}, PATCH)
    assert ensemble.size_multiple == PATCH
    tokens = applied(ensemble, F.interpolate(squares, (size, size), mode="bicubic", antialias=size < 56))
    laid = F.interpolate(tokens.permute(0, 3, 1, 2), (4, 4), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(ensemble(squares)["a"]["patch"], laid, rtol=1e-5, atol=1e-5)
    own = TeacherEnsemble({"a": toy_config(input_size=size, grid="own")}, PATCH)(squares)["a"]
    torch.testing.assert_close(own["patch"], tokens.flatten(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own["cls"], tokens.flatten(1, 2).mean(1), rtol=1e-5, atol=1e-5)


def test_an_image_that_is_no_square_is_filled_up_with_zeros_and_read_without_them(toy_config, images):
    """Of 56 x 84 pixels, 42 columns: 28 rows of pixels, two of the teacher's three rows of tokens."""
    ensemble = TeacherEnsemble({"a": toy_config(input_size=42, mean=[0.5] * 3, std=[0.5] * 3)}, PATCH)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    inside = ((images * std + mean) - 0.5) / 0.5
    filled = F.pad(F.interpolate(inside, (28, 42), mode="bicubic", antialias=True), (0, 0, 0, 14))
    tokens = applied(ensemble, filled)[:, :2]  # [2, 2, 3, C]
    expected = F.interpolate(tokens.permute(0, 3, 1, 2), (4, 6), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
    found = ensemble(images)["a"]["patch"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="do not fill its own grid of 3x3"):
        TeacherEnsemble({"a": toy_config(input_size=42, grid="own")}, PATCH)(images)


def test_images_on_a_canvas_are_those_alone(toy_config, squares):
    """The toy teacher sees a patch at a time, so tokens do not depend on what lies beside them."""
    ensemble, seen_shapes = TeacherEnsemble({"a": toy_config(mosaic=126)}, PATCH), []
    ensemble.trunks[0].register_forward_pre_hook(lambda _, args: seen_shapes.append(tuple(args[0].shape)))
    images = torch.cat([squares, squares.flip(0)])
    found, alone = ensemble(images)["a"], TeacherEnsemble({"a": toy_config()}, PATCH)(images)["a"]
    assert seen_shapes == [(2, 3, 126, 126)]  # 2 x 2 a canvas
    torch.testing.assert_close(found["patch"], alone["patch"])
    assert torch.equal(found["cls"][0], found["cls"][3]) and not torch.equal(found["cls"][0], found["cls"][4])


@pytest.mark.parametrize(
    ("image", "canvas", "per_side", "tile"), [(432, 1024, 2, 512), (320, 1024, 3, 336), (8, 20, 2, 8)]
)
def test_mosaics(image, canvas, per_side, tile):
    """Regression: at 3 x 320 px on 1024, tiles of 341 px would not begin at a patch."""
    patch = 16 if image > 16 else 4
    mosaic = Mosaic(image, canvas, patch)
    assert (mosaic.per_side, mosaic.tile) == (per_side, tile)
    images = torch.randn(per_side**2 + 1, 3, image, image)
    packed = mosaic.pack(images)
    assert packed.shape == (2, 3, canvas, canvas)
    mean = F.avg_pool2d(packed, patch)
    torch.testing.assert_close(mosaic.unpack(mean, len(images)), F.avg_pool2d(images, patch))
    assert torch.count_nonzero(packed) == torch.count_nonzero(images)


def test_one_network_with_several_inputs_is_held_once_and_routes_hold(toy_config, squares):
    configs = {
        "a": toy_config(input_size=84), "b": toy_config(), "c": toy_config(input_size=84, token_types=["patch"]),
        "d": toy_config(input_size=84, grid="own", token_types=["patch"]), "e": toy_config(mosaic=112),
    }  # fmt: skip
    ensemble, calls = TeacherEnsemble(configs, PATCH), []
    ensemble.trunks[0].register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape[::3])))
    whole = ensemble(squares)
    assert len(ensemble.trunks) == 1 and sorted(calls) == [(1, 112), (3, 56), (3, 84)]
    assert whole["d"]["patch"].shape[1] == 36 and whole["c"]["patch"].shape[1] == 16
    routes = make_routes({n: np.array([1] if n in "ae" else [], np.int64) for n in "abcde"}, 3, squares.device)
    routed = ensemble(squares, routes)
    torch.testing.assert_close(routed["a"], {kind: x[1:2] for kind, x in whole["a"].items()})
    torch.testing.assert_close(routed["e"]["patch"], whole["e"]["patch"][1:2])
    assert routed["d"]["patch"].shape == (0, 36, 24) and routed["b"]["patch"].shape == (0, 16, 24)


def test_a_view_of_its_own_goes_to_its_teacher_alone(toy_config, squares):
    configs = {"a": toy_config(input_size=84), "b": toy_config(weights="random:2")}
    ensemble = TeacherEnsemble(configs, PATCH)
    view = torch.randn(3, 3, 84, 84)
    found, plain = ensemble(squares, views={"a": view}), ensemble(squares)
    torch.testing.assert_close(found["b"], plain["b"])
    tokens = applied(ensemble, view).permute(0, 3, 1, 2)
    expected = F.interpolate(tokens, (4, 4), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(found["a"]["patch"], expected, rtol=1e-5, atol=1e-5)


def test_the_part_of_a_grid_that_shows_the_picture_is_laid_over_the_other_one():
    ramp = torch.arange(6.0).expand(1, 6, 6)[..., None].flatten(1, 2)
    half = on_grid(ramp, (6, 6), (6, 3.0), (6, 6)).view(6, 6)
    torch.testing.assert_close(half[0], torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.0]))  # the next one shows none


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input_size": 30}, r"input_size is 30; give a multiple of 14"),
        ({"input_size": 42, "grid_multiple": 2}, r"input_size is 42; give a multiple of 28"),
        ({"input_size": 42, "scale": 0.5}, r"scale is 0.5; with input_size it has no meaning"),
        ({"mosaic": 100}, r"mosaic is 100; give a multiple of 14"),
        ({"mosaic": 28, "input_size": 42}, r"mosaic is 28; .* not below input_size"),
        ({"grid": "mine"}, r"grid is 'mine'; choose one of student, own"),
    ],
)
def test_an_input_that_cannot_be_is_explained(toy_config, fields, words):
    with pytest.raises(ValueError, match=words):
        check_config("a", toy_config(**fields))


def test_what_a_network_gets_is_known_without_it(toy_config):
    assert seen(toy_config(), 4) == (56, 1, 4) and seen(toy_config(input_size=84), 4) == (84, 1, 6)
    assert seen(toy_config(mosaic=126), 4) == (126, 4, 4) and seen(toy_config(mosaic=42), 4).images == 0
    assert given_patches(toy_config(input_size=84, grid="own"), 4) == 36
    assert given_patches(toy_config(scale=0.5), 4) == 16


def test_the_longer_side_is_fitted():
    x = torch.randn(1, 3, 21, 34)
    found = fit_longest(x, 32)
    assert torch.equal(found[:, :, :20], F.interpolate(x, (20, 32), mode="bicubic")) and not found[:, :, 20:].any()
    assert fit_longest(found, 32) is found
