"""Which CPUs multiply bf16."""

from __future__ import annotations

import pytest
import torch

from dune_fast.kernels.cpu import multiplies_bf16


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, False),
        ({"avx2": True, "avx512_f": True, "amx_bf16": False, "avx512_bf16": False}, False),
        ({"amx_bf16": False, "avx512_bf16": True}, True),  # regression: only AMX counted
        ({"amx_bf16": True, "avx512_bf16": False}, True),
    ],
)
def test_either_instruction_counts(capabilities, expected):
    assert multiplies_bf16(capabilities) is expected


def test_torch_says_whether_there_are_such_instructions():
    """A name that torch changes would read as "no"."""
    if torch.cpu.get_capabilities().get("architecture") == "x86_64":
        assert {"amx_bf16", "avx512_bf16"} <= torch.cpu.get_capabilities().keys()
