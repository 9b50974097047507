"""One pre-norm transformer block, the same for student, teachers and transformer projectors.

    x = x + ls1 * Attention(LN(x));  x = x + ls2 * MLP(LN(x))

Every residual addition is one pass with the norm that reads its result, which for the second is the next block's: see
`run_blocks`. On a GPU a trained bias is added by the pass that reads the product, whose backward makes its gradient:
fc1's with GELU, proj's and fc2's with the residual addition. A frozen one is added by the product, which costs nothing.
Parameter names are those of DINOv2's releases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dune_fast.kernels.attention import attention
from dune_fast.kernels.fp8 import E4M3, FP8Linear, FP8Rows, bias_gelu_fp8, layer_norm_fp8, residual_layer_norm_fp8
from dune_fast.kernels.gelu import bias_gelu, linear_gelu
from dune_fast.kernels.layer_norm import layer_norm, residual_layer_norm
from dune_fast.kernels.library import followed, use_triton
from dune_fast.kernels.nn.routing import select
from dune_fast.kernels.residual import residual
from dune_fast.kernels.rope2d import rope2d, rope2d_

LAYER_NORM_EPS = 1e-6
MLP_KINDS = ("gelu", "swiglu")
"""What students may have; "gelu" is exact."""
ACTIVATIONS = {
    "quick_gelu": lambda u: torch.sigmoid(1.702 * u).mul_(u),
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
}
"""Further kinds, of frozen networks of others: CLIP's approximation of GELU, and that by tanh."""


class LayerNorm(nn.LayerNorm):
    """LN(x) or, with a branch's output, (x', LN(x')) of x' = x + gamma * (branch + branch_bias). x: [..., D]."""

    def forward(
        self, x: Tensor, branch: Tensor | None = None, gamma: Tensor | None = None,
        out_dtype: torch.dtype | None = None, branch_bias: Tensor | None = None,
    ) -> Tensor | FP8Rows | tuple[Tensor, Tensor | FP8Rows]:  # fmt: skip
        """`out_dtype` is the norm's, x's by default; float8_e4m3fn gives `FP8Rows`. x' keeps x's type."""
        parameters = (self.weight, self.bias, self.eps)
        if out_dtype == E4M3:  # frozen, so the branch has added its bias
            if branch is None:
                return layer_norm_fp8(x, *parameters)
            return residual_layer_norm_fp8(x, branch, gamma, *parameters)
        if branch is None:
            return layer_norm(x, *parameters, out_dtype)
        return residual_layer_norm(x, branch, gamma, *parameters, out_dtype, branch_bias)


class Linear(nn.Linear):
    """A linear layer that may leave its bias to what reads the product. [..., in] -> [..., out]."""

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        return F.linear(x, self.weight, self.bias if add_bias else None)


class LayerScale(nn.Module):
    """A learned gain per channel (Touvron et al., CaiT, ICCV 2021). x: [..., D]."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class SelfAttention(nn.Module):
    """Multi-head self-attention; `rope` is (cos, sin) of `rope2d_angles` or None. x: [B, N, D]."""

    def __init__(self, dim: int, num_heads: int, backend: str = "auto") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    last = property(lambda self: self.proj, doc="The layer whose output is the branch's.")

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, add_bias: bool = True) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, D / H]
        if rope is not None:
            qkv = rope2d(qkv, *rope) if followed(qkv) else rope2d_(qkv, *rope)
        return self.proj(attention(qkv, self.backend).flatten(2), add_bias)


class MLP(nn.Module):
    """Linear, exact GELU or one of `ACTIVATIONS`, Linear. x: [..., D]."""

    epilogue_gelu = False
    """Whether bias and GELU come with the first product, see `linear_gelu`. For frozen models."""

    def __init__(self, dim: int, hidden_dim: int, activation: str = "gelu") -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    last = property(lambda self: self.fc2, doc="The layer whose output is the branch's.")

    def hidden(self, x: Tensor | FP8Rows) -> Tensor | FP8Rows:
        """The activation of the first layer's output."""
        if self.activation != "gelu":
            return ACTIVATIONS[self.activation](self.fc1(x))
        if isinstance(self.fc1, FP8Linear):
            return bias_gelu_fp8(self.fc1(x, add_bias=False), self.fc1.bias)
        if self.epilogue_gelu:
            return linear_gelu(x, self.fc1.weight, self.fc1.bias)
        if use_triton(x):  # the bias goes with GELU: its gradient comes out of the pass that makes GELU's
            return bias_gelu(self.fc1(x, add_bias=False), self.fc1.bias)
        u = self.fc1(x)
        # in place without a gradient: a CPU needs no fresh pages, the values are the same
        return F.gelu(u) if u.requires_grad else torch.ops.aten.gelu_(u)

    def forward(self, x: Tensor | FP8Rows, add_bias: bool = True) -> Tensor:
        return self.fc2(self.hidden(x), add_bias)


