"""What the kernels share: registration, dispatch, launch tables, recording, guards, the layout of rows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dune_fast.kernels import launching, library
from dune_fast.kernels.launching import Launch, architecture, choose, processors, recording
from dune_fast.kernels.library import as_rows, describe, guard_device, interpreted, register, use_triton

CPU = torch.device("cpu")


def read_rows(rows: library.Rows) -> torch.Tensor:
    """All rows through the offsets that a kernel computes."""
    r = torch.arange(rows.count)
    start = (r // rows.inner) * rows.outer_stride + (r % rows.inner) * rows.inner_stride
    at = start[:, None] + torch.arange(rows.x.shape[-1])
    size = int(at.max()) + 1 if at.numel() else 0
    return rows.x.as_strided((size,), (1,), rows.x.storage_offset())[at]


BASE = torch.arange(4 * 6 * 8 * 10).view(4, 6, 8, 10)
TOKENS = BASE.view(24, 8, 10)
LAYOUTS = {
    "rows": (BASE.view(-1, 10), False),
    "contiguous": (TOKENS, False),
    "patches": (TOKENS[:, 1:], False),
    "cls": (TOKENS[:, 0], False),
    "some channels": (TOKENS[:, :, 2:7], False),
    "every other token": (TOKENS[:, ::2], False),
    "one image": (TOKENS[:1, 1:], False),
    "one vector": (TOKENS[0, 0], False),
    "expanded": (TOKENS[:1].expand(5, 8, 10), False),
    "mergeable": (BASE[:, :, 1:], False),
    "no rows": (TOKENS[:0], False),
    "swapped tokens": (TOKENS.transpose(0, 1), False),
    "three strides": (BASE[:, :4:2, 1:], True),
    "swapped channels": (TOKENS.transpose(1, 2), True),
    "every other channel": (TOKENS[..., ::2], True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_any_layout(name):
    x, copied = LAYOUTS[name]
    rows = as_rows(x)
    assert (rows.x is not x) == copied
    assert rows.period in (0, rows.inner)
    assert torch.equal(read_rows(rows), x.reshape(-1, x.shape[-1]))


@pytest.mark.skipif(not library.INTERPRETER, reason="the interpreter is off")
def test_kernels_serve_a_cpu_only_when_asked():
    x, wide = torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    assert not use_triton(x)
    with interpreted():
        assert use_triton(x, None, torch.arange(3))
        assert not use_triton(x, wide)
    assert not use_triton(x)


@pytest.mark.skipif(not library.INTERPRETER, reason="the interpreter is off")
def test_registered_operation_takes_the_kernel_or_the_reference():
    operation = register(
        "test_library(Tensor x, float a) -> Tensor",
        lambda x, a: x + a,
        lambda x, a: x - a,
        lambda x, a: x.new_empty(x.shape),
    )
    x = torch.ones(3)
    assert torch.equal(operation(x, 2.0), x - 2)
    with interpreted():
        assert torch.equal(operation(x, 2.0), x + 2)
    torch.library.opcheck(operation, (x, 2.0))
    assert operation(x.to("meta"), 2.0).shape == x.shape


def test_launch_table():
    table = {
        "default": [Launch(64, {"BLOCK": 1}), Launch(256, {"BLOCK": 2})],
        "sm_90": [Launch(64, {"BLOCK": 3})],
    }
    assert choose(table, CPU, 64) == {"BLOCK": 1}
    assert choose(table, CPU, 65) == {"BLOCK": 2}
    with pytest.raises(ValueError, match="up to 256 channels, got 257"):
        choose(table, CPU, 257)
    with recording("sm_90"):
        assert choose(table, CPU, 64) == {"BLOCK": 3}
        assert architecture(CPU) == "sm_90" and processors(CPU) == 132
    choose(table, CPU, 64)["BLOCK"] = 7  # a caller's own copy
    assert choose(table, CPU, 64) == {"BLOCK": 1}


def test_recording_launches_nothing():
    def kernel():
        raise AssertionError

    with recording("sm_80") as launches:
        launching.launch(kernel, (4,), 1, 2, BLOCK=3)
    assert [(launch.args, launch.options) for launch in launches] == [((1, 2), {"BLOCK": 3})]
    launching.launch(kernel, (0, 4))  # an empty grid


def test_messages_name_tensors():
    x, y = torch.zeros(2, 3), torch.zeros(1, device="meta", dtype=torch.bfloat16)
    assert describe(x=x, missing=None, y=y) == "x float32 [2, 3] on cpu, y bfloat16 [1] on meta"
    with pytest.raises(ValueError, match="sum takes tensors of one device; got x float32"):
        guard_device("sum", x=x, y=y)


def test_without_triton_the_references_serve():
    """macOS and Windows have no triton: every file must import there and compute."""
    code = (
        "import sys, importlib, pkgutil; sys.modules['triton'] = None\n"
        "import torch; from dune_fast import kernels\n"
        "names = [m.name for m in pkgutil.iter_modules(kernels.__path__)]\n"
        "modules = {n: importlib.import_module('dune_fast.kernels.' + n) for n in names}\n"
        "mean, m2 = modules['moments'].moments(torch.tensor([[1.0], [3.0]]))\n"
        "assert (mean.item(), m2.item()) == (2.0, 2.0)\n"
        "x = torch.randn(2, 3, 4, requires_grad=True)\n"
        "modules['distill_loss'].distill_loss(x, x.detach() + 1).total.sum().backward()\n"
        "try: modules['library'].interpreted().__enter__()\n"
        "except ValueError as error: assert 'TRITON_INTERPRET' in str(error)\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
