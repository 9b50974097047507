"""Blocks on the fused kernels under ZeRO 3: parameters that another module's pass reads are whole there too."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from dune_fast.engine.deepspeed_engine import Engine, init_distributed
from dune_fast.engine.optimizer import OptimizerConfig
from dune_fast.kernels import library
from dune_fast.kernels.nn.block import Block, run_blocks

fused = library.interpreted if library.INTERPRETER else contextlib.nullcontext
CUT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # small parameters too


class Model(nn.Module):
    """Two blocks: the first ends with the second's norm, the last in a residual addition of its own."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recompute = recompute
        self.blocks = nn.ModuleList(Block(16, 2, layer_scale=0.3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            *_, out = run_blocks(self.blocks, x, recompute=self.recompute, last_dtype=torch.bfloat16)
        return out.float()


def trained(stage: int, recompute: bool) -> dict[str, Tensor]:
    device = init_distributed()
    options = CUT if stage == 3 else None
    run = Engine(Model(recompute).to(device), OptimizerConfig(clip_per_parameter=0.1), 1, stage, options)
    x = torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(1)).to(device)
    for tokens in x:  # the second step fetches what the first has registered
        run.backward(run(tokens).square().mean())
        run.step(0.1)
    with run.whole_weights() as module:
        return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_parameters_read_outside_their_module_are_whole_and_trained(recompute):
    """A bias that a residual addition adds and a LayerScale belong to other modules than the pass that reads them."""
    with fused():
        found, expected = trained(3, recompute), trained(0, recompute)
    initial = dict(Model(recompute).named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
        assert not torch.equal(value.cpu(), initial[name].detach()), name
