"""Parameter groups and clipping."""

from __future__ import annotations

import pytest
import torch

from dune_fast.engine.optimizer import OptimizerConfig, build_optimizer, parameter_groups, scale_gradients
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.student import ProjectorConfig, build_student


def test_weight_decay_on_tensors_of_two_or_more_dimensions_only():
    student = build_student(ViTConfig(56, embed_dim=48, depth=1, num_heads=3), ProjectorConfig(), {"a": (8, ["patch"])})
    decayed, plain = parameter_groups(student, 0.03)
    names = {id(p): name for name, p in student.named_parameters()}
    assert all(p.ndim >= 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.03
    assert all(p.ndim < 2 for p in plain["params"]) and plain["weight_decay"] == 0.0
    in_plain = {names[id(p)] for p in plain["params"]}
    assert {"encoder.blocks.0.ls1.gamma", "encoder.blocks.0.norm1.weight"} <= in_plain
    assert not any(name.startswith("encoder.norm.") for name in in_plain)  # frozen


def gradients() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Pieces of three parameters' gradients, the last one's in two; whole norms; whose each piece is."""
    pieces = [torch.full((4,), 3.0), torch.tensor([0.1, 0.2]), torch.tensor([2.0]), torch.tensor([0.0, 1.5])]
    return pieces, torch.tensor([6.0, 0.05**0.5, 2.5]), torch.tensor([0, 1, 2, 2])


def test_clipping_is_per_parameter():
    pieces, norms, owners = gradients()
    before = [piece.clone() for piece in pieces]
    scale_gradients(pieces, norms, owners, OptimizerConfig(clip_per_parameter=1.0))
    expected = [1 / (6 + 1e-6), 1.0, 1 / (2.5 + 1e-6), 1 / (2.5 + 1e-6)]
    for found, was, scale in zip(pieces, before, expected, strict=True):
        torch.testing.assert_close(found, was * scale)


def test_clipping_of_all_together_is_torchs():
    pieces, norms, owners = gradients()
    parameter = torch.nn.Parameter(torch.zeros(9))
    parameter.grad = torch.cat(pieces)
    torch.nn.utils.clip_grad_norm_([parameter], 0.5)
    scale_gradients(pieces, norms, owners, OptimizerConfig(clip_per_parameter=0.0, clip_global=0.5))
    torch.testing.assert_close(torch.cat(pieces), parameter.grad)


def test_no_clipping():
    pieces, norms, owners = gradients()
    scale_gradients(pieces, norms, owners, OptimizerConfig(clip_per_parameter=0.0))
    assert all(map(torch.equal, pieces, gradients()[0]))


def test_the_two_kinds_of_clipping_exclude_each_other():
    with pytest.raises(ValueError, match="clip_per_parameter=1 and clip_global=2 exclude each other"):
        OptimizerConfig(clip_global=2.0)


def test_a_step_that_is_not_finite_leaves_weights_and_moments_alone():
    layer = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(layer, OptimizerConfig())
    assert all(group["fused"] for group in optimizer.param_groups)  # the others' step count is read by the host
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
    for finite in (True, False, True):
        before = [p.detach().clone() for p in layer.parameters()]
        count = [state["step"].clone() for state in optimizer.state.values()]
        optimizer.zero_grad()
        (layer(torch.ones(1, 3)).sum() * (1.0 if finite else float("nan"))).backward()
        optimizer.found_inf = torch.tensor(0.0 if finite else 1.0)
        optimizer.step()
        same = [torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True)]
        assert same == [not finite] * 2
        if count:
            assert [float(s["step"]) for s in optimizer.state.values()] == [float(c) + finite for c in count]
    assert all(torch.isfinite(x).all() for state in optimizer.state.values() for x in state.values())
