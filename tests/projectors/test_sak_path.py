"""SAK's path of one teacher: the chain as its formula says it, token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dune_fast.projectors.sak import TeacherPath

DIM, DEPTH = 8, 4


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def test_the_chain_of_adapters_is_its_formula():
    path = TeacherPath(DIM, {1: DIM, 3: 5})
    with torch.no_grad():
        for parameter in path.parameters():
            parameter.normal_(0, 0.5)
    tokens = {block: torch.randn(2, 6, DIM) for block in range(-1, DEPTH)}
    values = {name: p.detach().double().numpy() for name, p in path.named_parameters()}
    r, expected = 0.0, {}
    for i in range(DEPTH + 1):
        a = f"adapters.{i}"
        x = r + tokens[i - 1].double().numpy()
        hidden = gelu(x @ values[f"{a}.down.weight"].T + values[f"{a}.down.bias"])
        r = x + values[f"{a}.scale"] * (hidden @ values[f"{a}.up.weight"].T + values[f"{a}.up.bias"])
        if i - 1 in (1, 3):
            normed = (r - r.mean(-1, keepdims=True)) / np.sqrt(r.var(-1, keepdims=True) + 1e-5)
            expected[i - 1] = normed * values[f"out_norms.{i - 1}.weight"] + values[f"out_norms.{i - 1}.bias"]
    expected[3] = expected[3] @ values["aligners.3.weight"].T + values["aligners.3.bias"]
    found = path(tokens)
    assert list(found) == [1, 3] and found[1].shape == (2, 6, DIM) and found[3].shape == (2, 6, 5)
    for level, value in expected.items():
        np.testing.assert_allclose(found[level].detach().numpy(), value, atol=2e-5)


def test_every_parameter_learns_and_no_adapter_lies_beyond_the_last_level():
    path = TeacherPath(DIM, {0: DIM, 2: 3})
    tokens = {block: torch.randn(1, 4, DIM, requires_grad=True) for block in range(-1, DEPTH)}
    with torch.autocast("cpu", torch.bfloat16):
        outputs = path(tokens)
        sum(x.float().square().sum() for x in outputs.values()).backward()
    assert len(path.adapters) == 4 and list(path.aligners) == ["2"]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in path.parameters())
    assert [block for block, x in tokens.items() if x.grad is not None] == [-1, 0, 1, 2]


@pytest.mark.parametrize("channels", [{}, {-1: 4}])
def test_levels_are_blocks(channels):
    with pytest.raises(ValueError, match="give blocks of the student, from 0"):
        TeacherPath(DIM, channels)
