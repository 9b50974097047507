"""Self-attention over a packed qkv tensor, through the fastest implementation that the device has.

    out[b, i, h] = sum_j softmax_j(q[b, i, h] . k[b, j, h] / sqrt(head_dim)) v[b, j, h]

Minimal bytes moved: read qkv, write out: 4 * B * N * H * D elements; nothing of size N x N reaches memory.
Shapes: qkv [B, N, 3, H, D] -> out [B, N, H, D]. `cross_attention` takes the keys and values of another sequence.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dune_fast.kernels.cpu import MULTIPLIES_BF16
from dune_fast.kernels.library import use_triton

BACKENDS = ("auto", "flash_attn", "flash", "cudnn", "efficient", "math")

_SDP = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}
# torch prefers its FlashAttention-2, which leaves Hopper's warp-group products unused; cuDNN's kernels use them. The
# others follow for what cuDNN does not take (float32, odd head sizes). Not yet measured here. cuDNN makes a plan for
# every new shape, which costs the host time once; a run has few shapes (tests/distill/test_routing.py), so nothing is
# warmed up or padded for them.
_HOPPER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# looked up once, here: torch.compile, which traces `attention`, cannot look into the import system
FLASH_ATTN_INSTALLED = importlib.util.find_spec("flash_attn") is not None
"""Whether the flash-attn 2 package (the `flash` extra) can be imported."""


def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _cpu_form(qkv: Tensor) -> str:
    """How a CPU computes fastest: by "sdpa", by sdpa in "float32", conversions included, by the "formula" in bf16, or
    by sdpa with "padded" keys.

    torch's backward pass in half precision multiplies without the CPU's bf16 instructions; the formula's products use
    them. Forward + backward in bf16, in float32 and by the formula, [16, 69] / [4, 257] / [2, 577] tokens: one core of
    a Xeon with AMX, 6, 12 and 12 heads of 64: 22 / 32 / 69 ms, 11 / 31 / 73 ms, 4 / 17 / 31 ms; one of an EPYC with
    AVX2, 3 heads: 34 / 92 / 207 ms, 13 / 22 / 46 ms, 16 / 29 / 61 ms. Forward alone the Xeon is fastest in torch's
    kernel, which is slow for some numbers of keys: padded to a multiple of 32, [4, 261] tokens take 8.0 instead of
    11.6 ms. From 512 keys on, or with one key over, the mask costs more than it saves.
    """
    if qkv.device.type != "cpu" or qkv.dtype not in (torch.float16, torch.bfloat16) or use_triton(qkv):
        return "sdpa"  # the last: operations are counted as on a GPU
    if qkv.dtype == torch.float16 or not MULTIPLIES_BF16:
        return "float32"
    if qkv.requires_grad and torch.is_grad_enabled():
        return "formula"
    return "padded" if qkv.shape[1] % 32 > 1 and qkv.shape[1] < 512 else "sdpa"


def _formula(qkv: Tensor) -> Tensor:
    """Attention with its N x N weights in memory, in the type of `qkv`."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (torch.softmax(weights, -1, dtype=weights.dtype) @ v).transpose(1, 2)


def _padded(qkv: Tensor) -> Tensor:
    """Attention with keys and values padded to a multiple of 32 tokens; the padding is masked."""
    b, n, _, h, d = qkv.shape
    pairs = qkv.new_zeros(b, -(-n // 32) * 32, 2, h, d)
    pairs[:, :n] = qkv[:, :, 1:]
    mask = qkv.new_zeros(pairs.shape[1])
    mask[n:] = float("-inf")
    k, v = (x.transpose(1, 2) for x in pairs.unbind(2))
    return F.scaled_dot_product_attention(qkv[:, :, 0].transpose(1, 2), k, v, attn_mask=mask[None, :]).transpose(1, 2)


def resolve_backend(backend: str, qkv: Tensor) -> str:
    """The backend that `attention` uses for this tensor: `backend` itself, or the choice that "auto" stands for."""
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "flash_attn" and not FLASH_ATTN_INSTALLED:
        raise ValueError("attention backend 'flash_attn' needs the package flash-attn: pip install flash-attn")
    if backend == "cudnn" and torch.are_deterministic_algorithms_enabled():
        raise ValueError("attention backend 'cudnn' is not deterministic; choose auto, flash or flash_attn")
    half = qkv.dtype in (torch.float16, torch.bfloat16)
    if backend == "auto" and qkv.is_cuda and half and qkv.shape[-1] <= 256 and FLASH_ATTN_INSTALLED:
        return "flash_attn"
    return backend  # "auto": scaled_dot_product_attention's own order, or _HOPPER


def attention(qkv: Tensor, backend: str = "auto") -> Tensor:
    """Softmax self-attention, [B, N, H, D] in the dtype of `qkv`.

    Args:
        qkv: [B, N, 3, H, D], fp32, bf16 or fp16; queries, keys and values along dimension 2.
        backend: "auto" takes flash-attn where it is installed and applies (CUDA, half precision), else the fastest of
            torch's on the device (see `_cpu_form` for a CPU's). The others force one.

    Raises:
        ValueError: `qkv` is not [B, N, 3, H, D], or the backend is unknown, not installed, or refused by
            `torch.use_deterministic_algorithms`.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention takes qkv of shape [B, N, 3, heads, head_dim], got {list(qkv.shape)}")
    if backend == "auto" and (form := _cpu_form(qkv)) != "sdpa":
        with torch.autocast("cpu", enabled=False):  # it would convert
            if form == "float32":
                return attention(qkv.float()).to(qkv.dtype)
            return _formula(qkv) if form == "formula" else _padded(qkv)
    backend = resolve_backend(backend, qkv)
    if backend == "flash_attn":
        from flash_attn import flash_attn_qkvpacked_func

        return flash_attn_qkvpacked_func(qkv, deterministic=torch.are_deterministic_algorithms_enabled())
    # unbound before the transposition: the backward then stacks the three gradients as [B, N, 3, H, D], which the
    # linear layer before takes as it is; the other way round they come as [B, H, 3, N, D] and are copied once more
    q, k, v = qkv.unbind(2)
    if backend != "auto":
        with sdpa_kernel(_SDP[backend]):
            return _sdpa(q, k, v)
    return _fastest(q, k, v)


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of queries to the keys and values of another sequence, [B, N, H, D] in the dtype of q.

    Args:
        q: [B, N, H, D], fp32, bf16 or fp16.
        k, v: [B, M, H, D], of the same dtype.

    Raises:
        ValueError: the shapes do not fit.
    """
    if q.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            "cross_attention takes q [B, N, heads, head_dim], k and v [B, M, heads, head_dim], got "
            f"{', '.join(str(list(x.shape)) for x in (q, k, v))}"
        )
    return _fastest(q, k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention, [B, N, H, D] of q [B, N, H, D], k and v [B, M, H, D]; transpositions are views."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _fastest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `_sdpa`, in the order of preference of the device."""
    if q.is_cuda and _is_hopper(q.device):
        # deterministic algorithms: torch refuses cuDNN; the backward passes of the others add in a fixed order
        order = _HOPPER[1:] if torch.are_deterministic_algorithms_enabled() else _HOPPER
        with sdpa_kernel(order, set_priority=True):
            return _sdpa(q, k, v)
    return _sdpa(q, k, v)
