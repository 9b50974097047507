"""MASt3R's network against its formulas, written out with torch's own layers on tiny sizes."""

from __future__ import annotations

import contextlib
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dune_fast.heads.head import HeadError, check_encoder
from dune_fast.heads.mast3r.activations import CONFIDENCE_MODES, POINT_MODES, Mode, Modes, activate, read_mode
from dune_fast.heads.mast3r.decoder import Decoder, DecoderBlock
from dune_fast.heads.mast3r.descriptors import DescriptorMLP
from dune_fast.heads.mast3r.dpt import DPT, hooks
from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.heads.mast3r.images import for_encoder
from dune_fast.heads.tokens import encode
from dune_fast.kernels import library
from dune_fast.kernels.attention import cross_attention
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.kernels.rope2d import grid_positions, rope2d_angles

fused = library.interpreted if library.INTERPRETER else contextlib.nullcontext

TINY = {
    "width": 8, "patch_size": 14, "dec_dim": 16, "dec_depth": 5, "dec_heads": 2, "desc_dim": 3,
    "layer_dims": [4, 5, 6, 7], "feature_dim": 6, "last_dim": 5,
}  # fmt: skip


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """With weights among which none is zero or one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.fixture
def encoder() -> VisionTransformer:
    cfg = ViTConfig(image_size=42, patch_size=14, embed_dim=8, depth=2, num_heads=2, num_registers=1)
    return drawn(VisionTransformer(cfg).init_weights()).eval().requires_grad_(False)


@pytest.fixture
def head() -> Mast3rHead:
    return drawn(Mast3rHead(**TINY))


def rope(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """x [B, H, N, d] turned, channel by channel: pair (j, j + d/4) of each half by position * 100^(-4j/d)."""
    out, d = x.clone(), x.shape[-1]
    for n, position in enumerate(itertools.product(range(grid[0]), range(grid[1]))):
        for axis, j in itertools.product(range(2), range(d // 4)):
            u, v = axis * d // 2 + j, axis * d // 2 + d // 4 + j
            angle = torch.tensor(position[axis] * 100.0 ** (-4 * j / d))
            out[..., n, u] = x[..., n, u] * angle.cos() - x[..., n, v] * angle.sin()
            out[..., n, v] = x[..., n, v] * angle.cos() + x[..., n, u] * angle.sin()
    return out


def plain_block(state: dict[str, Tensor], x: Tensor, y: Tensor, gx: tuple, gy: tuple, heads: int) -> Tensor:
    """One decoder block by torch's functions, from its state dict."""

    def norm(name: str, z: Tensor) -> Tensor:
        return F.layer_norm(z, z.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(name: str, z: Tensor) -> Tensor:
        return F.linear(z, state[f"{name}.weight"], state[f"{name}.bias"])

    def split(z: Tensor) -> Tensor:
        return z.unflatten(-1, (heads, -1)).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor, gq: tuple, gk: tuple) -> Tensor:
        q, k = rope(split(q), gq), rope(split(k), gk)
        weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1)
        return (weights @ split(v)).transpose(1, 2).flatten(2)

    x = x + linear("attn.proj", attend(*linear("attn.qkv", norm("norm1", x)).chunk(3, -1), gx, gx))
    q, memory = norm("norm2", x), norm("norm_y", y)
    keys, values = linear("cross_attn.projk", memory), linear("cross_attn.projv", memory)
    x = x + linear("cross_attn.proj", attend(linear("cross_attn.projq", q), keys, values, gx, gy))
    return x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm3", x))))


