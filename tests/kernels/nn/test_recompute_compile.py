"""Activation checkpointing and torch.compile of the student's blocks change no result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import Student, build_student

TEACHERS = {"a": (24, ["cls", "patch"]), "b": (32, ["patch"])}


def student(dtype: torch.dtype | None = None) -> Student:
    built = build_student(ViTConfig(56, embed_dim=48, depth=2, num_heads=3), ProjectorConfig(), TEACHERS)
    built.autocast_dtype = dtype
    return built


def outputs_and_gradients(model: Student) -> list[Tensor]:
    images = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    outputs = [x for tokens in model(images).values() for x in tokens.values()]
    sum(x.float().square().sum() for x in outputs).backward()
    return [x.detach() for x in outputs] + [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recomputed_activations_give_the_same_bits(dtype):
    expected, model = outputs_and_gradients(student(dtype)), student(dtype)
    model.encoder.activation_checkpointing = True
    calls = []
    model.encoder.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    found = outputs_and_gradients(model)
    assert len(calls) == 2  # once forward, once again for the backward pass
    assert all(map(torch.equal, found, expected))


def test_nothing_is_recomputed_without_gradients():
    model = student().eval()
    model.encoder.activation_checkpointing = True
    with torch.no_grad():
        found, expected = model(torch.ones(1, 3, 56, 56)), student().eval()(torch.ones(1, 3, 56, 56))
    assert torch.equal(found["a"]["patch"], expected["a"]["patch"])


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_compute_the_same(recompute):
    """Traced and partitioned as for the compiler, run by torch's own kernels: a compiler would take a minute here."""
    model = student()
    model.encoder.activation_checkpointing = recompute
    model.compile_blocks(backend="aot_eager")
    assert model.state_dict().keys() == student().state_dict().keys()
    for found, expected in zip(outputs_and_gradients(model), outputs_and_gradients(student()), strict=True):
        # another order of sums: what cancels in a gradient is off by the rounding of its largest values
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * scale)
