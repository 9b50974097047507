"""A narrower student out of a teacher, in closed form."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dune_fast.distill.narrowing import NarrowingError, best_heads, check_pair, narrow, ridge
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig

TEACHER = ViTConfig(28, 14, 32, 3, 4, num_registers=0, layer_scale=1.0)


def drawn(cfg: ViTConfig) -> VisionTransformer:
    """Not as small as drawn for training: an MLP that does something."""
    torch.manual_seed(0)
    vit = VisionTransformer(cfg).init_weights()
    for module in vit.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.1)
    return vit


@pytest.mark.parametrize("changed", [{}, {"num_registers": 2}, {"layer_scale": None}])
def test_a_student_of_the_teachers_own_width_is_the_teacher(changed):
    """Nothing but the direction of the mean is lost, which LayerNorm does not see."""
    cfg = dataclasses.replace(TEACHER, embed_dim=16, **changed)
    student = VisionTransformer(dataclasses.replace(cfg, layer_scale=1e-4)).init_weights()
    assert max(narrow(student, drawn(cfg), torch.randn(64, 3, 28, 28), 3)) < 0.02


def test_a_narrower_student_is_nearer_to_the_teacher_than_drawn_weights():
    student = VisionTransformer(ViTConfig(28, 14, 16, 3, 2, num_registers=4, layer_scale=1e-4)).init_weights()
    untouched = student.blocks[2].mlp.fc1.weight.clone()
    lost = narrow(student, drawn(TEACHER), torch.randn(64, 3, 28, 28), 2)
    assert len(lost) == 2 and max(lost) < 0.8
    assert torch.equal(student.blocks[2].mlp.fc1.weight, untouched)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"patch_size": 7}, "patch size is 7, the student's 14"),
        ({"embed_dim": 8, "num_heads": 1}, "has 8 channels, the student 16, which is more"),
        ({"num_heads": 8}, "heads have 4 channels, the student's 8"),
        ({"cls_token": False, "pos_embed": "rope2d"}, "the teacher has no cls token; the teacher has no position"),
        ({"mlp": "swiglu"}, "the teacher's MLP is swiglu, not gelu"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(changed, message):
    with pytest.raises(NarrowingError, match=message):
        check_pair(ViTConfig(28, 14, 16, 3, 2), dataclasses.replace(TEACHER, **changed))


def test_ridge_and_heads():
    x = torch.randn(200, 6)
    weight, bias = torch.randn(2, 6), torch.randn(2)
    found = ridge(x, x @ weight.T + bias, penalty=1e-9)
    torch.testing.assert_close(found[0], weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1], bias, atol=1e-4, rtol=0)
    outputs = torch.randn(300, 8)
    assert best_heads(outputs, outputs[:, [2, 3, 6]], heads=4, count=2) == [1, 3]
