"""RADIO's network as a student: positions against torch's own sampling, windows, spectral reparametrisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.nn.block import Block
from dune_fast.kernels.nn.draws import PositionDraws, StepDraws
from dune_fast.kernels.nn.radio import CLIP_MEAN, CLIP_STD, RADIOOptions, RADIOViT
from dune_fast.kernels.nn.radio_positions import resized_projection, resized_table, table_map, training_positions
from dune_fast.kernels.nn.spectral import SpectralScale, iterate_once
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.kernels.nn.windows import drawn_window, window_period, windowed_outputs


@dataclass
class StudentLike(ViTConfig):
    radio: RADIOOptions = field(default_factory=RADIOOptions)


def student(num_cls: int = 2, seed: int = 0, radio: dict | None = None, **fields) -> RADIOViT:
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 5, "num_heads": 2, "layer_scale": None}
    cfg = StudentLike(**sizes | {"final_norm": False} | fields, radio=RADIOOptions(**radio or {}))
    torch.manual_seed(seed)
    return RADIOViT.for_student(cfg, num_cls).init_weights()


def draws(images: int, step: int = 0) -> StepDraws:
    return StepDraws(3, step, torch.arange(images) + 100 * step)


@pytest.mark.parametrize("grid", [(4, 4), (3, 6), (1, 5), (14, 5)])
def test_training_positions_are_torchs_grid_sample(grid):
    """The formula of the crop, sampled by torch, forward and backward."""
    table = torch.randn(1, 144, 6, requires_grad=True)
    numbers = PositionDraws(torch.rand(3), torch.rand(3), torch.rand(3, 2), torch.tensor([0.05, 0.5, 0.95]))
    ours = training_positions(table, *grid, numbers, 0.3, True)
    root = math.sqrt(0.1) + (1 - math.sqrt(0.1)) * numbers.scale
    aspect = torch.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * numbers.aspect)
    scale = torch.stack([root * aspect, root / aspect], -1).clamp(0, 1)[:, None, None]
    steps = [torch.linspace(0, 1, n) if n > 1 else torch.zeros(1) for n in grid]
    points = torch.stack(torch.meshgrid(*steps, indexing="ij")[::-1], -1)  # x before y
    points = scale * points + numbers.offset[:, None, None] * (1 - scale)
    maps = table_map(table).expand(3, -1, -1, -1)
    sampled = F.grid_sample(maps, 2 * points - 1, mode="bilinear", padding_mode="zeros", align_corners=True)
    theirs = sampled.flatten(2).transpose(1, 2) * torch.tensor([0.0, 1, 1])[:, None, None]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(ours)
    (mine,) = torch.autograd.grad((ours * weights).sum(), table)
    (other,) = torch.autograd.grad((theirs * weights).sum(), table)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_draws_depend_on_seed_step_and_image_alone():
    """So a run that goes on, other ranks and other parts of a batch draw the same."""
    one, two = draws(4).for_positions(), draws(4).for_positions()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    part = StepDraws(3, 0, torch.arange(4)[1::2]).for_positions()
    assert all(torch.equal(a[1::2], b) for a, b in zip(one, part, strict=True))
    assert not torch.equal(one.scale, draws(4, step=1).for_positions().scale)
    assert draws(4, 7).for_window() == draws(2, 7).for_window() != draws(4, 8).for_window()
    many = StepDraws(0, 0, torch.arange(20_000)).for_positions()
    numbers = torch.cat([many.scale[:, None], many.aspect[:, None], many.offset, many.dropout[:, None]], dim=1)
    assert (numbers.mean(0) - 0.5).abs().max() < 0.01 and torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max() < 0.03


def test_positions_in_evaluation_and_training():
    """CPE only where the table is for larger images; without it an image of the nominal size trains as it evaluates."""
    x = torch.randn(3, 3, 32, 32)
    plain = student()
    assert plain.pos_embed.shape == (1, 16, 24) and torch.equal(plain.embed(x), plain.embed(x, draws=draws(3)))
    large = student(radio={"cpe_max_size": 96})
    assert large.pos_embed.shape == (1, 144, 24)
    evaluated, trained = large.embed(x), large.embed(x, draws=draws(3))
    assert torch.equal(evaluated[:, :6], trained[:, :6]) and (evaluated - trained)[:, 6:].abs().max() > 0.01
    assert not torch.equal(trained, large.embed(x, draws=draws(3, step=1)))
    dropped = student(radio={"position_dropout": 1.0}).embed(x, draws=draws(3))
    torch.testing.assert_close(dropped[:, 6:], plain.patch_embed(x))


def test_images_are_brought_to_clips_statistics():
    """Folded into the projection: the same as normalising pixels by CLIP's statistics before a plain one."""
    vit, pixels = student(), torch.rand(2, 3, 32, 24)
    mean, std, clip_mean, clip_std = (
        torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD, CLIP_MEAN, CLIP_STD)
    )
    plain = student(radio={"conditioner": ""})
    plain.load_state_dict(vit.state_dict())
    torch.testing.assert_close(
        vit.patch_embed((pixels - mean) / std), plain.patch_embed((pixels - clip_mean) / clip_std), rtol=1e-4, atol=1e-5
    )
    assert vit.patch_embed.proj.bias is None and student(radio={"patch_bias": True}).patch_embed.proj.bias is not None