def test_decoder_is_its_formula():
    decoder = drawn(Decoder(6, 16, 3, 2))
    grids, tokens = ((2, 3), (3, 1)), (torch.randn(2, 6, 6), torch.randn(2, 3, 6))
    out = decoder(*tokens, *grids)
    streams = [decoder.decoder_embed(x) for x in tokens]
    for i in range(3):
        blocks = decoder.dec_blocks[i].state_dict(), decoder.dec_blocks2[i].state_dict()
        streams = [plain_block(blocks[v], streams[v], streams[1 - v], grids[v], grids[1 - v], 2) for v in range(2)]
        for v in range(2):
            norm = decoder.dec_norm
            wanted = F.layer_norm(streams[v], (16,), norm.weight, norm.bias, 1e-6) if i == 2 else streams[v]
            torch.testing.assert_close(out[v][i + 1], wanted, rtol=1e-5, atol=1e-5)
    assert out[0][0] is tokens[0] and len(out[1]) == 4


def test_a_block_through_the_fused_kernels_is_the_same():
    """There the last bias of every branch is added by the residual pass, also that of the cross-attention."""
    block = drawn(DecoderBlock(16, 2))
    x, y = torch.randn(2, 2, 16), torch.randn(2, 3, 16)
    angles = [rope2d_angles(grid_positions(*grid), 8) for grid in ((1, 2), (3, 1))]
    with fused():
        out = block(x, y, *angles)
        out.square().sum().backward()
    found = [p.grad for p in block.parameters()]
    block.zero_grad()
    wanted = block(x, y, *angles)
    wanted.square().sum().backward()
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    for ours, parameter in zip(found, block.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-4)


def test_cross_attention_refuses_other_shapes():
    q, k = torch.zeros(1, 3, 2, 4), torch.zeros(1, 5, 2, 4)
    assert cross_attention(q, k, k).shape == (1, 3, 2, 4)
    for wrong in ((q, k, k[:, :4]), (q, torch.zeros(1, 5, 1, 4), torch.zeros(1, 5, 1, 4)), (q[0], k, k)):
        with pytest.raises(ValueError, match="cross_attention takes q"):
            cross_attention(*wrong)


@pytest.mark.parametrize("patch, grid", [(14, (1, 1)), (14, (3, 5)), (16, (4, 3))])
def test_dpt_makes_maps_of_the_images_size(patch, grid):
    dpt = DPT([8, 16, 16, 16], patch, 4, (4, 5, 6, 7), 6, 5)
    tokens = [torch.randn(2, grid[0] * grid[1], width, requires_grad=True) for width in (8, 16, 16, 16)]
    out = dpt(tokens, grid)
    assert out.shape == (2, 4, grid[0] * patch, grid[1] * patch)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in dpt.parameters())  # nothing is unused
    assert all(x.grad.abs().sum() > 0 for x in tokens)


def test_dpt_of_a_constant_image_without_borders_is_its_formula():
    """Kernels that read their middle alone make every stage a matrix, so the result is a formula of one token."""
    dpt = drawn(DPT([3, 4, 4, 4], 14, 2, (2, 3, 4, 5), 4, 3))
    with torch.no_grad():
        for module in dpt.modules():
            if isinstance(module, torch.nn.ConvTranspose2d):
                module.weight.copy_(module.weight[:, :, :1, :1].expand_as(module.weight))
            elif isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
                middle = module.weight[:, :, 1:2, 1:2].clone()
                module.weight.zero_()[:, :, 1:2, 1:2] = middle
    x = [torch.randn(1, 1, width) for width in (3, 4, 4, 4)]
    grid = (5, 3)
    out = dpt([token.expand(1, 15, -1) for token in x], grid)

    def at(conv: torch.nn.Conv2d, z: Tensor) -> Tensor:
        if isinstance(conv, torch.nn.ConvTranspose2d):
            return F.linear(z, conv.weight[:, :, 0, 0].T, conv.bias)
        middle = conv.kernel_size[0] // 2
        return F.linear(z, conv.weight[:, :, middle, middle], conv.bias)

    def unit(rcu: torch.nn.Module, z: Tensor) -> Tensor:
        return z + at(rcu.conv2, F.relu(at(rcu.conv1, F.relu(z))))

    maps = []
    for layers, conv, z in zip(dpt.act_postprocess, dpt.scratch.layer_rn, x, strict=True):
        for layer in layers:
            z = at(layer, z)
        maps.append(at(conv, z))
    s = dpt.scratch
    z = at(s.refinenet4.out_conv, unit(s.refinenet4.resConfUnit2, maps[3]))
    for fusion, finer in ((s.refinenet3, maps[2]), (s.refinenet2, maps[1]), (s.refinenet1, maps[0])):
        z = at(fusion.out_conv, unit(fusion.resConfUnit2, z + unit(fusion.resConfUnit1, finer)))
    z = at(dpt.head[4], F.relu(at(dpt.head[2], at(dpt.head[0], z))))
    torch.testing.assert_close(out, z.transpose(1, 2)[..., None].expand_as(out), rtol=1e-4, atol=1e-5)


