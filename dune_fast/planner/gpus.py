"""GPUs: public facts, and what is assumed of them until it is measured.

Rates are dense, with float32 accumulation: half of what data sheets print "with sparsity". Memory is as sold, in GiB.
"""

from __future__ import annotations

from dataclasses import dataclass

from dune_fast.engine.devices import peak_tflops

EFFICIENCY = 0.39
"""Share of the dense bf16 rate that a training step is taken to reach on every GPU. It is what bench/NOTES.md ("The
whole step, counted without a GPU") predicts for an H100: 128 images of dune_336 in 517 ms. No GPU has been measured."""
FP8_TEACHER = 0.69
"""Time of a ViT-L teacher in FP8 over its time in bf16, as bench/NOTES.md ("Teachers") predicts it; not measured."""
LINK_SHARE = 0.5
"""Of a link's published rate that collectives are taken to reach; not measured."""
PCIE_GB_S = 31.5
"""PCIe 4.0 x16, one direction (16 lanes of 16 GT/s, 128 of 130 bits): what a GPU that is not in the table is taken to
have. PCIe 5.0 has twice that."""


@dataclass(frozen=True)
class GPU:
    """One GPU, by the vendor's data sheet."""

    device: str
    """How `torch.cuda.get_device_name` begins after "NVIDIA "."""
    memory_gib: int
    bandwidth: int
    """GB/s of its memory."""
    fp8: float | None
    """TFLOP/s; None without FP8."""
    watts: int
    """Of the board, at most."""
    link: float
    """GB/s to other GPUs of the machine, one direction: NVLink, or PCIe x16."""
    source: str
    """Where the numbers are published."""

    @property
    def bf16(self) -> float:
        """TFLOP/s."""
        found = peak_tflops(self.device)
        assert found is not None, self.device
        return found


GPUS = {
    "rtx3090": GPU(
        "GeForce RTX 3090", 24, 936, None, 350, 31.5, "NVIDIA Ampere GA102 GPU Architecture whitepaper, RTX 3090"
    ),
    "rtx4090": GPU("GeForce RTX 4090", 24, 1008, 330.3, 450, 31.5, "NVIDIA Ada GPU Architecture whitepaper, RTX 4090"),
    "rtx5090": GPU(
        "GeForce RTX 5090", 32, 1792, 419.0, 575, 63.0,
        "NVIDIA RTX Blackwell GPU Architecture whitepaper, RTX 5090; its FP8 rate is unverified",
    ),
    "l4": GPU("L4", 24, 300, 242.5, 72, 31.5, "NVIDIA L4 Tensor Core GPU datasheet"),
    "l40s": GPU("L40S", 48, 864, 733.0, 350, 31.5, "NVIDIA L40S datasheet"),
    "a40": GPU("A40", 48, 696, None, 300, 31.5, "NVIDIA A40 datasheet"),
    "a100_40": GPU("A100-SXM4-40GB", 40, 1555, None, 400, 300.0, "NVIDIA A100 Tensor Core GPU datasheet, 40 GB SXM"),
    "a100": GPU("A100-SXM4-80GB", 80, 2039, None, 400, 300.0, "NVIDIA A100 Tensor Core GPU datasheet, 80 GB SXM"),
    "h100": GPU("H100 80GB HBM3", 80, 3350, 1979.0, 700, 450.0, "NVIDIA H100 Tensor Core GPU datasheet, SXM"),
    "h200": GPU("H200", 141, 4800, 1979.0, 700, 450.0, "NVIDIA H200 Tensor Core GPU datasheet, SXM"),
    "b200": GPU("B200", 180, 8000, 4500.0, 1000, 900.0, "NVIDIA DGX B200 datasheet, an eighth; HGX B200 at 1000 W"),
}
"""By the name that `dune-fast plan --gpu` takes."""


def find_gpu(name: str) -> GPU:
    """A GPU of the table; ValueError for another name."""
    if name not in GPUS:
        raise ValueError(
            f"--gpu {name}: not in the table, which has {', '.join(GPUS)}; for another GPU give --tflops X, what one "
            "reaches, and --gpu-memory GIB"
        )
    return GPUS[name]


def gpu_of_device(device_name: str) -> GPU | None:
    """The GPU of the table that torch calls so, e.g. "NVIDIA H100 80GB HBM3"; None if it is not there."""
    name = device_name.removeprefix("NVIDIA ")
    return next((gpu for gpu in GPUS.values() if name == gpu.device), None)
