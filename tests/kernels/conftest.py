"""What the kernels' tests share: where they run, how errors are judged, poisoned memory, rounding as a GPU does it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dune_fast.kernels import library

_TYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}


def _convert(data: np.ndarray, source, target, rounding_mode=None) -> np.ndarray:
    """The bits of `data` in another floating-point type, rounded to nearest, ties to even."""
    given = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).reshape(-1)).view(_TYPES[source.name])
    converted = given.to(_TYPES[target.name]).view(torch.uint8).numpy()
    return converted.view(f"uint{target.primitive_bitwidth}").reshape(data.shape)


@pytest.fixture(scope="session", autouse=True)
def rounding_to_nearest() -> Iterator[None]:
    """The interpreter cuts bf16 off, and loses the carry when it rounds to float8: give it torch's conversions."""
    if not library.INTERPRETER:
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", _convert)
        yield


@pytest.fixture
def device() -> torch.device:
    """Where the kernels are tested: the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def fused() -> Callable[[], contextlib.AbstractContextManager]:
    """`with fused():` makes the public functions take the Triton kernels, on the GPU or in the interpreter."""
    return library.interpreted if library.INTERPRETER else contextlib.nullcontext


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised is full of NaN, so that an output nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact| in L2, scaled so that squares stay finite; absolute where exact is 0; inf for NaN."""
    found, exact = found.double().cpu(), exact.double().cpu()
    assert found.shape == exact.shape, (found.shape, exact.shape)
    size = exact.abs().max().item() if exact.numel() else 0.0
    scale = size or 1.0
    error = ((found - exact) / scale).norm() / ((exact / scale).norm() if size else 1.0)
    return float("inf") if error.isnan() else error.item()


@pytest.fixture
def no_worse() -> Callable[[Tensor, Tensor, Tensor], None]:
    """no_worse(ours, eager, exact): our error is at most twice that of torch in the same types, plus 1e-6."""

    def check(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
        error, allowed = relative_error(ours, exact), 2 * relative_error(eager, exact) + 1e-6
        assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"

    return check


def outputs_and_gradients(function: Callable, inputs: Sequence, upstream: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of function(*inputs), then the gradients of the inputs that ask for one."""
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    given = [up.to(out.dtype) for up, out in zip(upstream, outputs, strict=True)]
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, given)]


def in_float64(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same leaves in float64."""
    return [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in inputs]


@pytest.fixture
def agrees(fused, no_worse) -> Callable[..., list[Tensor]]:
    """agrees(ours, eager, reference, inputs, upstream): `no_worse` for outputs and gradients, which it returns.

    `reference` gets the inputs in float64.
    """

    def check(ours, eager, reference, inputs, upstream) -> list[Tensor]:
        with fused():
            found = outputs_and_gradients(ours, inputs, upstream)
        other = outputs_and_gradients(eager, inputs, upstream)
        exact = outputs_and_gradients(reference, in_float64(inputs), upstream)
        for one, theirs, truth in zip(found, other, exact, strict=True):
            no_worse(one, theirs, truth)
        return found

    return check


@pytest.fixture
def dispatched() -> Callable[[], contextlib.AbstractContextManager[Counter[str]]]:
    """`with dispatched() as count:` counts what is dispatched inside, by name."""

    class Names(TorchDispatchMode):
        def __enter__(self) -> Counter[str]:
            super().__enter__()
            self.count: Counter[str] = Counter()
            return self.count

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count[func._schema.name.partition("::")[2]] += 1
            return func(*args, **(kwargs or {}))

    return Names
