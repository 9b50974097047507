"""Gradients averaged while the backward pass runs. On several ranks: tests/engine/test_zero.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dune_fast.engine.deepspeed_engine import init_distributed
from dune_fast.engine.gradient_average import LARGEST, GradientAverage, _parts


class Recorded(torch.autograd.Function):
    """Writes down when the backward pass comes by."""

    @staticmethod
    def forward(ctx, x: Tensor, events: list[str], name: str) -> Tensor:
        ctx.events, ctx.name = events, name
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.events.append(ctx.name)
        return gradient, None, None


@pytest.fixture
def layers() -> nn.ModuleList:
    init_distributed()
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(8))


def loss(layers: nn.ModuleList, x: Tensor, events: list[str] | None = None) -> Tensor:
    for i, layer in enumerate(layers):
        x = layer(Recorded.apply(x, events, f"layer {i}") if events is not None else x)
    return x.square().mean()


def test_a_bucket_travels_while_earlier_layers_are_computed(layers, monkeypatch):
    events: list[str] = []
    real = dist.all_reduce

    def all_reduce(x: Tensor, **options):
        events.append("sent")
        return real(x, **options)

    average = GradientAverage(list(layers.parameters()), torch.float32)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    average.begin()
    loss(layers, torch.randn(4, 16, requires_grad=True), events).backward()
    average.finish()
    assert events.count("sent") == 8 and events[:4] == ["sent", "layer 7", "sent", "layer 6"], events


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_of_one_rank_is_its_gradient(layers, dtype):
    parts = [torch.randn(4, 16), torch.randn(4, 16)]
    for x in parts:
        loss(layers, x).backward()
    expected = [p.grad.to(dtype).float() for p in layers.parameters()]
    average = GradientAverage(list(layers.parameters()), dtype)
    for _ in range(2):
        layers.zero_grad()
        loss(layers, parts[0]).backward()
        average.begin()  # the first part's gradients stay here: nothing was sent for them
        loss(layers, parts[1]).backward()
        average.finish()
        for p, gradient in zip(layers.parameters(), expected, strict=True):
            assert p.grad.dtype == torch.float32 and torch.equal(p.grad, gradient)


@pytest.mark.parametrize("size", [1000, 1_000_000])
def test_parts_begin_at_the_end_and_are_not_too_large(size):
    sizes = [5, 20 * size, 10, *[size] * 80, 3]
    parameters = [nn.Parameter(torch.empty(n, device="meta")) for n in sizes]
    parts = [[p.numel() for p in part] for part in _parts(parameters, 4)]
    assert [n for part in parts for n in part] == sizes[::-1]
    assert all(sum(part) <= min(LARGEST // 4, sum(sizes) // 8) or len(part) == 1 for part in parts)
    assert 8 <= len(parts) <= 20 and [20 * size] in parts
