"""What only the compiled code of a kernel shows, and neither its values nor the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.aot import cases, specialize
from dune_fast.kernels.launching import recording

def compiled(name, call):
    with recording("sm_90") as launches:
        call()
        (recorded,) = [launch for launch in launches if launch.kernel.__name__ == name]
    source = specialize(recorded)
    return triton.compile(
        ASTSource(recorded.kernel, source.signature, source.constants, source.attributes),
        target=GPUTarget("cuda", 90, 32), options=source.options,
    ).asm

def first(module):
    with recording("sm_90"):
        _, example = cases(module)[0]
    return lambda: example.op(*example.args)
"""


def run_compiled(code: str) -> None:
    """In a process without the interpreter, which triton reads once."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE + code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_loops_that_move_bytes_copy_tiles_ahead():
    """They would be right without it, and slow."""
    run_compiled("""
from dune_fast.kernels import distill_loss, gelu, moments
x = torch.empty(4, 9, 256, dtype=torch.bfloat16, device="meta")
vector, image = torch.empty(256, device="meta"), torch.empty(4, device="meta")
saved, terms = torch.empty(32, 2, device="meta"), (0.5, 0.5, 1.0)
calls = {
    "_split_kernel": lambda: moments._moments(x[:, 1:]),
    "_token_kernel": lambda: distill_loss._forward(x[:, 1:], x[:, 1:], vector, vector, *terms),
    "_gradient_kernel": lambda: distill_loss._backward(x[:, 1:], x[:, 1:], vector, vector, saved, image, *terms),
    "_backward_kernel": lambda: gelu.bias_gelu_backward_op(x, x, vector),
}
for name, call in calls.items():
    assert "cp.async.cg.shared.global" in compiled(name, call)["ptx"], name + " waits for every load"
""")


def test_compiled_windows_hold_every_row():
    """The compiler once dropped rows that began as one value from a loop's variables, which the interpreter never does:
    three of the four rows here, and seven of the nine of the blur, were zero on a GPU."""
    run_compiled("""
for module, kernel, rows in (("resize", "_resize_kernel", 7), ("augment", "_blur_kernel", 8)):
    text = compiled(kernel, first(module))["ttir"]
    carried = max(line.split("->")[1].count("xf32>") for line in text.splitlines() if "scf.for" in line)
    assert carried == rows, (kernel, carried)
""")
