"""What accelerators can do at best, and how much memory a process has used."""

from __future__ import annotations

import re
import resource

import torch
import torch.distributed as dist

from dune_fast.kernels.cpu import MULTIPLIES_BF16

# Dense bf16 products with float32 accumulation, TFLOP/s, from the vendor's data sheets (half of what they print "with
# sparsity"). The first pattern that matches the device's name counts, so variants stand before what they vary.
_PEAK_TFLOPS = (
    (r"MIG", None),  # a slice of a device: its share is not in the name's numbers
    (r"GB200", 2500.0),
    (r"B200", 2250.0),
    (r"B100", 1750.0),
    (r"GH200", 989.4),
    (r"H[12]00 NVL", 835.5),
    (r"H100 PCIe", 756.5),
    (r"H20\b", 148.0),
    (r"H[12]00|H800", 989.4),
    (r"A[18]00\b", 311.9),
    (r"A40\b", 149.7),
    (r"A30\b", 165.0),
    (r"A10\b", 125.0),
    (r"L40S", 362.0),
    (r"L40\b", 181.0),
    (r"L4\b", 121.0),
    (r"RTX 5090 Laptop|RTX 4090 Laptop|RTX 4090 D", None),  # other chips of that name
    (r"RTX 5090\b", 209.5),
    (r"RTX 4090\b", 165.2),
    (r"RTX 3090\b(?! Ti)", 71.0),
)


def peak_tflops(device_name: str) -> float | None:
    """Peak of dense bf16 products in TFLOP/s; None for a device that the table does not have.

    Args:
        device_name: as `torch.cuda.get_device_name` says it, e.g. "NVIDIA H100 80GB HBM3".
    """
    for pattern, tflops in _PEAK_TFLOPS:
        if re.search(pattern, device_name):
            return tflops
    return None


def device_name(device: torch.device) -> str:
    """The accelerator's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors have taken on a GPU, the most that this process has taken of a CPU's memory.

    Nothing waits for the device.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What `train.precision` means on a device: torch.bfloat16, or None for float32.

    "auto" is bf16 on a GPU and on CPUs that multiply it: a demo step takes 1.32 s against 3.57 in float32 with
    AVX512_BF16.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" or MULTIPLIES_BF16 else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


def agreed_precision(precision: str, device: torch.device) -> str:
    """What `train.precision` means for all ranks of a run, which all call it: "bf16" or "fp32".

    "auto" is bf16 if it is on every rank's device.
    """
    low = torch.tensor(float(autocast_dtype(precision, device) is not None), device=device)
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    return "bf16" if low.item() else "fp32"
