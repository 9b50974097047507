"""Attention against the formula in float64, and its choice of a backend."""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from dune_fast.kernels import attention as module
from dune_fast.kernels.attention import attention, resolve_backend
from dune_fast.kernels.library import traced
from dune_fast.kernels.nn.block import SelfAttention
from dune_fast.kernels.rope2d import grid_positions, rope2d_angles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def formula(qkv: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv.double().transpose(1, 3).unbind(2)
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2)


@pytest.mark.parametrize("shape", [(2, 17, 3, 3, 16), (1, 1, 3, 2, 64), (3, 65, 3, 1, 32), (0, 5, 3, 2, 16)])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("auto", FP32, 1e-6), ("math", FP32, 1e-6), ("flash", FP32, 1e-6), ("auto", BF16, 1e-2)],
)
def test_equals_the_formula(shape, backend, dtype, tolerance):
    """Values and gradients."""
    qkv = torch.randn(shape).to(dtype).requires_grad_()
    out, expected = attention(qkv, backend), formula(qkv)
    assert out.shape == expected.shape and out.dtype == dtype
    assert (out.double() - expected).norm() <= tolerance * expected.norm()
    upstream = torch.randn(out.shape)
    (ours,) = torch.autograd.grad(out, qkv, upstream.to(dtype))
    (exact,) = torch.autograd.grad(expected, qkv, upstream.double())
    assert (ours.double() - exact).norm() <= 3 * tolerance * exact.norm()


@pytest.mark.parametrize("rope", [False, True])
def test_the_gradient_of_qkv_is_written_once(rope, dispatched):
    """Regression: the stacked gradients were copied once more for the linear layer before."""
    with FakeTensorMode(), traced():
        layer = SelfAttention(32, 2, "flash")  # a fused kernel, as on a GPU
        angles = rope2d_angles(grid_positions(3, 3), 16) if rope else None
        x = torch.empty(2, 9, 32, dtype=torch.bfloat16, requires_grad=True)
        with dispatched() as counted, torch.autocast("cpu", torch.bfloat16):
            out = layer(x, angles)
            out.backward(torch.empty_like(out))
    assert counted["stack"] + counted["cat"] == 1
    assert counted["clone"] + counted["copy_"] + counted["contiguous"] == 0


def test_large_logits_do_not_overflow():
    qkv = torch.randn(1, 8, 3, 1, 16) * 1e3
    assert torch.isfinite(attention(qkv)).all()


def test_compiles_whole():
    qkv = torch.randn(1, 5, 3, 2, 16)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv), attention(qkv))


@pytest.fixture
def gpu(monkeypatch):
    """An attention that does not ask the device, which is no GPU."""
    plain = SimpleNamespace(scaled_dot_product_attention=lambda q, k, v: (q @ k.mT).softmax(-1) @ v)
    monkeypatch.setattr(module, "F", plain)
    return monkeypatch


@pytest.mark.parametrize("hopper", [False, True])
def test_compiles_whole_on_the_path_of_a_gpu(gpu, hopper):
    """Regression: the look for flash-attn was a cached function; torch 2.11 cannot trace it, later ones warn of it."""
    gpu.setattr(module, "_is_hopper", lambda device: hopper)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*lru_cache")
        out = on_a_gpu(torch.compile(attention, fullgraph=True, backend="eager"))
    assert out.is_cuda and out.shape == (2, 5, 2, 16)


@pytest.fixture
def backends_asked_for(gpu):
    """Lists of backends, in order of priority, that attention asks for on a Hopper GPU, which it believes to be on."""
    asked = []

    @contextmanager
    def sdpa_kernel(backends, set_priority=False):
        assert set_priority
        asked.append(list(backends))
        yield

    gpu.setattr(module, "_is_hopper", lambda device: True)
    gpu.setattr(module, "sdpa_kernel", sdpa_kernel)
    gpu.setattr(module, "FLASH_ATTN_INSTALLED", False)
    return asked


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_a_gpu(attend=attention):
    with FakeTensorMode():
        return attend(torch.empty(2, 5, 3, 2, 16, dtype=torch.bfloat16, device="cuda"))


def test_hopper_takes_cudnn_first_and_flash_where_algorithms_must_be_deterministic(backends_asked_for, deterministic):
    """cuDNN's backward is not, and torch refuses it."""
    on_a_gpu()
    torch.use_deterministic_algorithms(False)
    on_a_gpu()
    asked, freely = backends_asked_for
    assert asked[0] == SDPBackend.FLASH_ATTENTION and SDPBackend.CUDNN_ATTENTION not in asked
    assert freely[0] == SDPBackend.CUDNN_ATTENTION


