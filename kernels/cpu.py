"""What the CPU at hand is good at; looked up once, so that every call of a run decides alike."""

from __future__ import annotations

import torch


def multiplies_bf16(capabilities: dict[str, object]) -> bool:
    """Whether a CPU has instructions for bf16 products (AMX or AVX512_BF16); others emulate them, slower than float32.

    Args:
        capabilities: as `torch.cpu.get_capabilities` says them.
    """
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


MULTIPLIES_BF16 = multiplies_bf16(torch.cpu.get_capabilities())
"""Of this machine. By flags and not by a clock: a measurement beside other work may say something else at a resume."""
