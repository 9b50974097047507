"""RoPE2D: values and gradients against float64, in place and not, layouts, properties of the rotation, bad input."""

from __future__ import annotations

import pytest
import torch

from dune_fast.kernels.rope2d import (
    grid_positions,
    rope2d,
    rope2d_,
    rope2d_angles,
    rope2d_reference,
    rotate,
)

pytestmark = pytest.mark.usefixtures("poisoned")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [  # batch, grid, heads, head_dim
    (2, (2, 3), 3, 16), (1, (1, 1), 2, 64), (2, (3, 2), 1, 20),
    (1, (5, 2), 6, 4), (0, (2, 2), 2, 8), (1, (1, 7), 12, 64),
]  # fmt: skip


def arguments(batch, grid, heads, dim, dtype=FP32, device="cpu"):
    torch.manual_seed(0)
    qkv = torch.randn(batch, grid[0] * grid[1], 3, heads, dim).to(device, dtype)
    return qkv, *(t.to(device) for t in rope2d_angles(grid_positions(*grid), dim))


def rotated_in(dtype, qkv, cos, sin):
    """torch's operations in `dtype` throughout."""
    q = qkv.to(dtype).unflatten(-1, (2, 2, -1))  # [B, N, 3, H, axis, (u, v), D / 4]
    cos, sin = (t.to(dtype)[:, None, None] for t in (cos, sin))
    u, v = q.unbind(-2)
    turned = torch.stack([u * cos - v * sin, v * cos + u * sin], -2).flatten(-3)
    return torch.cat([turned[:, :, :2], qkv.to(dtype)[:, :, 2:]], 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_values_and_gradients(shape, dtype, device, fused, no_worse):
    qkv, cos, sin = arguments(*shape, dtype, device)
    leaf, upstream = qkv.clone().requires_grad_(), torch.randn_like(qkv)
    with fused():
        out = rope2d(leaf, cos, sin)
        grad = torch.autograd.grad(out, leaf, upstream)[0]
        inplace = rope2d_(written := qkv.clone(), cos, sin)
    assert out.dtype == grad.dtype == dtype and inplace is written
    assert torch.equal(inplace, out.detach()) and torch.equal(out[:, :, 2], qkv[:, :, 2])
    no_worse(out.detach(), rotated_in(dtype, qkv, cos, sin), rotated_in(torch.float64, qkv, cos, sin))
    no_worse(grad, rotated_in(dtype, upstream, cos, -sin), rotated_in(torch.float64, upstream, cos, -sin))


@pytest.mark.parametrize("size", [0.0, 1e18])
def test_zero_and_large(size, device, fused, no_worse):
    qkv, cos, sin = arguments(1, (2, 2), 2, 8, device=device)
    with fused():
        found = rope2d_(size * qkv, cos, sin)
    no_worse(found, rotated_in(FP32, size * qkv, cos, sin), rotated_in(torch.float64, size * qkv, cos, sin))


def test_attention_depends_on_offsets_alone(device, fused):
    """q . k after the rotation is the same for any two tokens one row and two columns apart."""
    height, width = 4, 5
    qkv, cos, sin = arguments(1, (height, width), 1, 16, device=device)
    qkv = qkv[:, :1].expand(-1, height * width, -1, -1, -1).contiguous()  # the same token everywhere
    with fused():
        q, k = rope2d_(qkv, cos, sin)[0, :, :2, 0].unbind(1)
    q, k = (t.unflatten(0, (height, width)) for t in (q, k))
    products = (q[:-1, :-2] * k[1:, 2:]).sum(-1)
    torch.testing.assert_close(products, products[:1, :1].expand_as(products))


@pytest.mark.parametrize("layout", ["heads first", "slice of tokens", "packed by head"])
def test_strided_inputs(layout, device, fused):
    """Of tokens and heads; those of images and channels are the contract test's."""
    wide = torch.randn(2, 8, 3, 4, 32, device=device)
    qkv = {
        "heads first": wide.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4),
        "slice of tokens": wide[:, 2:],
        "packed by head": wide.permute(0, 1, 3, 2, 4).contiguous().permute(0, 1, 3, 2, 4),
    }[layout]
    cos, sin = (t.to(device) for t in rope2d_angles(grid_positions(2, qkv.shape[1] // 2), qkv.shape[-1]))
    expected = rope2d_reference(qkv, cos, sin)
    with fused():
        torch.testing.assert_close(rope2d(qkv, cos, sin), expected)
        before = wide[:, :2].clone()
        torch.testing.assert_close(rope2d_(qkv, cos, sin), expected)
    if layout == "slice of tokens":
        assert torch.equal(wide[:, :2], before)  # nothing outside the view was written


def test_reference_and_gradcheck():
    qkv, cos, sin = arguments(1, (2, 2), 2, 8)
    out = rope2d(qkv, cos, sin)
    assert torch.equal(out[:, :, 1], rotate(qkv[:, :, 1], cos, sin)) and torch.equal(out[:, :, 2], qkv[:, :, 2])
    assert torch.equal(rope2d_(qkv.clone(), cos, sin), out)
    assert torch.autograd.gradcheck(lambda t: rope2d(t, cos.double(), sin.double()), qkv.double().requires_grad_())


def test_in_place_refuses_what_autograd_follows():
    qkv, cos, sin = arguments(1, (2, 2), 2, 8)
    qkv.requires_grad_()
    with pytest.raises(ValueError, match="call rope2d on a tensor that needs a gradient"):
        rope2d_(qkv * 2, cos, sin)
    with torch.no_grad():
        rope2d_(qkv * 2, cos, sin)


@pytest.mark.parametrize(
    "shape, table, message",
    [
        ((1, 4, 2, 2, 8), (4, 2, 2), r"\[B, N, 3, heads, head_dim\]"),
        ((1, 4, 3, 2, 6), (4, 2, 1), "a multiple of 4"),
        ((1, 4, 3, 2, 8), (5, 2, 2), r"cos and sin \[N, 2, head_dim / 4\].*\[5, 2, 2\]"),
    ],
)
def test_bad_shapes(shape, table, message):
    for function in (rope2d, rope2d_):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(shape), torch.zeros(table), torch.zeros(table))
