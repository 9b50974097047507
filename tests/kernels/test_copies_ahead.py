"""The loops that move bytes copy tiles ahead: they would be right without it, and slow."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
CODE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.aot import specialize
from dune_fast.kernels import distill_loss, gelu, moments
from dune_fast.kernels.launching import recording

x = torch.empty(4, 9, 256, dtype=torch.bfloat16, device="meta")
vector = torch.empty(256, device="meta")
calls = {
    "_split_kernel": lambda: moments._moments_triton(x[:, 1:]),
    "_token_kernel": lambda: distill_loss._both_ways(x[:, 1:], vector),
    "_gradient_kernel": lambda: distill_loss._both_ways(x[:, 1:], vector),
    "_backward_kernel": lambda: gelu._backward_fused(x, x, vector),
}
for name, call in calls.items():
    with recording("sm_90") as launches:
        call()
        (recorded,) = [launch for launch in launches if launch.kernel.__name__ == name]
    source = specialize(recorded)
    compiled = triton.compile(
        ASTSource(recorded.kernel, source.signature, source.constants, source.attributes),
        target=GPUTarget("cuda", 90, 32), options=source.options,
    )
    assert "cp.async.cg.shared.global" in compiled.asm["ptx"], name + " waits for every load"
"""


@pytest.mark.slow
def test_loops_copy_tiles_ahead():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
