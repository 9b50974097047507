"""SwiGLU blocks: their formula, their sizes, float8, and that nothing else changes for blocks with GELU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dune_fast.kernels.fp8 import FP8Linear
from dune_fast.kernels.nn.block import MLP, Block, SwiGLU, run_blocks, swiglu_hidden_dim
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig


@pytest.mark.parametrize(("dim", "ratio", "hidden"), [(1536, 4.0, 4096), (64, 4.0, 176), (48, 4.0, 128), (40, 1.1, 32)])
def test_hidden_channels_are_two_thirds_rounded_up_to_eight(dim, ratio, hidden):
    assert swiglu_hidden_dim(dim, ratio) == hidden


def test_formula():
    layer, x = SwiGLU(16, 24), torch.randn(2, 5, 16)
    weight, bias = layer.w12.weight, layer.w12.bias
    gate, value = F.linear(x, weight[:24], bias[:24]), F.linear(x, weight[24:], bias[24:])
    torch.testing.assert_close(layer(x), layer.w3(gate * torch.sigmoid(gate) * value))


def test_a_vit_of_either_kind_trains():
    for kind, kept in (("gelu", MLP), ("swiglu", SwiGLU)):
        torch.manual_seed(0)
        vit = VisionTransformer(ViTConfig(28, 14, 32, 2, 2, mlp=kind)).init_weights()
        assert all(type(block.mlp) is kept for block in vit.blocks)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = vit.forward_tokens(torch.randn(1, 3, 28, 28))
        assert tokens.dtype == torch.float32
        tokens.square().sum().backward()
        assert all(p.grad.isfinite().all() for n, p in vit.named_parameters() if not n.startswith("norm."))


@torch.no_grad()
def test_float8_stays_close():
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(Block(64, 2, layer_scale=0.3, mlp="swiglu") for _ in range(2))
    x = torch.randn(1, 6, 64)
    *_, exact = run_blocks(blocks, x)
    for block in blocks:
        block.quantize()
    assert isinstance(blocks[0].mlp.w12, FP8Linear) and isinstance(blocks[0].mlp.w3, FP8Linear)
    *_, found = run_blocks(blocks, x)
    assert (found - exact).norm() < 0.1 * exact.norm()


def test_another_kind_is_explained():
    with pytest.raises(ValueError, match="mlp is 'relu'; choose one of gelu, swiglu"):
        ViTConfig(mlp="relu")
    with pytest.raises(ValueError, match="mlp is 'relu'"):
        Block(32, 2, mlp="relu")