def test_flash_attn_is_told_to_be_deterministic(monkeypatch, deterministic):
    told = []
    package = SimpleNamespace(flash_attn_qkvpacked_func=lambda qkv, **options: told.append(options))
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(module, "FLASH_ATTN_INSTALLED", True)
    on_a_gpu()
    torch.use_deterministic_algorithms(False)
    on_a_gpu()
    assert told == [{"deterministic": True}, {"deterministic": False}]


@pytest.mark.parametrize(("native", "trained", "dtype", "expected"), [
    (True, True, BF16, None), (True, False, BF16, BF16), (False, True, BF16, FP32), (False, False, BF16, FP32),
    (True, True, FP16, FP32), (True, False, FP16, FP32), (True, True, FP32, FP32),
])  # fmt: skip
@pytest.mark.parametrize("tokens", [9, 581])
def test_a_cpu_takes_the_faster_form(monkeypatch, native, trained, dtype, expected, tokens):
    """`expected`: in which torch's own attention is called; None for the plain formula, which does not call it."""
    seen = []

    def noted(q, k, v, attn_mask=None):
        seen.append(q.dtype)
        return torch.zeros_like(q)

    monkeypatch.setattr(module, "MULTIPLIES_BF16", native)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    qkv = torch.zeros(1, tokens, 3, 1, 8, dtype=dtype, requires_grad=trained)
    assert attention(qkv).dtype == dtype
    assert seen == [expected] * (expected is not None)
    seen.clear()
    attention(qkv, "flash")  # a forced one keeps its type
    assert seen == [dtype]


@pytest.mark.parametrize("tokens", [9, 261])
def test_the_formula_of_a_cpu_is_attention(monkeypatch, tokens):
    monkeypatch.setattr(module, "MULTIPLIES_BF16", True)
    qkv = torch.randn(2, tokens, 3, 2, 16).bfloat16().requires_grad_()
    up = torch.randn(2, tokens, 2, 16).bfloat16()
    out = attention(qkv)
    out.backward(up)
    exact = qkv.detach().double().requires_grad_()
    reference = attention(exact)
    reference.backward(up.double())
    torch.testing.assert_close(out.double(), reference, rtol=0.02, atol=0.02)
    torch.testing.assert_close(qkv.grad.double(), exact.grad, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("tokens", [1, 31, 69, 257, 261])
def test_padded_keys_change_nothing(monkeypatch, tokens):
    monkeypatch.setattr(module, "MULTIPLIES_BF16", True)
    masks = []

    def noted(*args, attn_mask=None, attend=F.scaled_dot_product_attention):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    qkv = 3 * torch.randn(2, tokens, 3, 2, 16).bfloat16()
    torch.testing.assert_close(attention(qkv).double(), attention(qkv.double()), rtol=0.02, atol=0.02)
    assert [mask is not None for mask in masks] == [tokens % 32 > 1, False]  # a multiple of 32 and one over are fast


def test_autocast_leaves_float32_attention_alone(monkeypatch):
    monkeypatch.setattr(module, "MULTIPLIES_BF16", False)
    qkv = torch.randn(1, 9, 3, 2, 16).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(qkv)
    assert out.dtype == torch.bfloat16 and torch.equal(out, attention(qkv.float()).bfloat16())


def test_wrong_input_is_explained(monkeypatch, deterministic):
    with pytest.raises(ValueError, match=r"\[B, N, 3, heads, head_dim\]"):
        attention(torch.zeros(2, 5, 2, 3, 16))
    with pytest.raises(ValueError, match="'quick' is unknown; choose one of auto"):
        attention(torch.zeros(2, 5, 3, 3, 16), "quick")
    monkeypatch.setattr(module, "FLASH_ATTN_INSTALLED", False)
    with pytest.raises(ValueError, match="pip install flash-attn"):
        resolve_backend("flash_attn", torch.zeros(2, 5, 3, 3, 16))
    with pytest.raises(ValueError, match="'cudnn' is not deterministic; choose auto, flash or flash_attn"):
        attention(torch.zeros(2, 5, 3, 3, 16), "cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "cudnn", "flash", "efficient"])
@pytest.mark.parametrize("tokens", [577, 1025])
def test_gpu_backends_equal_the_formula(backend, tokens):
    torch.manual_seed(0)
    qkv = torch.randn(2, tokens, 3, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out, expected = attention(qkv, backend), formula(qkv)
    assert (out.double() - expected).norm() <= 1e-2 * expected.norm()
    (ours,) = torch.autograd.grad(out.sum(), qkv)
    (theirs,) = torch.autograd.grad(expected.sum(), qkv)
    assert (ours.double() - theirs).norm() <= 2e-2 * theirs.norm()
