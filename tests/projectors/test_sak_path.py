"""SAK's path of one teacher: the chain as its formula says it, token by token."""

from __future__ import annotations

import math

import numpy as np
import torch

from dune_fast.projectors.sak import AdapterChain, Level

DIM, DEPTH = 8, 4


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def test_adapters_and_levels_are_their_formulas():
    chain, level = AdapterChain(DIM, [1, 3]), Level(DIM, 5)
    with torch.no_grad():
        for parameter in (*chain.parameters(), *level.parameters()):
            parameter.normal_(0, 0.5)
    tokens = {block: torch.randn(2, 6, DIM) for block in range(-1, DEPTH)}
    values = {name: p.detach().double().numpy() for m in (chain, level) for name, p in m.named_parameters()}
    r, expected = 0.0, {}
    for i in range(DEPTH + 1):
        a = f"adapters.{i}"
        x = r + tokens[i - 1].double().numpy()
        hidden = gelu(x @ values[f"{a}.down.weight"].T + values[f"{a}.down.bias"])
        r = x + values[f"{a}.scale"] * (hidden @ values[f"{a}.up.weight"].T + values[f"{a}.up.bias"])
        expected |= {i - 1: r} if i - 1 in (1, 3) else {}
    found = chain(tokens)
    assert list(found) == [1, 3]
    for block, value in expected.items():
        np.testing.assert_allclose(found[block].detach().numpy(), value, atol=2e-5)
    normed = (r - r.mean(-1, keepdims=True)) / np.sqrt(r.var(-1, keepdims=True) + 1e-5)
    normed = normed * values["norm.weight"] + values["norm.bias"]
    given = level({0: torch.from_numpy(r).float()})["patch"].detach().numpy()
    np.testing.assert_allclose(given, normed @ values["aligner.weight"].T + values["aligner.bias"], atol=2e-5)


def test_every_parameter_learns_and_no_adapter_lies_beyond_the_last_level():
    chain, levels = AdapterChain(DIM, [0, 2]), {0: Level(DIM, DIM), 2: Level(DIM, 3)}
    tokens = {block: torch.randn(1, 4, DIM, requires_grad=True) for block in range(-1, DEPTH)}
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [levels[block]({0: r})["patch"] for block, r in chain(tokens).items()]
        sum(x.float().square().sum() for x in outputs).backward()
    assert len(chain.adapters) == 4 and not hasattr(levels[0], "aligner")
    for module in (chain, *levels.values()):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert [block for block, x in tokens.items() if x.grad is not None] == [-1, 0, 1, 2]
