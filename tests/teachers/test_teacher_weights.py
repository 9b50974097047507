"""Weight files: whatever is wrong with them ends in one sentence, and nothing in them runs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dune_fast.teachers.containers import TeacherWeightsError, read_pickle
from dune_fast.teachers.registry import build_teacher
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


def test_truncated_pickle(state, tmp_path):
    path = tmp_path / "w.pt"
    torch.save(state, path)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(TeacherWeightsError, match="w.pt cannot be read: truncated"):
            read_pickle(path)


def test_truncated_safetensors(toy_config, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(build_teacher("a", toy_config()).trunk.state_dict(), path)
    assert build_teacher("a", toy_config(weights=str(path))).trunk.num_features == 24
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TeacherWeightsError, match="w.safetensors cannot be read: truncated"):
        build_teacher("a", toy_config(weights=str(path)))


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_pickle_that_would_run_code_is_refused(tmp_path):
    path, target = tmp_path / "w.pt", tmp_path / "written"
    torch.save({"a": Malicious(str(target))}, path)
    with pytest.raises(TeacherWeightsError, match=r"w\.pt asks for the type .*open and is not loaded"):
        read_pickle(path)
    assert not target.exists()


def test_pickle_of_something_else_is_refused(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "w.pt")
    with pytest.raises(TeacherWeightsError, match="not a bare state dict"):
        read_pickle(tmp_path / "w.pt")
