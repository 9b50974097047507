"""Parameter groups, and what of clipping tests/engine/test_deepspeed_engine.py does not compare with torch."""

from __future__ import annotations

import pytest
import torch

from dune_fast.engine.optimizer import OptimizerConfig, parameter_groups, scale_gradients
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import build_student


def test_weight_decay_on_tensors_of_two_or_more_dimensions_only():
    student = build_student(ViTConfig(56, embed_dim=48, depth=1, num_heads=3), ProjectorConfig(), {"a": (8, ["patch"])})
    decayed, plain = parameter_groups(student, 0.03)
    names = {id(p): name for name, p in student.named_parameters()}
    assert all(p.ndim >= 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.03
    assert all(p.ndim < 2 for p in plain["params"]) and plain["weight_decay"] == 0.0
    in_plain = {names[id(p)] for p in plain["params"]}
    assert {"encoder.blocks.0.ls1.gamma", "encoder.blocks.0.norm1.weight"} <= in_plain
    assert not any(name.startswith("encoder.norm.") for name in in_plain)  # frozen


def test_the_bias_of_a_layer_norm_over_a_map_does_not_decay():
    decayed, plain = parameter_groups(torch.nn.LayerNorm((3, 4, 4)), 0.1)
    assert [len(group["params"]) for group in (decayed, plain)] == [1, 1] and plain["weight_decay"] == 0


def test_vectors_decay_on_demand():
    decayed, vectors = parameter_groups(torch.nn.Linear(2, 3), 0.1, vectors=True)
    assert decayed["weight_decay"] == vectors["weight_decay"] == 0.1 and len(vectors["params"]) == 1


def test_no_clipping():
    pieces = [torch.full((4,), 3.0), torch.tensor([0.1, 0.2])]
    scale_gradients(pieces, torch.tensor([6.0, 0.2]), torch.tensor([0, 1]), OptimizerConfig(clip_per_parameter=0.0))
    assert torch.equal(pieces[0], torch.full((4,), 3.0)) and torch.equal(pieces[1], torch.tensor([0.1, 0.2]))


def test_the_two_kinds_of_clipping_exclude_each_other():
    with pytest.raises(ValueError, match="clip_per_parameter=1 and clip_global=2 exclude each other"):
        OptimizerConfig(clip_global=2.0)