@pytest.mark.parametrize(("num_cls", "multiple", "registers"), [(3, 8, 5), (4, 4, 4), (1, 0, 4)])
def test_registers_fill_up(num_cls, multiple, registers):
    vit = student(num_cls, radio={"register_multiple": multiple})
    assert vit.cfg.num_registers == registers and vit.prefix_tokens.shape[1] == num_cls + registers
    features = vit(torch.randn(2, 3, 32, 32))
    assert features["x_norm_clstoken"].shape == (2, 24 * num_cls)
    assert features["x_norm_regtokens"].shape == (2, registers, 24)
    assert features["x_norm_patchtokens"].shape == (2, 16, 24)


def test_resized_weights():
    """Corners stay where they are; the own size is left alone."""
    table, kernel = torch.randn(1, 16, 5), torch.randn(5, 3, 6, 6)
    assert resized_table(table, 4) is table and resized_projection(kernel, 6) is kernel
    corners, small = table_map(resized_table(table, 7)), resized_projection(kernel, 4)
    torch.testing.assert_close(corners[..., ::6, ::6], table_map(table)[..., ::3, ::3])
    torch.testing.assert_close(small[..., ::3, ::3], kernel[..., ::5, ::5])


def test_windows_of_a_grid_that_is_not_square():
    """Windowed blocks are blocks on each window by itself; the tokens before it are copied and averaged, or skipped."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(16, 2, layer_scale=None) for _ in range(5))
    x, prefix, (rows, columns), size = torch.randn(2, 3 + 24, 16), 3, (4, 6), 2
    cells = torch.arange(24).view(rows, columns)
    period = window_period(5, num_windowed=1)
    for copied in (True, False):
        found = windowed_outputs(blocks, x, [0, 1, 4], prefix, (rows, columns), size, period, 5, copied)
        wanted = x
        for i, block in enumerate(blocks):
            if i in (1, 3, 4):
                wanted = block(wanted)
            else:
                after, summaries = wanted.clone(), []
                for top in range(0, rows, size):
                    for left in range(0, columns, size):
                        own = prefix + cells[top : top + size, left : left + size].flatten()
                        summary = wanted[:, :prefix] if copied else wanted[:, :0]
                        out = block(torch.cat([summary, wanted[:, own]], dim=1))
                        summaries.append(out[:, : summary.shape[1]])
                        after[:, own] = out[:, summary.shape[1] :]
                if copied:
                    after[:, :prefix] = torch.stack(summaries).mean(0)
                wanted = after
            if i in found:
                torch.testing.assert_close(found[i], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="windows of 4 x 4 patches do not cover a grid of 4 x 6"):
        windowed_outputs(blocks, x, [4], prefix, (4, 6), 4, period, 5, True)
    with pytest.raises(ValueError, match="leave none: lower num_global"):
        window_period(5, 0, 4)


def test_window_rule():
    """Sizes that divide both sides and are smaller than the rows; one is drawn, or none with what is left of 1."""
    assert drawn_window([2, 3, 4, 6], (12, 6), 0.7, (0.7, 0.0)) == 2
    assert drawn_window([2, 3, 4, 6], (12, 6), 0.7, (0.1, 0.999)) == 6
    assert drawn_window([2, 3], (12, 6), 0.7, (0.71, 0.0)) == 0
    assert drawn_window([4, 12], (12, 6), 1.0, (0.1, 0.0)) == 0
    assert drawn_window([2], (4, 4), 0.0, (0.0, 0.0)) == 0


def test_a_student_trains_in_windows_and_evaluates_in_those_it_is_told():
    vit, x = student(radio={"window_sizes": [2], "num_windowed": 1}), torch.randn(2, 3, 32, 48)
    whole = vit.block_outputs(x, [-1, 4])
    trained = vit.block_outputs(x, [-1, 4], draws=draws(2))
    assert torch.equal(whole[-1], trained[-1]) and (whole[4] - trained[4]).abs().max() > 1e-3
    vit.window_size = 2
    evaluated = vit.block_outputs(x, [4])[4]
    assert (evaluated - whole[4]).abs().max() > 1e-3 and (evaluated - trained[4]).abs().max() > 1e-3


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_spectral_weights_start_unchanged(version, mlp):
    """The largest singular value of every chunk is the gain's; the network is the plain one at first."""
    plain, x = student(mlp=mlp), torch.randn(2, 3, 32, 32)
    vit = student(mlp=mlp, radio={"spectral": version})
    name = "w12" if mlp == "swiglu" else "fc2"
    for layer, count in ((vit.blocks[1].attn.qkv, 3), (getattr(vit.blocks[0].mlp, name), 2 if mlp == "swiglu" else 1)):
        scale = layer.parametrizations.weight[0]
        assert isinstance(scale, SpectralScale) == (count == 1)
        for chunk, part in zip(layer.weight.chunk(count), getattr(scale, "parts", [scale]), strict=True):
            gain = F.softplus(part.scale) + 0.05 if version == 2 else part.scale
            assert float(torch.linalg.matrix_norm(chunk.detach(), 2)) == pytest.approx(float(gain.detach()), rel=0.05)
    torch.testing.assert_close(vit.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vit.forward_tokens(x), plain.forward_tokens(x), rtol=1e-3, atol=1e-4)


