"""The block on the fused kernels: equal to its formula, compiled, checkpointed and under autocast; float8 blocks."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dune_fast.kernels import library
from dune_fast.kernels.attention import attention
from dune_fast.kernels.fp8 import FP8Linear
from dune_fast.kernels.nn.block import MLP, Block, LayerNorm, SwiGLU, run_blocks, swiglu_hidden_dim
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.kernels.rope2d import grid_positions, rope2d_angles, rope2d_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
fused = library.interpreted if library.INTERPRETER else contextlib.nullcontext


def plain_block(block: Block, x: Tensor, rope=None) -> Tensor:
    """The block as its formula says, operation by operation."""

    def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)

    qkv = block.attn.qkv(norm(x, block.norm1)).unflatten(-1, (3, block.attn.num_heads, -1))
    qkv = qkv if rope is None else rope2d_reference(qkv, *rope)
    x = x + block.ls1(block.attn.proj(attention(qkv).flatten(2)))
    h = norm(x, block.norm2)
    if isinstance(block.mlp, SwiGLU):
        weight, bias = (p.chunk(2) for p in (block.mlp.w12.weight, block.mlp.w12.bias))
        gate, value = F.linear(h, weight[0], bias[0]), F.linear(h, weight[1], bias[1])
        return x + block.ls2(block.mlp.w3(gate * torch.sigmoid(gate) * value))
    return x + block.ls2(block.mlp.fc2(F.gelu(block.mlp.fc1(h))))


def blocks_and_tokens(layer_scale: float | None = 0.3, depth: int = 2, dim: int = 32, tokens: int = 6, mlp="gelu"):
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(dim, 2, layer_scale=layer_scale, mlp=mlp) for _ in range(depth))
    for p in blocks.parameters():
        nn.init.normal_(p, std=0.2)
    return blocks.to(DEVICE), torch.randn(1, tokens, dim, device=DEVICE, requires_grad=True)


def plain_chain(blocks: nn.ModuleList, x: Tensor, rope=None) -> list[Tensor]:
    outputs = []
    for block in blocks:
        outputs.append(x := plain_block(block, x, rope))
    return outputs


def loss_and_gradients(outputs: list[Tensor], blocks: nn.Module, x: Tensor) -> list[Tensor]:
    loss = sum((i + 1) * y.float().square().mean() for i, y in enumerate(outputs))
    return [loss.detach(), *torch.autograd.grad(loss, [x, *blocks.parameters()])]


@pytest.mark.parametrize("layer_scale", [0.3, None])
@pytest.mark.parametrize(("with_rope", "mlp"), [(False, "gelu"), (True, "gelu"), (False, "swiglu")])
def test_fused_chain_is_the_formula(layer_scale, with_rope, mlp):
    blocks, x = blocks_and_tokens(layer_scale, mlp=mlp)
    rope = tuple(t.to(DEVICE) for t in rope2d_angles(grid_positions(2, 3), 16)) if with_rope else None
    expected = plain_chain(blocks, x, rope)
    with fused():
        found = list(run_blocks(blocks, x, rope))
        gradients = loss_and_gradients(found, blocks, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, loss_and_gradients(expected, blocks, x), rtol=1e-4, atol=1e-5)
    with torch.no_grad(), fused():  # RoPE in place
        torch.testing.assert_close(list(run_blocks(blocks, x, rope)), [t.detach() for t in found])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the plain path is the CPU's")
def test_plain_chain_is_the_formula_bit_for_bit():
    blocks, x = blocks_and_tokens(depth=3)
    assert all(map(torch.equal, run_blocks(blocks, x), plain_chain(blocks, x)))
    with torch.autocast("cpu", torch.bfloat16):
        *_, found = run_blocks(blocks, x)
        expected = plain_chain(blocks, x)[-1]
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_autocast_keeps_the_stream_in_float32():
    blocks, x = blocks_and_tokens()
    exact = loss_and_gradients(list(run_blocks(blocks, x)), blocks, x)
    seen = []
    handle = blocks[1].attn.qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with fused():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            outputs = list(run_blocks(blocks, x))
        found = loss_and_gradients(outputs, blocks, x)
    handle.remove()
    assert seen == [torch.bfloat16] and all(y.dtype == torch.float32 for y in outputs)
    assert all(g.dtype == torch.float32 for g in found)
    for ours, truth in zip(found, exact, strict=True):
        assert (ours - truth).norm() <= 0.05 * truth.norm() + 1e-3


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(backend):
    """torch.compile(fullgraph=True) of two blocks with RoPE: forward, backward, and in place without gradients."""
    torch._dynamo.reset()
    blocks, x = blocks_and_tokens()
    rope = tuple(t.to(DEVICE) for t in rope2d_angles(grid_positions(2, 3), 16))

    def chain(x: Tensor) -> list[Tensor]:
        return list(run_blocks(blocks, x, rope))

    compiled = torch.compile(chain, fullgraph=True, backend=backend)
    with fused():
        expected = loss_and_gradients(chain(x), blocks, x)
        found = loss_and_gradients(compiled(x), blocks, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), chain(x), rtol=1e-4, atol=1e-5)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            torch.testing.assert_close(compiled(x)[-1], chain(x)[-1], rtol=3e-2, atol=3e-2)


def test_a_model_keeps_its_keys_and_hooks():
    """Blocks and norms are called as modules, so that hooks (sharded parameters, profilers) fire."""
    vit = VisionTransformer(ViTConfig(28, 14, 32, 2, 2))
    assert {k.removeprefix("blocks.1.") for k in vit.state_dict() if k.startswith("blocks.1.")} == {
        "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
        "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
        "ls1.gamma", "ls2.gamma",
    }  # fmt: skip
    called = []
    for name, module in vit.named_modules():
        if isinstance(module, (Block, LayerNorm)):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    vit(torch.randn(1, 3, 28, 28))
    assert called == [
        "blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.0", "blocks.1.norm2", "blocks.1", "norm"
    ]  # fmt: skip


@pytest.mark.parametrize(("triton", "mlp"), [(False, "gelu"), (True, "gelu"), (False, "swiglu")])
@torch.no_grad()
def test_float8_blocks_stay_close(triton, mlp):
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    blocks, x = blocks_and_tokens(dim=64, mlp=mlp)
    exact = list(run_blocks(blocks, x))
    for block in blocks:
        block.quantize()
    assert all(isinstance(m, FP8Linear) for m in blocks.modules() if hasattr(m, "in_features"))
    with fused() if triton else contextlib.nullcontext():
        found = list(run_blocks(blocks, x))
    for ours, truth in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - truth).norm() < 0.1 * truth.norm()


def train_or_run(trained: bool, counting: contextlib.AbstractContextManager) -> None:
    """Two blocks in bf16 on the paths of a GPU, forward and, if trained, backward."""
    with FakeTensorMode(), library.traced():
        blocks = nn.ModuleList(Block(64, 2) for _ in range(2)).requires_grad_(trained)
        for block in blocks:
            block.attn.backend = "flash"  # the plain formula multiplies and adds by itself
        x = torch.empty(2, 6, 64, requires_grad=trained)
        with counting, torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trained):
            *_, y = run_blocks(blocks, x)
            if trained:
                y.backward(y.detach())


def test_biases_and_the_last_addition_cost_no_pass_of_their_own(dispatched):
    """Products without bias, no sum over rows but qkv's, and of multiplications and additions outside the kernels one:

    the gradients that reach x through the first norm and past it.
    """
    train_or_run(True, counting := dispatched())
    count = counting.count
    assert count["residual_layer_norm"] == 3 and count["residual"] == count["residual_backward"] == 1
    assert count["addmm"] == count["sum"] == 2 and count["mul"] == 0 and count["add"] == 1


def test_a_product_adds_a_frozen_bias(dispatched):
    train_or_run(False, counting := dispatched())
    count = counting.count
    assert count["addmm"] == 6 and count["residual"] == 1  # fc1's bias goes with GELU
    assert count["sum"] == count["mul"] == count["add"] == 0


def test_recomputed_blocks_give_the_same_values():
    blocks, x = blocks_and_tokens()
    with fused():
        expected = loss_and_gradients(list(run_blocks(blocks, x)), blocks, x)
        found = loss_and_gradients(list(run_blocks(blocks, x, recompute=True)), blocks, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_last_tokens_come_in_the_type_that_is_asked_for(recompute):
    blocks, x = blocks_and_tokens()
    first, last = run_blocks(blocks, x)
    with fused():
        found = list(run_blocks(blocks, x, recompute=recompute, last_dtype=torch.bfloat16))
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(found, [first, last.bfloat16()], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("dim", "ratio", "hidden"), [(1536, 4.0, 4096), (64, 4.0, 176), (48, 4.0, 128), (40, 1.1, 32)])
def test_hidden_channels_are_two_thirds_rounded_up_to_eight(dim, ratio, hidden):
    assert swiglu_hidden_dim(dim, ratio) == hidden


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


def test_another_kind_of_mlp_is_explained():
    with pytest.raises(ValueError, match="mlp is 'relu'; choose one of gelu, swiglu"):
        ViTConfig(mlp="relu")
    with pytest.raises(ValueError, match="mlp is 'relu'"):
        Block(32, 2, mlp="relu")
