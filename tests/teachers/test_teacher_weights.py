"""A state dict and the module that wants it: loaded strictly, every fault named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.weights import build_loaded


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3, affine=False)


@pytest.fixture
def state():
    return Pair().state_dict()


def test_loads_frozen_in_eval_mode_and_float32(state):
    module = build_loaded(Pair, {key: v.double() if v.is_floating_point() else v for key, v in state.items()}, "file")
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key]) and value.dtype == state[key].dtype


def test_missing_surplus_and_misshapen_tensors_are_named(state):
    del state["a.bias"]
    state["b.weight"] = torch.zeros(1)
    state["head.weight"] = torch.zeros(1)
    state["a.weight"] = torch.zeros(3, 5)
    with pytest.raises(TeacherWeightsError) as caught:
        build_loaded(Pair, state, "w.pt", unused=("head.",))
    message = str(caught.value)
    for part in ("w.pt", "a.bias is missing", "b.weight is not known", "a.weight has shape [3, 5] instead of [3, 2]"):
        assert part in message
    assert "head.weight" not in message
