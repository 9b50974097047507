"""Modules on fake tensors: shapes without data, so that networks of full size run at once, on the paths of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call

from dune_fast.kernels.library import traced


@contextmanager
def faked(*modules: nn.Module) -> Iterator[list[Callable]]:
    """What calls each module with fake weights; inside, tensors that are made are fake, too."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(x: torch.Tensor) -> torch.Tensor:
        return FakeTensor(mode, x.detach().to("meta"), torch.device("cpu")).requires_grad_(x.requires_grad)

    def call(module: nn.Module) -> Callable:
        weights = {name: fake(x) for name, x in (*module.named_parameters(), *module.named_buffers())}
        return lambda *inputs: functional_call(module, weights, inputs)

    with mode, traced():
        yield [call(module) for module in modules]