class SwiGLU(nn.Module):
    """Linear, SiLU of the first half times the second, Linear (Shazeer, "GLU Variants Improve Transformer", 2020).

    Names and packing are those of DINOv2's ViT-g. x: [..., D].
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = Linear(dim, 2 * hidden_dim)
        self.w3 = Linear(hidden_dim, dim)

    last = property(lambda self: self.w3, doc="The layer whose output is the branch's.")

    def forward(self, x: Tensor | FP8Rows, add_bias: bool = True) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value, add_bias)


def swiglu_hidden_dim(dim: int, mlp_ratio: float) -> int:
    """Hidden channels of a SwiGLU with about as many weights as the MLP of this ratio: 2/3, up to a multiple of 8."""
    return (int(int(dim * mlp_ratio) * 2 / 3) + 7) // 8 * 8


def run_branch(branch: SelfAttention | MLP | SwiGLU, x: Tensor | FP8Rows, *args) -> tuple[Tensor, Tensor | None]:
    """A branch's output, and its last bias where that is trained and so left to the residual addition."""
    last = branch.last
    apart = last.bias is not None and last.bias.requires_grad and use_triton(x, last.bias)
    out = branch(x, *args, add_bias=not apart)
    return out, last.bias if apart else None  # looked up only now: ZeRO 3 empties it when its layer has run


class Block(nn.Module):
    """One pre-norm transformer block; `mlp` is of `MLP_KINDS` or `ACTIVATIONS`. x: [B, N, D] -> [B, N, D]."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, layer_scale: float | None = 1e-4, mlp: str = "gelu",
        norm_eps: float = LAYER_NORM_EPS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=norm_eps)
        self.attn = SelfAttention(dim, num_heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = LayerNorm(dim, eps=norm_eps)
        if mlp not in (kinds := (*MLP_KINDS, *ACTIVATIONS)):
            raise ValueError(f"mlp is {mlp!r}; choose one of {', '.join(kinds)}")
        gated = mlp == "swiglu"
        self.mlp = SwiGLU(dim, swiglu_hidden_dim(dim, mlp_ratio)) if gated else MLP(dim, int(dim * mlp_ratio), mlp)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, normed: Tensor | FP8Rows | None = None,
        next_norm: LayerNorm | None = None, next_dtype: torch.dtype | None = None,
        kept: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | FP8Rows]:  # fmt: skip
        """The block's output x [B, N, D], or (x, next_norm(x)) where the next block's norm is given.

        Args:
            rope: (cos, sin) of `rope2d_angles`, or None.
            normed: norm1(x), where the block before has made it.
            next_norm: the next block's `norm1`.
            next_dtype: of next_norm(x), this block's `input_dtype` by default; without `next_norm` of x, its own.
            kept: int64 [n] or, of every image its own, [B, n]: the tokens that go on after attention; all by default.
        """
        dtype = self.input_dtype(x)
        if normed is None:
            normed = self.norm1(x, out_dtype=dtype)
        branch, bias = run_branch(self.attn, normed, rope)
        x, branch = select(x, kept), select(branch, kept)
        x, normed = self.norm2(x, branch, getattr(self.ls1, "gamma", None), dtype, bias)
        branch, bias = run_branch(self.mlp, normed)
        gamma = getattr(self.ls2, "gamma", None)
        if next_norm is None:
            return residual(x, branch, gamma, bias, next_dtype)
        return next_norm(x, branch, gamma, next_dtype or dtype, bias)

    def input_dtype(self, x: Tensor) -> torch.dtype:
        """The type in which this block's linear layers want their input, for a stream of tokens like x."""
        return E4M3 if isinstance(self.attn.qkv, FP8Linear) else product_dtype(x)

    def quantize(self) -> None:
        """Makes the four linear layers float8 with row-wise scales, for good; for frozen models, see `kernels.fp8`."""
        linears = ("w12", "w3") if isinstance(self.mlp, SwiGLU) else ("fc1", "fc2")
        for parent, names in ((self.attn, ("qkv", "proj")), (self.mlp, linears)):
            for name in names:
                linear = getattr(parent, name)
                half = linear.weight.dtype if linear.weight.dtype == torch.float16 else torch.bfloat16
                setattr(parent, name, FP8Linear(linear, half))


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which a linear layer computes on x: autocast's, or x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def run_blocks(
    blocks: Sequence[Block] | nn.ModuleList, x: Tensor, rope: tuple[Tensor, Tensor] | None = None,
    recompute: bool = False, last_dtype: torch.dtype | None = None,
    last_kept: Tensor | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Un-normalised tokens [B, N, D] after each block in turn; x is what the first one takes.

    They keep x's type, but the last ones have `last_dtype`, e.g. that of the matrix product that reads them, and are
    those of `last_kept` alone (`Block.forward`). Each
    block but the last hands the next its `norm1`, made in the pass that made x. With `recompute` (activation
    checkpointing) nothing but the tokens between blocks is kept for the backward pass, and every block makes its own.
    """
    normed = None
    for i, block in enumerate(blocks):
        last = i + 1 == len(blocks)
        if recompute and torch.is_grad_enabled():
            inputs = (x, rope, None, None, *((last_dtype, last_kept) if last else (None, None)))
            x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing random in a block
        elif last:
            x = block(x, rope, normed, next_dtype=last_dtype, kept=last_kept)
        else:
            x, normed = block(x, rope, normed, blocks[i + 1].norm1, blocks[i + 1].input_dtype(x))
        yield x


def init_linear(linear: nn.Linear) -> None:
    """Truncated normal weights of deviation 0.02, zero bias."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
