"""What lies in memory while operations run, counted on tensors without content."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_aten = torch.ops.aten


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, while they are alive; selections by a mask keep everything."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is _aten._local_scalar_dense.default:
            return 0 if args[0].dtype == torch.bool else args[0].new_empty(0).numel()
        args = self._whole(func, args)
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        outputs = result if isinstance(result, tuple | list) and len(returns) > 1 else [result]
        for output, about in zip(outputs, returns, strict=False):
            if about.alias_info is None:  # views and results of operations in place are there already
                for x in tree_flatten(output)[0]:
                    if isinstance(x, Tensor):
                        self.add(x)
        self.most = max(self.most, self.now)
        return result

    def _whole(self, func: Any, args: tuple) -> tuple:
        """The arguments with every mask of an index replaced by the indices of all its places."""
        if func not in (_aten.index.Tensor, _aten._index_put_impl_.default, _aten.index_put.default):
            return args
        indices: list[Tensor | None] = []
        for mask in args[1]:
            if mask is not None and mask.dtype == torch.bool:
                indices += [mask.new_zeros(mask.numel(), dtype=torch.int64) for _ in range(mask.ndim)]
            else:
                indices.append(mask)
        for index in indices:
            if index is not None:
                self.add(index)
        return args[0], indices, *args[2:]

    def add(self, x: Tensor) -> None:
        """Counts a tensor's storage from now on until it is gone."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size


def without_content(module: nn.Module, mode: FakeTensorMode) -> None:
    """Makes the tensors of a module on the meta device fake ones of the CPU, with gradients."""
    for part in module.modules():
        for name, x in part.named_parameters(recurse=False):
            fake = nn.Parameter(FakeTensor(mode, x.detach(), torch.device("cpu")), x.requires_grad)
            fake.grad = torch.zeros_like(fake) if x.requires_grad else None
            setattr(part, name, fake)
        for name, x in part.named_buffers(recurse=False):
            setattr(part, name, FakeTensor(mode, x, torch.device("cpu")))


def by_value(function: Callable) -> Callable:
    """Remembers results by what the arguments are, dataclasses too: a plan asks for the same a hundred times."""
    known: dict[str, Any] = {}

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        key = repr((arguments, named))
        if key not in known:
            known[key] = function(*arguments, **named)
        return known[key]

    return call
