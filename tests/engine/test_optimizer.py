"""Parameter groups and clipping."""

from __future__ import annotations

import torch

from dune_fast.engine.optimizer import OptimizerConfig, build_optimizer, clip_per_parameter, parameter_groups
from dune_fast.nn.projectors import ProjectorConfig
from dune_fast.nn.student import build_student
from dune_fast.nn.vit import ViTConfig


def test_weight_decay_on_tensors_of_two_or_more_dimensions_only():
    student = build_student(ViTConfig(56, embed_dim=48, depth=1, num_heads=3), ProjectorConfig(), {"a": (8, ["patch"])})
    decayed, plain = parameter_groups(student, 0.03)
    names = {id(p): name for name, p in student.named_parameters()}
    assert all(p.ndim >= 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.03
    assert all(p.ndim < 2 for p in plain["params"]) and plain["weight_decay"] == 0.0
    in_plain = {names[id(p)] for p in plain["params"]}
    assert {"encoder.blocks.0.ls1.gamma", "encoder.blocks.0.norm1.weight"} <= in_plain
    assert not any(name.startswith("encoder.norm.") for name in in_plain)  # frozen


def test_clipping_is_per_parameter():
    gradients = [torch.full((4,), 3.0), torch.tensor([0.1, 0.2]), torch.zeros(3)]
    norms = clip_per_parameter(gradients, 1.0)
    torch.testing.assert_close(norms, torch.tensor([6.0, 0.05**0.5, 0.0]))
    torch.testing.assert_close(gradients[0].norm(), torch.tensor(6.0 / (6.0 + 1e-6)))
    torch.testing.assert_close(gradients[1], torch.tensor([0.1, 0.2]))
    assert torch.all(gradients[2] == 0)


def test_no_clipping():
    gradient = torch.full((4,), 3.0)
    clip_per_parameter([gradient], 0.0)
    assert torch.all(gradient == 3.0)


def test_step_count_lives_on_the_device():
    """A step count on the host would be read at every step."""
    layer = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(layer, OptimizerConfig())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert all(group["fused"] for group in optimizer.param_groups)