def test_descriptors_lie_where_their_patch_is():
    local = drawn(DescriptorMLP(5, 3, 2))
    e, d = torch.randn(1, 6, 2), torch.randn(1, 6, 3)
    out = local(e, d, (2, 3))
    x = torch.cat([e, d], -1)
    hidden = F.gelu(F.linear(x, local.fc1.weight, local.fc1.bias))
    values = F.linear(hidden, local.fc2.weight, local.fc2.bias)
    for c, y, column in itertools.product(range(3), range(4), range(6)):
        wanted = values[0, y // 2 * 3 + column // 2, c * 4 + y % 2 * 2 + column % 2]
        torch.testing.assert_close(out[0, c, y, column], wanted)


def test_activations_are_their_formulas():
    raw = torch.randn(2, 8, 3, 4)
    raw[:, :3, 0, 0] = 0
    r, direction = raw[:, :3].norm(dim=1), F.normalize(raw[:, :3], dim=1)
    raw.requires_grad_()
    for mode, length in (("exp", r.exp() - 1), ("square", r**2), ("linear", r)):
        out = activate(raw, Modes(Mode(mode), Mode("sigmoid", 0.5, 4), Mode("exp", 1, 3), True))
        torch.testing.assert_close(out["pts3d"], (direction * length[:, None]).movedim(1, -1))
        torch.testing.assert_close(out["conf"], 0.5 + 3.5 / (1 + (-raw[:, 3]).exp()))
        torch.testing.assert_close(out["desc"], F.normalize(raw[:, 4:7], dim=1).movedim(1, -1))
        torch.testing.assert_close(out["desc_conf"], 1 + raw[:, 7].exp().minimum(torch.tensor(2.0)))
    alone = activate(raw[:, :7], Modes(two_confs=False))
    assert torch.equal(alone["desc_conf"], alone["conf"]) and alone["desc"].shape[-1] == 3
    same = activate(raw, Modes(desc_conf=None))
    torch.testing.assert_close(same["desc_conf"], 1 + raw[:, 7].exp())
    same["pts3d"].sum().backward()
    assert raw.grad.isfinite().all()  # also where the point is zero


@pytest.mark.parametrize(
    "value, kinds, said",
    [
        (("cube", None, None), POINT_MODES, "the kinds are exp, square, linear"),
        (("exp", 0.0, 1.0), POINT_MODES, "points have no bounds"),
        (("exp", 3.0, 1.0), CONFIDENCE_MODES, "needs low < high"),
        (("sigmoid", 0.0, None), CONFIDENCE_MODES, "needs low < high"),
        (7, CONFIDENCE_MODES, "give .kind, low, high."),
        (("exp", "a", None), CONFIDENCE_MODES, "give .kind, low, high."),
    ],
)
def test_a_senseless_mode_is_refused(value, kinds, said):
    with pytest.raises(HeadError, match=f"conf_mode is .*{said}"):
        read_mode("conf_mode", value, kinds)


def test_options_build_the_same_head(head):
    options = json.loads(json.dumps(head.options(), allow_nan=False))
    again = Mast3rHead(**options)
    assert again.options() == head.options()
    again.load_state_dict(head.state_dict())
    changed = {**options, "two_confs": False, "own_norm": False, "desc_conf_mode": None, "conf_mode": ["sigmoid", 0, 2]}
    assert Mast3rHead(**changed).options() == changed


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"dec_depth": 3}, "at least 4 blocks"),
        ({"layer_dims": [4, 5, 6]}, "layer_dims has 3 entries"),
        ({"dec_heads": 3}, "16 channels with 3 attention heads"),
        ({"desc_dim": 0}, "desc_dim is 0"),
        ({"dec_heads": "2"}, "dec_heads is '2'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, said):
    with pytest.raises(HeadError, match=said):
        Mast3rHead(**{**TINY, **wrong})


def test_two_views_of_two_sizes(head, encoder):
    """And what each view's outputs are."""
    views = [encode(encoder, torch.randn(2, 3, *size)) for size in ((28, 42), (42, 14))]
    one, two = head(*views)
    assert {name: tuple(x.shape) for name, x in one.items()} == {
        "pts3d": (2, 28, 42, 3), "conf": (2, 28, 42), "desc": (2, 28, 42, 3), "desc_conf": (2, 28, 42),
    }  # fmt: skip
    assert two["pts3d_in_other_view"].shape == (2, 42, 14, 3) and "pts3d" not in two
    sum(x.square().mean() for x in (*one.values(), *two.values())).backward()
    assert all(p.grad is not None for p in head.parameters())  # also of `norm`, whose eps is torch's default
    wanted = F.layer_norm(views[0].raw_patch, (8,), head.norm.weight, head.norm.bias)
    torch.testing.assert_close(head.encoded(views[0]), wanted)
    assert hooks(12) == (0, 6, 9, 12) and hooks(10) == (0, 5, 7, 10)


def test_a_head_without_own_norm_reads_normalised_tokens(encoder):
    head = Mast3rHead(**TINY, own_norm=False)
    tokens = encode(encoder, torch.randn(1, 3, 28, 28))
    assert head.encoded(tokens) is tokens.patch and not any(key.startswith("norm.") for key in head.state_dict())


def test_another_encoders_tokens_are_refused(head, encoder):
    wide = VisionTransformer(ViTConfig(image_size=28, patch_size=14, embed_dim=12, depth=1, num_heads=2))
    with pytest.raises(HeadError, match="mast3r head reads 8 channels of 14 x 14 px patches, the encoder gives 12"):
        check_encoder(head, wide)
    tokens = encode(wide, torch.zeros(1, 3, 28, 28))
    with pytest.raises(HeadError, match=r"reads tokens \[B, rows \* columns, 8\], got \[1, 4, 12\]"):
        head(tokens, tokens)
    a, b = (encode(encoder, torch.zeros(n, 3, 28, 28)) for n in (1, 2))
    with pytest.raises(HeadError, match="got 1 and 2 images"):
        head(a, b)


def test_images_that_do_not_fit_the_patch_are_refused(encoder):
    with pytest.raises(ValueError, match="height 30 is not a multiple of the patch size 14; the nearest are 28 and 42"):
        encode(encoder, torch.zeros(1, 3, 30, 28))


def test_outputs_are_float32_under_autocast(head, encoder):
    views = [encode(encoder, torch.randn(1, 3, 28, 42)) for _ in range(2)]
    wanted = head(*views)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(*views)
    for ours, plain in zip(found, wanted, strict=True):
        for name, x in ours.items():
            assert x.dtype == torch.float32
            assert (x - plain[name]).norm() < 0.05 * plain[name].norm()


def test_images_are_normalised_as_the_encoder_wants(encoder):
    images = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2).expand(1, 3, 2, 2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.mean, encoder.std))
    torch.testing.assert_close(for_encoder(images, encoder), ((images + 1) / 2 - mean) / std)
