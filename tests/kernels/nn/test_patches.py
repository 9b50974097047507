"""The patch embedding as a product is the convolution whose weights it has."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dune_fast.kernels.library import traced
from dune_fast.kernels.nn import patches as module
from dune_fast.kernels.nn.patches import PatchEmbed, SharedPatches, unfold
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import build_student
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.ensemble import TeacherEnsemble


def images(height: int = 28, width: int = 42) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("patch", [14, 7])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_the_convolution_and_its_gradients(patch, channels_last):
    """Padded, as on a GPU, and as on a CPU."""
    torch.manual_seed(0)
    embed = PatchEmbed(patch, 24)
    x = images().to(memory_format=torch.channels_last) if channels_last else images()
    x.requires_grad_()
    upstream = torch.randn(2, (28 // patch) * (42 // patch), 24)
    inputs = x, embed.proj.weight, embed.proj.bias
    expected = embed.proj(x).flatten(2).transpose(1, 2)
    expected = expected, *torch.autograd.grad(expected, inputs, upstream)
    plain = embed(x)
    with traced():
        assert unfold(x, patch, x.dtype).shape[-1] % 16 == 0 != 3 * patch**2 % 16
        padded = embed(x)
    for tokens in plain, padded:
        torch.testing.assert_close((tokens, *torch.autograd.grad(tokens, inputs, upstream)), expected)


def test_computes_in_the_type_that_autocast_asks_for():
    torch.manual_seed(0)
    embed, x = PatchEmbed(14, 24), images()
    with torch.autocast("cpu", torch.bfloat16):
        tokens, expected = embed(x), embed.proj(x).flatten(2).transpose(1, 2)
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens, expected, rtol=1e-2, atol=1e-2)
    frozen = embed.bfloat16()  # as `teachers.precision.prepare` leaves it
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(frozen(x), tokens, rtol=1e-2, atol=1e-2)


def test_a_step_unfolds_once_what_several_networks_see(monkeypatch):
    """Student, DINOv2 and Multi-HMR take the same pixels; MASt3R's patches are of another size and normalisation."""
    calls = []

    def counted(x: torch.Tensor, patch_size: int, dtype: torch.dtype) -> torch.Tensor:
        calls.append((patch_size, dtype))
        return unfold(x, patch_size, dtype)

    monkeypatch.setattr(module, "unfold", counted)
    half = [0.5] * 3
    teachers = {
        "dinov2": TeacherConfig("dinov2", "random:1", 14, 192, image_size=28),
        "mast3r": TeacherConfig("mast3r", "random:2", 16, 192, ["patch"], mean=half, std=half),
        "multihmr": TeacherConfig("multihmr", "random:3", 14, 192, ["patch"], image_size=28),
    }
    ensemble = TeacherEnsemble(teachers, 14, torch.bfloat16)
    cfg = ViTConfig(image_size=28, embed_dim=48, depth=1, num_heads=3)
    student = build_student(cfg, ProjectorConfig(), {"dinov2": (192, ("cls", "patch"))})
    student.compute_in(torch.bfloat16)
    x, shared = images(28, 28), SharedPatches()
    with torch.no_grad():
        student(x, None, shared)
        outputs = ensemble(x, None, shared)
        assert sorted(calls) == [(14, torch.bfloat16), (16, torch.bfloat16)]
        torch.testing.assert_close(outputs, ensemble(x), rtol=0, atol=0)
    assert len(calls) == 4  # on their own the teachers share among themselves
    assert len(shared._unfolded) == 1  # MASt3R's, which nobody else sees, are not kept


def test_other_images_of_the_same_shape_are_not_taken_for_those_unfolded():
    shared, x = SharedPatches(), images()
    first = shared(x, 14, x.dtype)
    assert shared(x, 14, x.dtype) is first and shared(x, 7, x.dtype) is not first
    other = shared(x + 1, 14, x.dtype)
    torch.testing.assert_close(other, first + 1)


def test_padding_is_no_part_of_the_operations():
    """A CPU's rows are not padded, so what is counted on it is what `dune_fast.engine.flops` says."""
    embed = PatchEmbed(14, 24)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        embed(images())
    assert counter.get_total_flops() == 2 * 2 * 6 * 588 * 24