def test_one_power_iteration_a_step_even_where_blocks_run_again():
    """Parts of a batch and recomputed blocks of a step use the same sigma; evaluation leaves it alone."""
    x, weights = torch.randn(4, 3, 32, 32), {}
    for recompute in (False, True):
        vit = student(radio={"spectral": 2})
        vit.activation_checkpointing = recompute
        scale = vit.blocks[0].mlp.fc1.parametrizations.weight[0]
        before = scale._v.clone()
        for step in (0, 1):
            for part in (x[::2], x[1::2]):
                vit.block_outputs(part, [4], draws=draws(2, step))[4].square().sum().backward()
        expected = before
        with torch.no_grad():
            for _ in range(2):
                weight = vit.blocks[0].mlp.fc1.parametrizations.weight.original
                expected = F.normalize(weight.T @ F.normalize(weight @ expected, dim=0), dim=0)
        torch.testing.assert_close(scale._v, expected)
        vit.forward_tokens(x)
        torch.testing.assert_close(scale._v, expected)
        weights[recompute] = {name: parameter.grad for name, parameter in vit.named_parameters()}
    assert weights[True].keys() == weights[False].keys() and any("scale" in name for name in weights[True])
    for name, gradient in weights[True].items():
        torch.testing.assert_close(gradient, weights[False][name])


def test_spectral_gradient_treats_the_singular_vectors_as_constants():
    scale, weight = SpectralScale(6, 4, 2), torch.randn(6, 4, dtype=torch.double, requires_grad=True)
    scale.start(weight.detach().float())
    iterate_once(scale)
    scale(weight.float())
    scale.double()
    assert torch.autograd.gradcheck(lambda w, g: torch.func.functional_call(scale, {"scale": g}, (w,)),
                                    (weight, scale.scale))  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "radio", "message"),
    [
        ({"pos_embed": "rope2d"}, {}, "learned position table"),
        ({}, {"cpe_max_size": 16}, "cpe_max_size=16 is below student.image_size=32"),
        ({}, {"window_sizes": [2], "num_global": 5}, "leave none: lower num_global"),
        ({}, {"spectral": 3}, "choose 0"),
        ({}, {"conditioner": "dino"}, "choose 'clip' or ''"),
        ({}, {"position_dropout": 1.5}, "probability from 0 to 1"),
        ({}, {"window_sizes": [0]}, "sides of 1 patch or more"),
    ],
)
def test_options_that_do_not_fit(fields, radio, message):
    with pytest.raises(ValueError, match=message):
        student(**fields, radio=radio)


def test_bfloat16_products_keep_positions_and_singular_values_in_float32():
    options = {"cpe_max_size": 96, "window_sizes": [2], "num_windowed": 1, "spectral": 2, "position_dropout": 0.1}
    vit, x = student(radio=options), torch.randn(2, 3, 32, 48)
    full = vit.block_outputs(x, [4], draws=draws(2))[4]
    scale = vit.blocks[0].attn.qkv.parametrizations.weight[0].parts[1]
    before = scale._v.clone()
    with torch.autocast("cpu", torch.bfloat16):
        low = vit.block_outputs(x, [4], draws=draws(2, 0))[4]
        positions = vit.embed(x).dtype
        weight = vit.blocks[0].mlp.fc1.weight
    assert torch.equal(scale._v, before) and low.dtype == positions == weight.dtype == torch.float32
    assert 0 < float((low - full).detach().norm() / full.detach().norm()) < 2e-2
    low.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vit.parameters())
